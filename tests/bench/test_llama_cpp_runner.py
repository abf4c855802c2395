from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cloven.bench.llama_cpp_runner import LlamaCpp
from cloven.bench.runner import CONTEXT, random_model
from cloven.errors import RunError
from cloven.zoo.random_gguf import write_random_gguf
from cloven.zoo.shapes import shape_config

needs_llama_cpp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")), reason="llama-cpp-python is not installed"
)


class FakeLibrary:
    """The calls that are made of llama.cpp: after each token, the likeliest next one is the one after it."""

    __version__ = "9.9"
    VOCABULARY = 6

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.code = 0
        self.model: object | None = object()
        self.context: object | None = object()
        self.options = SimpleNamespace(n_ctx=0, n_threads=0, n_threads_batch=0)
        self.logits = (ctypes.c_float * self.VOCABULARY)()

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        fixed = {
            "llama_log_set": None,
            "llama_backend_init": None,
            "llama_model_default_params": None,
            "llama_model_load_from_file": self.model,
            "llama_context_default_params": self.options,
            "llama_init_from_model": self.context,
            "llama_vocab_n_tokens": self.VOCABULARY,
            "llama_model_get_vocab": None,
            "llama_get_memory": None,
            "llama_print_system_info": b"CPU :  AVX = 1 | ",
            "llama_model_n_params": 123,
        }
        if name not in fixed:
            raise AttributeError(name)
        return lambda *_: fixed[name]

    def llama_memory_clear(self, *_: object) -> None:
        self.tokens.append(-1)

    def llama_batch_get_one(self, array: Any, count: int) -> list[int]:
        return list(array[:count])

    def llama_decode(self, _context: object, batch: list[int]) -> int:
        self.tokens += batch
        for token in range(self.VOCABULARY):
            self.logits[token] = float(token == (batch[-1] + 1) % self.VOCABULARY)
        return self.code

    def llama_get_logits_ith(self, _context: object, _row: int) -> Any:
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)  # type: ignore[arg-type]
    return fake


def test_greedy_steps_after_the_context_from_an_empty_cache(library: FakeLibrary) -> None:
    runner = LlamaCpp("file", 64)
    context = [token % 6 for token in range(CONTEXT)]
    for _ in range(2):
        library.tokens.clear()
        assert len(runner.decode(3)["seconds"]) == 3
        assert library.tokens == [-1, *context, 2, 3, 4]


def test_what_it_says_of_itself(library: FakeLibrary) -> None:
    runner = LlamaCpp("file", 77)
    assert (runner.version, runner.details, runner.parameters) == ("llama-cpp-python 9.9", "CPU : AVX = 1 |", 123)
    assert (library.options.n_ctx, library.options.n_threads) == (77, runner.threads) and runner.threads >= 1


def test_failures(library: FakeLibrary) -> None:
    runner = LlamaCpp("file", 64)
    library.code = 1
    with pytest.raises(RunError, match="llama_decode failed with code 1"):
        runner.decode(1)
    library.context = None
    with pytest.raises(RunError, match="makes no context of 64 tokens"):
        LlamaCpp("file", 64)
    library.model = None
    with pytest.raises(RunError, match="does not load file"):
        LlamaCpp("file", 64)


@needs_llama_cpp
def test_the_file_is_the_model_that_transformers_would_run(tmp_path: Path) -> None:
    """The random weights, read back and given to transformers, make the same logits: the shapes, heads and positions are the same."""
    import gguf

    config = shape_config("tiny", 2)
    path = write_random_gguf(config, tmp_path / "random.gguf")
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    model = random_model("tiny", "2").float().eval()
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "lm_head.weight": tensors["output.weight"]}
    for layer in range(2):
        for ours, theirs in names.items():
            w = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, transformers halves: its converter reorders the rows
                w = w.reshape(-1, config.head_dim // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            state[f"model.layers.{layer}.{ours}.weight"] = w
    loaded = model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}, strict=False)
    assert loaded.unexpected_keys == [] and all("norm" in name for name in loaded.missing_keys)
    runner = LlamaCpp(str(path), 64)
    assert runner.parameters == sum(parameter.numel() for parameter in model.parameters())
    runner.decode(0)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(CONTEXT)[None]).logits[0, -1].numpy()
    error = np.linalg.norm(runner.logits() - expected) / np.linalg.norm(expected)
    assert error < 0.02  # llama.cpp quantises activations to 8 bits


@needs_llama_cpp
def test_a_file_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing.gguf").write_bytes(bytes(100))
    with pytest.raises(RunError, match=r"llama\.cpp .* does not load .*nothing\.gguf"):
        LlamaCpp(str(tmp_path / "nothing.gguf"), 64)
    assert "nothing.gguf" in capfd.readouterr().err  # its own words are errors only
