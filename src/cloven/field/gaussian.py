"""Discrete Gaussians from a keystream: 64-bit inversion of the cumulative distribution, exact against integers.

    P(X = k) ∝ exp(−k² / 2σ²),  −127 ≤ k ≤ 127          X = #{k : F(k) ≤ w},  w uniform in [0, 2^64)

F are the cumulative probabilities, rounded to multiples of 2^-64 (decimal arithmetic, 60 digits). Clipping to int8 loses 2^-291 of the
mass at σ = 6.4 and 2^-49 at σ = 16. Most samples follow from the first 16 bits of w alone; only where a step of F lies within them are
the other 48 bits drawn. The result is the same as with all 64 bits drawn at once: a test compares.

Not constant in time: it is a table look-up over a whole batch, and which entries needed more bits shows in its duration.
"""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cloven.errors import RunError

LARGEST = 127
_UNDECIDED = -128  # marks buckets of 2^48 words that hold a step of F
_DIGITS = 60


@functools.cache
def cumulative(sigma: str) -> npt.NDArray[np.uint64]:
    """F: at most 254 thresholds, uint64, ascending; X = −127 + (number of thresholds ≤ w)."""
    with localcontext() as context:
        context.prec = _DIGITS
        weights = [(-(Decimal(k) ** 2) / (2 * Decimal(sigma) ** 2)).exp() for k in range(-LARGEST, LARGEST + 1)]
        total, running, thresholds = sum(weights), Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            thresholds.append(int(running / total * 2**64))
    return np.array([threshold for threshold in thresholds if threshold < 2**64], np.uint64)


@functools.cache
def _first_16_bits(sigma: str) -> npt.NDArray[np.int8]:
    """X by the first 16 bits of w, or `_UNDECIDED`: int8 [65536]."""
    starts = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    ends = starts + np.uint64(2**48 - 1)
    low, high = (np.searchsorted(cumulative(sigma), words, side="right") for words in (starts, ends))
    return np.where(low == high, low - LARGEST, _UNDECIDED).astype(np.int8)


def gaussians(keys: list[bytes], count: int, sigma: str) -> npt.NDArray[np.int8]:
    """Samples under keys that are used for nothing else.

    Args:
        keys: 32 secret bytes for every row, each used for this one call only.
        count: samples per row.
        sigma: the parameter σ as a decimal number, "6.4" say.

    Returns:
        int8 [len(keys), count]; row i depends on keys[i] alone.
    """
    spare = 16 + count // 64  # 0.09 % of the samples are undecided at σ = 6.4, 0.2 % at 16: enough but for 2^-80
    words, rest = np.empty((len(keys), count), np.uint16), np.empty((len(keys), spare), np.uint64)
    for key, first, more in zip(keys, words, rest, strict=True):
        stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(2 * count + 8 * spare))
        first[:] = np.frombuffer(stream, "<u2", count)
        more[:] = np.frombuffer(stream, "<u8", spare, offset=2 * count)
    samples: npt.NDArray[np.int8] = _first_16_bits(sigma)[words]
    rows, columns = np.nonzero(samples == _UNDECIDED)
    if len(rows):
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)  # how many of the row came before
        if place.max() >= spare:
            raise RunError("a row of samples needs more spare words than it has")
        whole = (words[rows, columns].astype(np.uint64) << np.uint64(48)) | (rest[rows, place] >> np.uint64(16))
        samples[rows, columns] = np.searchsorted(cumulative(sigma), whole, side="right") - LARGEST
    return samples
