from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from cloven.bench.runner import CONTEXT, random_model
from cloven.bench.torchao_runner import COMPILED, EAGER, FROZEN, TRIAL, WAYS, TorchAo

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


class Slowed(TorchAo):
    """Ways that differ in how long they sleep; one cannot be compiled."""

    SECONDS: ClassVar[dict[str, float]] = {EAGER: 0.03, COMPILED: 0.0, FROZEN: 0.06}
    FAILS = ""

    def _forward_of(self, way: str) -> Callable[..., Any]:
        def forward(**arguments: Any) -> Any:
            if way == self.FAILS:
                raise NotImplementedError("no such operation")
            time.sleep(self.SECONDS[way])
            self.calls.append((way, arguments))
            return self.model(**arguments)

        self.calls: list[tuple[str, dict[str, Any]]] = getattr(self, "calls", [])
        return forward


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> Slowed:
    """Without the library: nothing is quantised."""
    fake, quantization = ModuleType("torchao"), ModuleType("torchao.quantization")
    fake.__version__ = "8.8"  # type: ignore[attr-defined]
    quantization.Int8WeightOnlyConfig = SimpleNamespace  # type: ignore[attr-defined]
    quantization.quantize_ = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", fake)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    return Slowed(random_model("tiny", "1"), 64)


def test_the_fastest_way_is_kept(slowed: Slowed) -> None:
    slowed.choose()
    assert slowed.way == COMPILED and set(slowed.tokens_per_s) == set(WAYS)
    assert slowed.tokens_per_s[COMPILED] > slowed.tokens_per_s[EAGER] > slowed.tokens_per_s[FROZEN] > 0
    assert [way for way, _ in slowed.calls] == [way for way in WAYS for _ in range(1 + TRIAL)]
    slowed.calls.clear()
    slowed.decode(2)
    assert [way for way, _ in slowed.calls] == [COMPILED] * 2
    assert slowed.version.startswith("torchao 8.8, torch 2")


def test_a_way_that_fails_is_said_and_left_out(slowed: Slowed, caplog: pytest.LogCaptureFixture) -> None:
    slowed.FAILS = COMPILED
    with caplog.at_level(logging.WARNING):
        slowed.choose()
    assert slowed.way == EAGER and slowed.tokens_per_s[COMPILED] == 0 and "compiled: no such operation" in caplog.text


def test_without_any_way_there_is_nothing_to_compare(slowed: Slowed) -> None:
    slowed.FAILS = EAGER
    with pytest.raises(NotImplementedError):
        slowed.choose()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_decodes_the_same_tokens(slowed: Slowed, way: str) -> None:
    """With a cache that grows and with one of a fixed length, used twice: as many tokens, greedy, after the same context."""
    expected, ids = [], torch.arange(CONTEXT)[None]
    for _ in range(3):
        with torch.no_grad():
            token = slowed.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        expected.append(int(token))
        ids = torch.cat([ids, token], dim=1)
    slowed.way, slowed._forward = way, slowed._forward_of(way)
    for _ in range(2):
        slowed.calls.clear()
        assert len(slowed.decode(3)["seconds"]) == 3
        assert [int(arguments["input_ids"]) for _, arguments in slowed.calls] == expected


@needs_torchao
def test_the_weights_are_int8_the_head_included() -> None:
    model = random_model("tiny", "1")
    before = [layer.weight.detach().clone() for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    runner = TorchAo(model, 64)
    linears = [layer for layer in runner.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == len(before) == 8
    for layer, weight in zip(linears, before, strict=True):
        assert layer.weight.qdata.dtype == torch.int8 and layer.weight.qdata.shape == weight.shape  # type: ignore[union-attr]
        assert float((layer.weight.dequantize() - weight).norm() / weight.norm()) < 0.02  # type: ignore[operator]
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    runner.choose((EAGER,))
    assert runner.way == EAGER and len(runner.decode(2)["seconds"]) == 2
