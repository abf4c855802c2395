"""A worker that lies in real sessions.

Adversary: A2, a worker that answers wrongly, in a live session.
Method: the bundle's own model is attached, over the wire, to a worker that answers a first pass rightly and then tells one lie about one
    matrix: the kinds of lies are those of `audit.slip.liars`, the matrices the first, the middle and the last that a pass meets. After
    every lie the session must have ended, with no output.
Success: the pass goes on, whatever comes of it.
Weakened: the same sessions with a check whose secret is zero, which accepts everything; a lie succeeds if the logits differ from those of
    the true answer.
Source: Freivalds 1977; the use is SLIP's.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloven.audit.attack import Attack
from cloven.audit.slip.liars import KINDS, accepting, lie_of, verdict_of_lies
from cloven.audit.slip.subject import Subject
from cloven.errors import RunError, VerificationFailed
from cloven.field.residues import P
from cloven.model.attach import attach
from cloven.offload import OneWorker, Share
from cloven.slip.session import SlipSession
from cloven.slip.split_model import groups_of
from cloven.wire.messages import Multiply, residue_frame, residues_of_frame, unpack
from cloven.wire.server import Frame
from cloven.worker.service import Worker

ROWS = 3  # tokens of a pass


class LyingWorker(Worker):
    """Answers rightly, but for one lie: `tell(kind, group)` is told about that group's next product."""

    def __init__(self, folder: Path, address: str) -> None:
        super().__init__(folder, address)
        self._products = None  # products without Python cannot be lied about here
        self._lie: tuple[int, int] | None = None
        self._older = dict[int, Tensor]()
        self.told = 0  # lies that were not the right answer by chance

    def tell(self, kind: int, group: int) -> None:
        """Lie about the next product with this group's matrix."""
        self._lie = kind, group

    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        """See `Server.answer`."""
        honest = super().answer(frames, peer)
        message, payload = unpack(frames)
        if not isinstance(message, Multiply) or payload is None:
            return honest
        w = self.matrices.groups[message.group]
        assert w is not None
        z = residues_of_frame(memoryview(honest[1]), message.rows, w.rows)
        if self._lie is not None and self._lie[1] == message.group:
            kind, self._lie = self._lie[0], None
            c = residues_of_frame(payload, message.rows, w.columns)
            alike = [one.codes for one in self.matrices.groups if one is not None and one is not w and one.codes.shape == w.codes.shape]
            older = self._older.get(message.group)
            lie = lie_of(kind, z, older if older is not None and older.shape == z.shape else z, c, w.codes, alike, self.matrices.backend)
            self.told += int(not torch.equal(lie % P, z % P))
            return [honest[0], residue_frame(lie)]
        self._older[message.group] = z.clone()
        return honest


@contextmanager
def lying_worker(exposed: Path) -> Iterator[tuple[LyingWorker, str]]:
    """A lying worker in a thread of this process, and its address."""
    with tempfile.TemporaryDirectory(prefix="cloven-audit-") as folder:
        address = f"ipc://{folder}/worker/socket"
        worker = LyingWorker(exposed, address)
        thread = threading.Thread(target=worker.serve, name="lying-worker")
        thread.start()
        try:
            yield worker, address
        finally:
            worker.stop()
            thread.join()


@torch.no_grad()
def lies_in_sessions(subject: Subject) -> list[Attack]:
    """See the module."""
    model = AutoModelForCausalLM.from_pretrained(subject.bundle.trusted, dtype=torch.float32, trust_remote_code=False)
    first, second = subject.text[:1, :ROWS], subject.text[:1, ROWS : 2 * ROWS]
    order = [group.index for group in groups_of(model)]
    asked = list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))
    believed = 0
    with lying_worker(subject.bundle.exposed.absolute()) as (worker, address):
        for kind in range(len(KINDS)):
            for group in asked:
                with attach(model, address, exposed=subject.bundle.exposed, look_ahead=0) as session:
                    model(input_ids=first, use_cache=False)
                    before = worker.told
                    worker.tell(kind, group)
                    try:
                        model(input_ids=second, use_cache=False)
                    except VerificationFailed:
                        believed += int(not session.closed)
                    except RunError:  # such as numbers that have become infinite: the lie was used
                        believed += worker.told - before
                    else:
                        believed += worker.told - before
        told = worker.told
        weak = _believed_without_a_check(model, worker, address, subject, asked)
    metric = (
        f"share of the lies of {len(KINDS)} kinds about {len(asked)} matrices, each in a session of its own, after which the pass went on"
    )
    return [
        Attack(
            "liar_in_session",
            subject.scheme,
            "A2, a worker that answers wrongly",
            metric,
            believed / told,
            0.0,
            weak,
            told,
            verdict_of_lies(believed),
        )
    ]


def _believed_without_a_check(model: PreTrainedModel, worker: LyingWorker, address: str, subject: Subject, asked: list[int]) -> float:
    """The share of lies that change the logits when the check's secret is zero."""
    ids = subject.text[:1, ROWS : 2 * ROWS]
    with attach(model, address, exposed=subject.bundle.exposed, look_ahead=0) as session:
        assert isinstance(session, SlipSession)
        for group, offloaded in zip(groups_of(model), session.offloaded, strict=True):
            (share,) = offloaded.shares
            channel, _ = share.holder.current(group.index)
            weakened = replace(offloaded, shares=(Share(share.rows, OneWorker(channel, accepting(offloaded.rows, offloaded.columns))),))
            group.attach(weakened.product, weakened.fused)
        true: Tensor = model(input_ids=ids, use_cache=False).logits

        def changed() -> bool:
            try:
                return not torch.equal(model(input_ids=ids, use_cache=False).logits, true)  # true answers repeat bit for bit
            except RunError:
                return True

        believed, before = 0, worker.told
        for kind in range(len(KINDS)):
            for number in asked:
                told = worker.told
                worker.tell(kind, number)
                believed += int(changed() and worker.told > told)
        return believed / (worker.told - before)
