from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cloven.serving import live as module
from cloven.serving.live import RESIDUES, Live
from cloven.telemetry import LayerStatistics, Telemetry
from tests.served import NAME, endpoint, run


class Channel:
    """As much of one as is watched."""

    def __init__(self) -> None:
        self.watcher: Callable[[str, Tensor], None] | None = None

    def send(self, layer: str, c: Tensor) -> None:
        if self.watcher is not None:
            self.watcher(layer, c)


def session() -> Any:
    return SimpleNamespace(channel=Channel(), telemetry=Telemetry())


def made(monkeypatch: pytest.MonkeyPatch, scheme: str | None, running: Any = ()) -> tuple[Live, Any]:
    """A view of a served model without a model, and that."""
    monkeypatch.setattr(module, "scheme_of", lambda _: scheme)
    served: Any = SimpleNamespace(model=None, session=session(), state="ready")
    return Live(served, lambda: running, lambda: 3), served


@pytest.mark.parametrize("scheme", ["slip", "private-lora"])
def test_what_was_sent_last(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    live, served = made(monkeypatch, scheme)
    channel = served.session.channel
    assert channel.watcher is None  # nobody has looked
    assert live.look()["sent"] is None
    first, second = torch.arange(600).reshape(3, 200).int(), torch.arange(-10, 10).reshape(1, 20).int()
    channel.send("layer 1", first)
    assert live.look()["sent"] == {"layer": "layer 1", "width": 200, "residues": list(range(600 - RESIDUES, 600))}
    channel.send("layer 2", second)
    assert live.look()["sent"] == {"layer": "layer 2", "width": 20, "residues": list(range(-10, 10))}


@pytest.mark.parametrize("scheme", ["kv-shield", None])
def test_what_is_not_masked_is_not_watched(monkeypatch: pytest.MonkeyPatch, scheme: str | None) -> None:
    live, served = made(monkeypatch, scheme)
    seen = live.look()
    assert seen["sent"] is None and seen["scheme"] == (scheme or "none") and served.session.channel.watcher is None


def test_another_session_is_watched_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    live, served = made(monkeypatch, "slip")
    live.look()
    served.session.channel.send("old", torch.zeros(1, 4).int())
    served.session = session()
    assert live.look()["sent"] is None
    served.session.channel.send("new", torch.zeros(1, 4).int())
    assert live.look()["sent"]["layer"] == "new"


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[Any] = []
    live, served = made(monkeypatch, "slip", running)
    record = LayerStatistics(exchanges=2, rows=5, bytes_up=300, bytes_down=4000)
    for layer in ("a", "b"):
        served.session.telemetry.record(layer, record)
    seen = live.look()
    assert (seen["exchanges"], seen["rows"], seen["bytes_up"], seen["bytes_down"]) == (4, 10, 600, 8000)
    assert (seen["running"], seen["waiting"], seen["tokens_per_s"], seen["state"]) == (0, 3, None, "ok")
    running += [SimpleNamespace(rate=5.0), SimpleNamespace(rate=None), SimpleNamespace(rate=2.5)]
    seen = live.look()
    assert seen["running"] == 3 and seen["tokens_per_s"] == 7.5
    one: Any = running.pop(0)
    running.clear()
    live.ended(one)
    assert live.look()["tokens_per_s"] == 5.0
    nothing: Any = SimpleNamespace(rate=None)
    live.ended(nothing)
    assert live.look()["tokens_per_s"] == 5.0
    served.state = "away"
    assert live.look()["state"] == "away"


def test_while_a_request_is_computed() -> None:
    async def scenario() -> None:
        for running in (1, 4):
            async with endpoint(max_running=running) as (client, _, _):
                before = (await client.get("/live")).json()
                assert before["model"] == NAME and before["chat"] is True and before["compare"] is False and before["max_tokens"] == 1024
                assert before["running"] == 0 and before["tokens_per_s"] is None
                body = {"prompt": "ROMEO:", "max_tokens": 100, "temperature": 0}
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                seen = before
                while seen["tokens_per_s"] is None and not asked.done():
                    seen = (await client.get("/live")).json()
                    await asyncio.sleep(0.005)
                assert seen["running"] == 1 and seen["tokens_per_s"] > 0
                assert (await asked).status_code == 200
                after = (await client.get("/live")).json()
                assert after["running"] == 0 and after["tokens_per_s"] > 0

    run(scenario)
