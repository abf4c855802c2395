"""Can the worker lie?

Adversary: A2, a worker that answers wrongly.
Method: for real matrices of the bundle and random questions, the right answer is computed and then replaced: one element changed by
    much or by one, an older answer, another matrix's answer, rows swapped, one row for all, zeros, scaled, the question itself, the
    product with a matrix in which one bit differs.
Success: a lie that differs from the right answer is accepted.
Weakened: a check whose secret is zero accepts every one of them.
Source: Freivalds 1977, over a prime field.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence

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


def _one_bit_of_the_matrix(codes: Tensor, c: Tensor, backend: Backend) -> Tensor:
    altered = codes.clone()
    altered[0, 0] ^= 1
    return multiply(backend, c, backend.place(altered))


KINDS = (*(lie.__name__.strip("_") for lie in LIES), "one_bit_of_the_matrix", "another_matrix")


def lie_of(kind: int, z: Tensor, older: Tensor, c: Tensor, codes: Tensor, alike: Sequence[Tensor], backend: Backend) -> Tensor:
    """A lie of a kind, an index into KINDS: int32 [M, N], centred; the right answer where that is what it comes to.

    Args:
        z: the right answer [M, N].  older: the answer to an older question.  c: the question [M, K].
        codes: W int8 [N, K].
        alike: other matrices of its shape, the first of which is mistaken for it.
    """
    if kind < len(LIES):
        return centre(LIES[kind](z.clone().long(), older.long(), c.long())).to(torch.int32)
    if KINDS[kind] == "one_bit_of_the_matrix":
        return _one_bit_of_the_matrix(codes, c, backend)
    return multiply(backend, c, backend.place(alike[0])) if alike else z


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
    for kind in range(len(KINDS)):
        lie = lie_of(kind, z, older, c, codes, [other] if other is not None else [], backend)
        if not torch.equal(lie, z):
            yield c, z, lie


def accepting(n: int, k: int) -> Freivalds:
    """The weakened system: a check of [N, K] whose secret is zero accepts everything."""
    return Freivalds.stored(torch.zeros(CHECKS, n, dtype=torch.int32), torch.zeros(CHECKS, k, dtype=torch.int32))


def _believes(check: Freivalds, c: Tensor, lie: Tensor) -> bool:
    try:
        check.check(c, lie, "an answer")
    except VerificationFailed:
        return False
    return True


def verdict_of_lies(believed: int) -> Verdict:
    """One lie in 2^61 is believed by chance: a single one breaks the claim."""
    return "broken" if believed else "holds"


def liars(subject: Subject) -> list[Attack]:
    """See the module."""
    backend = select_backend()
    told = believed = without = 0
    groups = subject.groups[:MOST_GROUPS]
    for group in groups:
        codes = group.codes
        other = next((one.codes for one in subject.groups if one is not group and one.codes.shape == codes.shape), None)
        s = SecretStream(secrets.token_bytes(KEY_BYTES), "audit").residues(CHECKS, codes.shape[0])
        check = Freivalds(s, backend, backend.place(codes))
        for c, _, lie in lies_about(codes, other, backend):
            told += 1
            believed += _believes(check, c, lie)
            without += _believes(accepting(*codes.shape), c, lie)
    metric = f"share of the lies of {len(KINDS)} kinds about {len(groups)} of the bundle's matrices that were believed"
    adversary, verdict = "A2, a worker that answers wrongly", verdict_of_lies(believed)
    return [Attack("liar", subject.scheme, adversary, metric, believed / told, 0.0, without / told, told, verdict)]
