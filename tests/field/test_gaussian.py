from __future__ import annotations

import hashlib
import math
import struct
from bisect import bisect_right
from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.errors import RunError
from cloven.field import gaussian
from cloven.field.gaussian import LARGEST, cumulative, gaussians

SIGMAS = ("6.4", "16")
KEY = bytes(range(32))
_POINT = 600  # bits after the binary point of the oracle


def keys_of(count: int, first: int = 0) -> list[bytes]:
    """Keys that a test can repeat."""
    return [hashlib.sha256(b"%d" % (first + i)).digest() for i in range(count)]


@cache
def weights(sigma: str) -> list[int]:
    """2^600·exp(−k² / 2σ²) for k = 0 … 127 by integers: g^(k²) step by step, g = exp(−1 / 2σ²) by its series. Errors below 2^-580."""
    tenths = int(float(sigma) * 10 + 0.5)
    one = 1 << _POINT
    g = term = one
    for i in range(1, 400):  # exp(−t) = Σ (−t)^i / i!,  t = 50 / tenths²
        term = -term * 50 // (tenths * tenths * i)
        g += term
    powers = [one]
    for k in range(LARGEST):
        value = powers[-1]
        for _ in range(2 * k + 1):  # (k + 1)² − k²
            value = value * g >> _POINT
        powers.append(value)
    return powers


@cache
def exact_thresholds(sigma: str) -> list[int]:
    """⌊2^64·F(k)⌋ for k = −127 … 126."""
    by_value = [weights(sigma)[abs(k)] for k in range(-LARGEST, LARGEST + 1)]
    total, running, thresholds = sum(by_value), 0, []
    for weight in by_value[:-1]:
        running += weight
        thresholds.append((running << 64) // total)
    return thresholds


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_thresholds_are_the_exact_distribution(sigma: str) -> None:
    found = cumulative(sigma).tolist()
    found += [2**64] * (2 * LARGEST - len(found))  # what is left out is never reached
    assert len(found) == 2 * LARGEST and found == sorted(found)
    assert max(abs(a - b) for a, b in zip(found, exact_thresholds(sigma), strict=True)) <= 1


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_exact_distribution_has_the_deviation_that_it_says(sigma: str) -> None:
    w = weights(sigma)
    total = w[0] + 2 * sum(w[1:])
    variance = 2 * sum(k * k * w[k] for k in range(LARGEST + 1)) / total
    assert math.isclose(math.sqrt(variance), float(sigma), rel_tol=1e-9)


def slow_sample(word: int, sigma: str) -> int:
    """X by inversion with all 64 bits."""
    return bisect_right(cumulative(sigma).tolist(), word) - LARGEST


def slow_row(key: bytes, count: int, sigma: str) -> list[int]:
    """A row by Python integers: every sample's 64 bits drawn at once; those that the fast way does not draw are tried at both ends."""
    spare = 16 + count // 64
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(2 * count + 8 * spare))
    first = struct.unpack_from(f"<{count}H", stream)
    more = iter(struct.unpack_from(f"<{spare}Q", stream, 2 * count))
    samples = []
    for bits in first:
        low, high = (slow_sample(bits << 48 | rest, sigma) for rest in (0, 2**48 - 1))
        samples.append(low if low == high else slow_sample(bits << 48 | next(more) >> 16, sigma))
    return samples


@pytest.mark.parametrize("sigma", [*SIGMAS, "60"])
def test_against_python_integers(sigma: str) -> None:
    keys = keys_of(3)
    assert gaussians(keys, 900, sigma).tolist() == [slow_row(key, 900, sigma) for key in keys]


@settings(max_examples=15)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 70), st.sampled_from(SIGMAS))
def test_any_key_and_count_against_python_integers(key: bytes, count: int, sigma: str) -> None:
    samples = gaussians([key], count, sigma)
    assert samples.dtype == np.int8 and samples.tolist() == [slow_row(key, count, sigma)]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_first_16_bits_decide_only_what_they_can(sigma: str) -> None:
    table = gaussian._first_16_bits(sigma).tolist()
    steps = {threshold >> 48 for threshold in cumulative(sigma).tolist() if threshold & (2**48 - 1)}
    assert {bits for bits, value in enumerate(table) if value == gaussian._UNDECIDED} == steps
    for bits in range(0, 2**16, 97):
        if bits not in steps:
            assert table[bits] == slow_sample(bits << 48 | 12345, sigma)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_drawing_all_64_bits_changes_nothing_about_the_rest(sigma: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing decided by 16 bits, every sample takes a spare word: where the 16 bits would have decided, it is the same sample."""
    keys = keys_of(40)
    quick, table = gaussians(keys, 16, sigma), gaussian._first_16_bits(sigma)
    monkeypatch.setattr(gaussian, "_first_16_bits", lambda _: np.full(2**16, gaussian._UNDECIDED, np.int8))
    slow = gaussians(keys, 16, sigma)
    first = np.array(
        [struct.unpack("<16H", Cipher(algorithms.AES256(k), modes.CTR(bytes(16))).encryptor().update(bytes(32))) for k in keys]
    )
    decided = table[first] != gaussian._UNDECIDED
    assert decided.mean() > 0.9 and np.array_equal(quick[decided], slow[decided])


@pytest.mark.parametrize("sigma", SIGMAS)
def test_chi_square_against_the_exact_distribution(sigma: str) -> None:
    samples = gaussians(keys_of(4, 100), 100_000, sigma).ravel()
    w = weights(sigma)
    total = w[0] + 2 * sum(w[1:])
    observed = np.bincount(samples.astype(int) + LARGEST, minlength=2 * LARGEST + 1)
    expected = np.array([len(samples) * (w[abs(k)] / total) for k in range(-LARGEST, LARGEST + 1)])
    often = expected >= 10
    pairs = [*zip(observed[often], expected[often], strict=True), (observed[~often].sum(), expected[~often].sum())]
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    freedom = len(pairs) - 1
    assert freedom > 40 and abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_chi_square_would_notice_a_deviation_of_two_percent() -> None:
    """The test above can fail: the same counts against σ = 6.5."""
    samples = gaussians(keys_of(4, 100), 100_000, "6.4").ravel()
    w = weights("6.5")
    total = w[0] + 2 * sum(w[1:])
    values = range(-20, 21)
    expected = np.array([len(samples) * (w[abs(k)] / total) for k in values])
    observed = np.array([(samples == k).sum() for k in values])
    assert ((observed - expected) ** 2 / expected).sum() > 40 + 5 * math.sqrt(80)


def test_rows_depend_on_their_own_keys_only() -> None:
    keys = keys_of(5)
    together = gaussians(keys, 3000, "6.4")
    for row, key in zip(together, keys, strict=True):
        assert np.array_equal(row, gaussians([key], 3000, "6.4")[0])
    assert np.array_equal(gaussians(keys[::-1], 3000, "6.4"), together[::-1])


def test_rows_and_neighbours_are_uncorrelated() -> None:
    x = gaussians(keys_of(6, 50), 50_000, "6.4").astype(float) / 6.4
    between = np.corrcoef(x) - np.eye(6)
    assert np.abs(between).max() < 6 / math.sqrt(50_000)
    for lag in (1, 2, 16):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 6 / math.sqrt(x.size)
    assert abs(x.mean()) < 6 / math.sqrt(x.size)


def test_clipping_is_a_cut_not_a_pile() -> None:
    """A σ for which int8 is too narrow: the ends are as likely as their neighbours, and −128 never comes."""
    samples = gaussians(keys_of(2), 60_000, "60")
    assert samples.min() == -127 and samples.max() == 127
    ends = [int((np.abs(samples.astype(int)) == k).sum()) for k in (125, 126, 127)]
    assert max(ends) < 1.5 * min(ends)


@pytest.mark.parametrize("count", [0, 17, 1000])
def test_too_few_spare_words_is_an_error(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "_first_16_bits", lambda _: np.full(2**16, gaussian._UNDECIDED, np.int8))
    if count:
        with pytest.raises(RunError, match="spare words"):
            gaussians(keys_of(2), count, "6.4")
    else:
        assert gaussians(keys_of(2), 0, "6.4").shape == (2, 0)


def test_spare_words_suffice_by_far() -> None:
    for sigma in SIGMAS:
        share = float((gaussian._first_16_bits(sigma) == gaussian._UNDECIDED).mean())
        for count in range(1, 20_000, 63):
            spare, mean = 16 + count // 64, count * share
            tail = sum(math.exp(j * math.log(mean) - mean - math.lgamma(j + 1)) for j in range(spare + 1, spare + 60))  # Poisson
            assert tail < 2**-80, (sigma, count)


def test_no_rows() -> None:
    assert gaussians([], 10, "6.4").shape == (0, 10)


def test_vectors() -> None:
    """The bytes of specification 1: a change here is another scheme."""
    assert gaussians([KEY], 16, "6.4")[0].tolist() == VECTOR["6.4"][0]
    assert gaussians([KEY], 16, "16")[0].tolist() == VECTOR["16"][0]
    for sigma, (_, digest) in VECTOR.items():
        assert hashlib.sha256(gaussians([KEY], 4096, sigma).tobytes()).hexdigest() == digest


VECTOR: dict[str, tuple[list[int], str]] = {
    "6.4": (
        [1, 4, -4, 6, 11, -1, -6, 0, -2, 3, 4, 8, 11, -6, 4, -5],
        "34b78457df30ced5b148a564f7f99837a435c5f0f1cc9a1b217e39a258833153",
    ),
    "16": (
        [3, 9, -9, 14, 27, -3, -14, 0, -5, 8, 10, 20, 29, -14, 11, -11],
        "5aa905660c51b4a38c3036ac05d58b2993a81c7eb34def1c3bf6d0669e13d633",
    ),
}
