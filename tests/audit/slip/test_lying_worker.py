from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloven.audit.slip.liars import KINDS
from cloven.audit.slip.lying_worker import LyingWorker, lies_in_sessions, lying_worker
from cloven.errors import SessionClosed, VerificationFailed
from cloven.field.freivalds import Freivalds
from cloven.model.attach import attach
from cloven.slip.split_model import groups_of
from cloven.wire.messages import Multiply, pack, residue_frame, residues_of_frame
from tests.audit.slip.subjects import demo_subject, named, tiny_subject
from tests.split_models import load, tiny_bundle

IDS = torch.tensor([[5, 6, 7]])


def test_every_lie_ends_its_session() -> None:
    attack = named(lies_in_sessions(demo_subject()))["liar_in_session"]
    assert (attack.value, attack.verdict) == (0.0, "holds")
    assert attack.tries > 2 * len(KINDS) and attack.weakened_value > 0.9


def test_without_the_check_the_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Freivalds, "check", lambda *_: None)
    monkeypatch.setattr(Freivalds, "check_by", lambda self, kernel, rows, what: kernel(self._test) and None)
    attack = named(lies_in_sessions(tiny_subject()))["liar_in_session"]
    assert attack.value == 1.0 and attack.verdict == "broken"


def test_a_session_that_lives_on_after_a_lie_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloven.model.runtime.Session.closed", property(lambda self: False))
    attack = named(lies_in_sessions(tiny_subject()))["liar_in_session"]
    assert attack.verdict == "broken"


def test_it_lies_once_about_one_group_and_only_there() -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    group = groups_of(model)[1].index
    with lying_worker(bundle.exposed) as (worker, address), attach(model, address, exposed=bundle.exposed, look_ahead=0) as session:
        first = model(input_ids=IDS, use_cache=False).logits
        worker.tell(0, group)
        with pytest.raises(VerificationFailed, match="the worker's answer is wrong in"):
            model(input_ids=IDS, use_cache=False)
        assert worker.told == 1 and session.closed
        with pytest.raises(SessionClosed):
            model(input_ids=IDS, use_cache=False)
        with attach(model, address, exposed=bundle.exposed, look_ahead=0):  # the lie is told, and over
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, first)
            assert worker.told == 1


def test_the_answers_before_a_lie_are_right(tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    worker = LyingWorker(bundle.exposed, f"ipc://{tmp_path}/w")
    try:
        w = worker.matrices.groups[0]
        assert w is not None
        c = torch.arange(2 * w.columns, dtype=torch.int32).view(2, -1)
        frames = [pack(Multiply(1, worker.matrices.bundle, 0, 2)), memoryview(bytes(residue_frame(c)))]
        right = worker.answer(list(frames), "local")
        for kind in range(len(KINDS)):
            worker.tell(kind, 0)
            told, lied = worker.told, worker.answer(list(frames), "local")
            z, lie = (residues_of_frame(memoryview(answer[1]), 2, w.rows) for answer in (right, lied))
            assert torch.equal(z, lie) == (worker.told == told)
        assert worker.told >= len(KINDS) - 2  # an older answer to the same question is right, and no other matrix need be of this shape
        assert bytes(worker.answer(list(frames), "local")[1]) == bytes(right[1])
    finally:
        worker.close()
