"""Attacks on the fhe backend: division of ciphertexts, and the two that break it for a client that does not follow the protocol.

An answer that is only a product is (c₀·w, c₁·w) for the client's own (c₀, c₁): division in R_q gives w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.errors import BadInput
from cloven.private_lora.fhe import CIPHERTEXT_BYTES, DEGREE, FheClient, FheMatrix, context, load_ciphertext, rows_per_polynomial

SCHEME = "private-lora/fhe"
_NTT_FLAG = 16 + 32  # place of the flag in a serialised ciphertext: after the header and the parameters' id
_SHOWN_ROWS = 8


def division(codes: Tensor) -> list[Attack]:
    """Division of ciphertexts on sanitised answers; weakened: not sanitised.

    Args:
        codes: W int8 [N, K].

    Returns:
        One attack, or none where SEAL is not installed.
    """
    codes = codes[:_SHOWN_ROWS, :DEGREE]
    try:
        values = [divided(codes, sanitise) for sanitise in (True, False)]
    except BadInput:
        return []
    chance, tries = 1 / 255, codes.numel()
    metric = "fraction of the weights that follow from one answer by dividing ciphertexts (weakened: answers that are only products)"
    who, verdict = "a client that sends honest queries", verdict_of(values[0], chance, tries)
    return [Attack("division", SCHEME, who, metric, values[0], chance, values[1], tries, verdict)]


def divided(codes: Tensor, sanitise: bool) -> float:
    """The fraction of the weights that the division gives."""
    client, server = FheClient(), FheMatrix(codes, sanitise=sanitise)
    query = client.query(torch.arange(1, codes.shape[1] + 1, dtype=torch.int32))
    answer = server.answer(memoryview(query))
    asked = residues(query[-CIPHERTEXT_BYTES:])  # [2, primes, N]
    got = [residues(answer[start : start + CIPHERTEXT_BYTES]) for start in range(0, len(answer), CIPHERTEXT_BYTES)]
    found = [weights_of(quotient(one, asked), codes.shape[1]) for one in got]
    return float((torch.cat(found)[: len(codes)] == codes.long()).double().mean())


def weights_of(polynomial: npt.NDArray[np.int64], columns: int) -> Tensor:
    """The rows that are packed in w(X): int64 [B, K]."""
    count = rows_per_polynomial(columns)
    return torch.from_numpy(polynomial[: count * columns].reshape(count, columns)[:, ::-1].copy())


def primes() -> list[int]:
    """The primes of q at the level of ciphertexts."""
    return [modulus.value() for modulus in context().first_context_data().parms().coeff_modulus()]


def residues(ciphertext: bytes) -> npt.NDArray[np.uint64]:
    """The numbers of a serialised ciphertext: [2 polynomials, primes, N]."""
    return np.frombuffer(ciphertext, "<u8", offset=len(ciphertext) - 2 * 2 * DEGREE * 8).reshape(2, 2, DEGREE).copy()


def with_residues(like: bytes, numbers: npt.NDArray[np.uint64], *, ntt: bool = False) -> bytes:
    """A serialised ciphertext with other numbers."""
    data = bytearray(like)
    data[-numbers.nbytes :] = numbers.astype("<u8").tobytes()
    data[_NTT_FLAG] = ntt
    return bytes(data)


def quotient(numerator: npt.NDArray[np.uint64], denominator: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """a₁ / c₁ in R_q modulo the first prime, centred: int64 [N]."""
    import seal

    within, prime = context(), primes()[0]
    evaluator = seal.Evaluator(within)
    template = FheClient().query(torch.ones(4, dtype=torch.int32))[-CIPHERTEXT_BYTES:]
    transformed = []
    for numbers in (numerator, denominator):
        ciphertext = load_ciphertext(seal, within, with_residues(template, numbers))
        transformed.append(residues(bytes(evaluator.transform_to_ntt(ciphertext).to_string())))
    top, bottom = ([int(value) for value in numbers[1, 0]] for numbers in transformed)
    ratio = [a * pow(b, -1, prime) % prime if b else 0 for a, b in zip(top, bottom, strict=True)]
    numbers = transformed[0]
    numbers[1, 0] = np.array(ratio, np.uint64)
    back: Any = seal.Ciphertext()
    back.load_bytes(within, with_residues(template, numbers, ntt=True))
    result: npt.NDArray[np.int64] = residues(bytes(evaluator.transform_from_ntt(back).to_string()))[1, 0].astype(np.int64)
    result[result > prime // 2] -= prime
    return result
