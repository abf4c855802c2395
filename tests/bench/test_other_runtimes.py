from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cloven.bench import other_runtimes
from cloven.bench.memory import unsplit_bytes
from cloven.bench.other_runtimes import LLAMA_CPP, PACKAGES, TORCHAO, against_figures, check_runtimes, start_runtime
from cloven.bench.runner import CONTEXT
from cloven.errors import BadInput
from cloven.zoo.shapes import shape_config


def installed(*modules: str) -> Any:
    return lambda name: object() if name in modules else None


def test_runtimes_are_taken_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_runtimes.importlib.util, "find_spec", installed("llama_cpp", "gguf", "torchao"))
    assert check_runtimes(["torchao", "llama.cpp", "torchao"]) == ("torchao", "llama.cpp")
    assert check_runtimes([]) == ()


@pytest.mark.parametrize(
    ("name", "there", "message"),
    [
        ("vllm", (), "--against vllm: choose one of llama.cpp, torchao"),
        ("torchao", ("gguf",), "--against torchao: not installed; pip install torchao$"),
        ("llama.cpp", ("torchao",), "pip install llama-cpp-python gguf$"),
        ("llama.cpp", ("llama_cpp",), "pip install gguf$"),
        ("llama.cpp", ("gguf",), "pip install llama-cpp-python$"),
    ],
)
def test_what_is_not_there_is_named(name: str, there: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_runtimes.importlib.util, "find_spec", installed(*there))
    with pytest.raises(BadInput, match=message):
        check_runtimes([name])


@pytest.mark.parametrize(("tokens", "length"), [(8, "64"), (100, str(100 + CONTEXT))])
def test_each_is_started_with_the_shape_and_room_for_the_tokens(
    tokens: int, length: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(other_runtimes, "RunnerProcess", lambda *arguments, module: started.append((module, *arguments)))
    monkeypatch.setattr(other_runtimes, "write_random_gguf", lambda config, path: started.append((config.num_hidden_layers,)) or path)
    start_runtime(TORCHAO, "tiny", 3, tokens, tmp_path)
    start_runtime(LLAMA_CPP, "tiny", 2, tokens, tmp_path)
    assert started == [
        ("cloven.bench.torchao_runner", "tiny", "3", length, str(tmp_path / "inductor")),
        (2,),
        ("cloven.bench.llama_cpp_runner", str(tmp_path / "random.gguf"), length),
    ]


def test_ratios_are_above_one_where_the_split_model_is_faster() -> None:
    ready = {"version": "it 1.0", "details": "eager", "tokens_per_s": {"eager": 9.0, "compiled": 8.0}}
    results = [{"seconds": [0.1, 0.2]}, {"seconds": [0.3]}]
    figures = against_figures(TORCHAO, ready, results, split_seconds=0.4, split_all=0.8, growth=3.0)
    assert figures.tokens_per_s == 5 and figures.decode_ratio == 0.5 and figures.decode_ratio_all_layers == pytest.approx(0.75)
    assert (figures.name, figures.version, figures.details, figures.ways) == ("torchao", "it 1.0", "eager", ready["tokens_per_s"])
    plain = against_figures(LLAMA_CPP, {"version": "2", "details": "AVX"}, results, 0.1, 0.1, 1.0)
    assert plain.decode_ratio == plain.decode_ratio_all_layers == 2 and plain.ways == {}


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in PACKAGES[LLAMA_CPP]), reason="llama-cpp-python is not installed")
def test_llama_cpp_runs_beside(tmp_path: Path) -> None:
    with start_runtime(LLAMA_CPP, "tiny", 2, 4, tmp_path) as runner:
        answer = runner.ask("decode", tokens=4)
        assert len(answer["seconds"]) == 4 and min(answer["seconds"]) > 0
        assert runner.ready["parameters"] == unsplit_bytes(shape_config("tiny", 2)) // 2
        assert "llama-cpp-python" in runner.ready["version"]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_runs_beside(tmp_path: Path) -> None:
    with start_runtime(TORCHAO, "tiny", 1, 2, tmp_path) as runner:
        assert len(runner.ask("decode", tokens=2)["seconds"]) == 2
        ways = runner.ready["tokens_per_s"]
        assert set(ways) == {"eager", "compiled", "compiled, frozen"} and min(ways.values()) > 0
        assert ways[runner.ready["details"]] == max(ways.values())
    assert list((tmp_path / "inductor").rglob("*.py"))  # what was compiled stays there, and goes with the folder
