"""Do ciphertexts of the fhe backend give the weights by division?

Adversary: A6, a client of the fhe backend that wants the adapter and sends honest queries. (One that cheats gets the weights in any case:
    tests/attacks shows both ways.)
Method: an answer that is only a product is (c₀·w, c₁·w) for the client's own (c₀, c₁): division in R_q gives w. Tried on one answer about
    at most eight rows.
Success: the share of the weights that follow. Chance: 1 / 255.
Weakened: answers that are not sanitised, with nothing masked and no encryption of zero added.
Source: that BFV by itself does not hide what was computed on a ciphertext is known; the attack is ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.private_lora.ciphertexts import quotient, residues
from cloven.audit.private_lora.subject import Target
from cloven.errors import BadInput
from cloven.private_lora.fhe import CIPHERTEXT_BYTES, DEGREE, FheClient, FheMatrix, rows_per_polynomial

SCHEME = "private-lora/fhe"
CLIENT = "a client that sends honest queries"
_SHOWN_ROWS = 8


def weights_of(polynomial: npt.NDArray[np.int64], columns: int) -> Tensor:
    """The rows that are packed in w(X): int64 [B, K]."""
    count = rows_per_polynomial(columns)
    return torch.from_numpy(polynomial[: count * columns].reshape(count, columns)[:, ::-1].copy())


def divided(codes: Tensor, sanitise: bool) -> float:
    """The fraction of the weights that the division gives.

    Raises:
        BadInput: SEAL is not installed.
    """
    client, server = FheClient(), FheMatrix(codes, sanitise=sanitise)
    query = client.query(torch.arange(1, codes.shape[1] + 1, dtype=torch.int32))
    answer = server.answer(memoryview(query))
    asked = residues(query[-CIPHERTEXT_BYTES:])  # [2, primes, N]
    got = [residues(answer[start : start + CIPHERTEXT_BYTES]) for start in range(0, len(answer), CIPHERTEXT_BYTES)]
    found = [weights_of(quotient(one, asked), codes.shape[1]) for one in got]
    return float((torch.cat(found)[: len(codes)] == codes.long()).double().mean())


def division(target: Target) -> list[Attack]:
    """See the module; nothing where SEAL is not installed."""
    codes = target.codes[:_SHOWN_ROWS, :DEGREE]
    try:
        values = [divided(codes, sanitise) for sanitise in (True, False)]
    except BadInput:
        return []
    chance, tries = 1 / 255, codes.numel()
    metric = "fraction of the weights that follow from one answer by dividing ciphertexts (weakened: answers that are only products)"
    return [Attack("division", SCHEME, CLIENT, metric, values[0], chance, values[1], tries, verdict_of(values[0], chance, tries))]
