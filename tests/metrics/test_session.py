"""The trusted side's numbers: of sessions that stand in, and of real ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor, nn

from cloven.errors import PeerRefused, SessionClosed, VerificationFailed
from cloven.metrics.catalog import BY_NAME
from cloven.metrics.session import SessionMetrics
from cloven.model.runtime import Session
from cloven.slip.pads import fill, fill_job
from cloven.telemetry import LayerStatistics, Telemetry
from tests.split_models import load, logits, open_session, random_ids, tiny_bundle, worker_thread


@dataclass
class StandIn:
    telemetry: Telemetry = field(default_factory=Telemetry)
    closed: bool = False
    ready: int | None = None
    stored: int | None = None

    def pads_ready(self) -> int | None:
        return self.ready

    def pads_stored(self) -> int | None:
        return self.stored


def values(metrics: SessionMetrics, model: str = "m") -> dict[str, float]:
    found = {sample.name.removeprefix("cloven_session_"): sample.value for sample in metrics.samples() if sample.labels == (model,)}
    assert all(f"cloven_session_{name}" in BY_NAME for name in found)
    return found


def test_what_is_published_of_a_session() -> None:
    metrics, session = SessionMetrics(), StandIn()
    assert list(metrics.samples()) == []
    metrics.watch("m", session)
    session.telemetry.record("a", LayerStatistics(1, 2, 3, 4, 0.5, 6.0, 1))
    session.telemetry.record("b", LayerStatistics(1, 2, 3, 4, 0.5, 6.0, 1))
    session.telemetry.verification_failed()
    assert values(metrics) == {
        "open": 1.0,
        "exchanges_total": 2.0,
        "rows_total": 4.0,
        "sent_bytes_total": 6.0,
        "received_bytes_total": 8.0,
        "wait_seconds_total": 1.0,
        "round_trip_seconds_total": 12.0,
        "resent_total": 2.0,
        "verification_failures_total": 1.0,
    }
    session.closed, session.ready, session.stored = True, 5, 0
    assert {name: values(metrics)[name] for name in ("open", "pads_ready", "pads_stored")} == {"open": 0, "pads_ready": 5, "pads_stored": 0}


def test_counts_go_on_when_a_session_takes_the_place_of_another() -> None:
    metrics, sessions = SessionMetrics(), [StandIn() for _ in range(3)]
    for session in sessions:
        metrics.watch("m", session)
        metrics.watch("m", session)  # again: counted once
        session.telemetry.record("a", LayerStatistics(exchanges=1, rows=10))
        session.telemetry.verification_failed()
    assert (values(metrics)["exchanges_total"], values(metrics)["rows_total"]) == (3, 30)
    assert values(metrics)["verification_failures_total"] == 3
    metrics.watch("another", StandIn())
    assert values(metrics, "another")["exchanges_total"] == 0 and values(metrics)["exchanges_total"] == 3


class Wire:
    """A connection that goes nowhere."""

    address = "ipc:///x"

    def close(self) -> None:
        """Nothing to close."""


def test_a_failed_verification_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    session = Session(nn.Linear(1, 1), Wire(), Telemetry())

    def wrong() -> Tensor:
        error = VerificationFailed("layer.3: the worker's answer is wrong")
        error.worker = "ipc:///x"
        raise error

    with caplog.at_level(logging.INFO, "cloven"), pytest.raises(VerificationFailed):
        session.guarded(wrong)
    assert session.closed and session.telemetry.verification_failures == 1
    events = [getattr(record, "event", "") for record in caplog.records]
    assert events == ["verification_failed", "session_closed"] and caplog.records[0].fields["peer"] == "ipc:///x"  # type: ignore[attr-defined]
    with pytest.raises(SessionClosed):
        session.guarded(wrong)
    assert session.telemetry.verification_failures == 1


def test_other_ends_are_no_failed_verifications() -> None:
    session = Session(nn.Linear(1, 1), Wire(), Telemetry())

    def refused() -> Tensor:
        raise PeerRefused("an unlisted key")

    with pytest.raises(PeerRefused):
        session.guarded(refused)
    assert session.closed and session.telemetry.verification_failures == 0
    assert session.pads_ready() is None and session.pads_stored() is None


def test_a_real_session() -> None:
    """Its counts are its telemetry's, its pads are those that are ready; a closed one still tells what it counted."""
    bundle, metrics = tiny_bundle("llama"), SessionMetrics()
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address, look_ahead=0) as session:
        metrics.watch("m", session)
        session.make_pads(7)
        assert values(metrics)["pads_ready"] == 7 and "pads_stored" not in values(metrics)
        logits(model, random_ids(97, 1, 3))
        total = session.telemetry.total()
        found = values(metrics)
        assert found["pads_ready"] == 4 and found["exchanges_total"] == total.exchanges > 0
        assert (found["sent_bytes_total"], found["received_bytes_total"]) == (total.bytes_up, total.bytes_down)
    ended = values(metrics)
    assert ended["open"] == 0 and ended["exchanges_total"] == total.exchanges and "pads_ready" not in ended


def test_a_session_with_a_store(tmp_path: Path) -> None:
    bundle, metrics = tiny_bundle("llama"), SessionMetrics()
    fill(fill_job(bundle.trusted, 40, tmp_path / "pads"))
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address, pads=tmp_path / "pads", look_ahead=0) as session:
        metrics.watch("m", session)
        assert values(metrics)["pads_stored"] == 40
        logits(model, random_ids(97, 1, 3))
        assert values(metrics)["pads_stored"] == 37
        state = tmp_path / "pads" / "state.json"
        kept = state.read_bytes()
        state.write_text("{}")
        assert "pads_stored" not in values(metrics)  # not known, and no reason to end the endpoint
        state.write_bytes(kept)
    assert "pads_stored" not in values(metrics)
