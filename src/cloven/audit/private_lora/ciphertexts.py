"""The numbers in serialised ciphertexts of SEAL's BFV: read, written, divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cloven.private_lora.fhe import CIPHERTEXT_BYTES, DEGREE, FheClient, context, load_ciphertext

_NTT_FLAG = 16 + 32  # place of the flag in a serialised ciphertext: after the header and the parameters' id


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
