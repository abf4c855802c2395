"""Can the worker lie?

Adversary: A2, a worker that answers wrongly.
Method: for real matrices of the bundle and random questions, the right answer is computed and then replaced: one element changed by
    much or by one, an older answer, another matrix's answer, rows swapped, one row for all, zeros, scaled, the question itself, the
    product with a matrix in which one bit differs.
Success: a lie that differs from the right answer is accepted.
Weakened: no check; then every one of them is.
Source: Freivalds 1977, over a prime field.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cloven.audit.attack import Attack, Verdict
from cloven.audit.slip.subject import Subject
from cloven.errors import VerificationFailed
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.field.products import Backend, multiply
from cloven.field.residues import centre
from cloven.field.selection import select_backend

ROWS = 3
MOST_GROUPS = 16


def _one_element(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    z[-1, z.shape[1] // 2] += 2**20
    return z


def _by_one(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    z[0, 0] -= 1
    return z


def _older_answer(_z: Tensor, older: Tensor, _c: Tensor) -> Tensor:
    return older


def _another_rows(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    return z.roll(1, 0)


def _one_row_for_all(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    return z[:1].expand_as(z).clone()


def _zeros(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    return torch.zeros_like(z)


def _doubled(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    return 2 * z


def _negated(z: Tensor, _older: Tensor, _c: Tensor) -> Tensor:
    return -z


def _the_question(z: Tensor, _older: Tensor, c: Tensor) -> Tensor:
    return c[:, :1].expand_as(z).clone()


LIES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _one_element,
    _by_one,
    _older_answer,
    _another_rows,
    _one_row_for_all,
    _zeros,
    _doubled,
    _negated,
    _the_question,
)


def lies_about(codes: Tensor, other: Tensor | None, backend: Backend) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(c, right answer, lie) for every kind of lie that differs from the right answer; residues int32.

    Args:
        codes: W int8 [N, K].
        other: another matrix of the same shape, whose product is a lie too.
    """
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "audit")
    c, before = (stream.residues(ROWS, codes.shape[1]) for _ in range(2))
    placed = backend.place(codes)
    z, older = (multiply(backend, question, placed) for question in (c, before))
    answers = [centre(lie(z.clone().long(), older.long(), c.long())) for lie in LIES]
    altered = codes.clone()
    altered[0, 0] ^= 1
    answers += [multiply(backend, c, backend.place(matrix)) for matrix in (altered, other) if matrix is not None]
    for answer in answers:
        if not torch.equal(answer, z):
            yield c, z, answer.to(torch.int32)


def verdict_of_lies(believed: int) -> Verdict:
    """One lie in 2^61 is believed by chance: a single one breaks the claim."""
    return "broken" if believed else "holds"


def liars(subject: Subject) -> list[Attack]:
    """See the module."""
    backend = select_backend()
    told = believed = 0
    groups = subject.groups[:MOST_GROUPS]
    for group in groups:
        codes = group.codes
        other = next((one.codes for one in subject.groups if one is not group and one.codes.shape == codes.shape), None)
        s = SecretStream(secrets.token_bytes(KEY_BYTES), "audit").residues(CHECKS, codes.shape[0])
        check = Freivalds(s, backend, backend.place(codes))
        for c, _, lie in lies_about(codes, other, backend):
            told += 1
            try:
                check.check(c, lie, "an answer")
            except VerificationFailed:
                continue
            believed += 1
    metric = f"share of the lies of {len(LIES) + 2} kinds about {len(groups)} of the bundle's matrices that were believed"
    adversary, verdict = "A2, a worker that answers wrongly", verdict_of_lies(believed)
    return [Attack("liar", subject.scheme, adversary, metric, believed / told, 0.0, 1.0, told, verdict)]
