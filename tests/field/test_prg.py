from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from cloven.field.prg import KEY_BYTES, TAIL, SecretStream, pad_residues, residues_of_words
from cloven.field.residues import H, P, is_residue

KEY = bytes(range(32))
VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "prg.json").read_text(encoding="utf-8"))


def slow_keystream(key: bytes, counter: int, length: int) -> bytes:
    """CTR mode by hand: AES-256 of one 128-bit counter after the other."""
    aes = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = [aes.update(((counter + i) % 2**128).to_bytes(16, "big")) for i in range(-(-length // 16))]
    return b"".join(blocks)[:length]


def slow_residues(stream: bytes, width: int) -> list[int]:
    """31-bit words; p is replaced by the next unused word after the first `width`; centred."""
    words = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") & P for i in range(width + TAIL)]
    spare = iter([word for word in words[width:] if word != P])
    chosen = [word if word != P else next(spare) for word in words[:width]]
    return [word - P if word > H else word for word in chosen]


def slow_pad(key: bytes, group: int, index: int, width: int) -> list[int]:
    counter = int.from_bytes(group.to_bytes(4, "big") + index.to_bytes(8, "big") + bytes(4), "big")
    return slow_residues(slow_keystream(key, counter, 4 * (width + TAIL)), width)


def slow_stream_key(key: bytes, label: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) with an empty salt, one block."""
    extracted = hmac.new(bytes(32), key, hashlib.sha256).digest()
    return hmac.new(extracted, b"cloven/stream/1/" + label.encode() + b"\x01", hashlib.sha256).digest()


def slow_words(key: bytes, label: str, count: int) -> list[int]:
    stream = slow_keystream(slow_stream_key(key, label), 0, 8 * count)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


@pytest.mark.parametrize("vector", VECTORS["pads"], ids=lambda v: f"{v['group']}-{v['index']}-{v['width']}")
def test_pad_vectors(vector: dict[str, Any]) -> None:
    # the vectors were written once by `slow_pad`: whoever changes the derivation changes every bundle's pads, and must notice
    key = bytes.fromhex(vector["key"])
    assert pad_residues(key, vector["group"], vector["index"], 1, vector["width"]).tolist() == [vector["residues"]]
    assert slow_pad(key, vector["group"], vector["index"], vector["width"]) == vector["residues"]


@pytest.mark.parametrize("vector", VECTORS["streams"], ids=lambda v: str(v["label"]))
def test_stream_vectors(vector: dict[str, Any]) -> None:
    key, label = bytes.fromhex(vector["key"]), vector["label"]
    assert [f"{word:016x}" for word in SecretStream(key, label).words(len(vector["words"])).tolist()] == vector["words"]
    assert [f"{word:016x}" for word in slow_words(key, label, len(vector["words"]))] == vector["words"]


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(1, 40))
def test_pads_are_the_slow_ones(key: bytes, group: int, index: int, width: int) -> None:
    assert pad_residues(key, group, index, 1, width).tolist() == [slow_pad(key, group, index, width)]


def test_a_pad_depends_on_key_group_and_index_alone() -> None:
    batch = pad_residues(KEY, 7, 100, 9, 50)
    assert torch.equal(batch, torch.cat([pad_residues(bytearray(KEY), 7, 100 + i, 1, 50) for i in range(9)]))
    assert torch.equal(batch[3:5], pad_residues(KEY, 7, 103, 2, 50))
    rows = [
        batch[0],
        batch[1],
        pad_residues(KEY, 8, 100, 1, 50)[0],
        pad_residues(KEY, 7, 100 + 2**32, 1, 50)[0],
        pad_residues(bytes(31) + b"\x01", 7, 100, 1, 50)[0],
    ]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_neighbouring_pads_share_no_keystream() -> None:
    # long pads must not run into the next index's counters
    width = 40_000
    words = pad_residues(KEY, 0, 0, 2, width)
    assert len(set(words.flatten().tolist())) > 2 * width - 20  # a few birthday collisions among 2^31 values


def test_rejection_takes_from_the_tail_and_never_shifts() -> None:
    width = 6
    words = np.arange(1, width + TAIL + 1, dtype=np.uint32)[None].repeat(3, 0)
    plain = residues_of_words(words.copy(), width)
    words[1, 2] = P
    words[1, 4] = 0xFFFFFFFF  # the top bit is not used: this is p as well
    words[1, width] = P  # a spare word that is itself p is skipped
    result = residues_of_words(words, width)
    assert result[1].tolist() == [1, 2, width + 2, 4, width + 3, 6]
    assert result[[0, 2]].tolist() == plain[[0, 2]].tolist()  # other pads are as before


def test_more_rejections_than_spare_words_never_repeat_one() -> None:
    words = np.full((1, 4 + TAIL), P, dtype=np.uint32)
    words[0, -1] = 5
    with pytest.raises(Exception):  # noqa: B017 - probability < 2^-400: any error will do, but the same word four times will not
        residues_of_words(words, 4)


def test_words_map_to_centred_residues() -> None:
    words = np.array([[0, 1, H, H + 1, P - 1, 0x80000000] + [9] * TAIL], dtype=np.uint32)
    assert residues_of_words(words, 6).tolist() == [[0, 1, H, -H, -1, 0]]


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_bytes_are_uniform() -> None:
    values = pad_residues(KEY, 3, 5, 64, 4096).numpy().astype(np.int64) % P  # 262,144 values below p, a fixed key
    for shift, bits in ((0, 8), (8, 8), (16, 8), (24, 7)):
        counts = np.bincount((values.ravel() >> shift) & (2**bits - 1), minlength=2**bits)
        freedom = 2**bits - 1
        assert abs(chi_square(counts) - freedom) < 5 * math.sqrt(2 * freedom)  # five standard deviations


def test_stream_is_sequential_and_labelled() -> None:
    whole = SecretStream(KEY, "a").words(20)
    stream = SecretStream(KEY, "a")
    assert np.array_equal(np.concatenate([stream.words(7), stream.words(13)]), whole)
    assert not np.array_equal(SecretStream(KEY, "b").words(20), whole)
    assert not np.array_equal(SecretStream(bytes(32), "a").words(20), whole)


def test_stream_residues() -> None:
    residues = SecretStream(KEY, "r").residues(5, 33)
    assert residues.shape == (5, 33)
    assert residues.dtype == torch.int32
    assert is_residue(residues)
    stream = slow_keystream(slow_stream_key(KEY, "r"), 0, 4 * 5 * (33 + TAIL))
    length = 4 * (33 + TAIL)
    assert residues.tolist() == [slow_residues(stream[i * length : (i + 1) * length], 33) for i in range(5)]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 300))
def test_a_permutation_is_one(key: bytes, n: int) -> None:
    permutation = SecretStream(key, "p").permutation(n).tolist()
    assert sorted(permutation) == list(range(n))
    words = slow_words(key, "p", n)
    assert permutation == sorted(range(n), key=words.__getitem__)


def test_permutations_are_uniform() -> None:
    stream = SecretStream(KEY, "uniform")
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        drawn = tuple(stream.permutation(3).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6
    assert chi_square(np.array(list(counts.values()))) < 20.5  # 5 degrees of freedom: p = 0.001


def test_signs() -> None:
    signs = SecretStream(KEY, "s").signs(10_000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < 500


def test_uniform_and_normal() -> None:
    stream = SecretStream(KEY, "u")
    u = stream.uniform(20_000)
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    normal = stream.normal(100, 300)
    assert normal.shape == (100, 300)
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert abs(float((normal**4).mean()) - 3) < 0.2


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_orthogonal(n: int) -> None:
    q = SecretStream(KEY, "o").orthogonal(n)
    assert q.dtype == torch.float64
    assert torch.allclose(q @ q.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_orthogonal_is_not_biased() -> None:
    # without the correction of signs, QR's diagonal is biased; Haar: the mean entry is 0 and the mean square is 1/n
    stream = SecretStream(KEY, "haar")
    drawn = torch.stack([stream.orthogonal(4) for _ in range(2000)])
    assert float(drawn.mean(0).abs().max()) < 0.06
    assert torch.allclose((drawn**2).mean(0), torch.full((4, 4), 0.25, dtype=torch.float64), atol=0.03)


def test_repr_hides_the_key() -> None:
    assert repr(SecretStream(KEY, "label")) == "SecretStream(<secret>)"


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 1, 3, 4)])
def test_noise_of_any_shape(shape: tuple[int, ...]) -> None:
    noise = SecretStream(secrets.token_bytes(KEY_BYTES), "test").noise(*shape)
    assert noise.shape == shape and noise.dtype == torch.float32 and bool(noise.isfinite().all())


def test_noise_is_gaussian_in_both_halves() -> None:
    both = SecretStream(secrets.token_bytes(KEY_BYTES), "test").noise(2, 200_000).double()
    for half in both:
        assert abs(float(half.mean())) < 0.015 and abs(float(half.std()) - 1) < 0.01  # σ of the mean is 0.0022
        assert abs(float((half**3).mean())) < 0.05 and abs(float((half**4).mean()) - 3) < 0.15
        assert float(half.abs().max()) < 6.8
        assert abs(float((half.abs() < 1).double().mean()) - 0.6827) < 0.006
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.012
    assert abs(float(torch.corrcoef(both.square())[0, 1])) < 0.012  # the radius is shared, and says nothing


def test_noise_at_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of zeros and of ones: the logarithm of nothing is not taken."""

    class Words:
        def __init__(self, byte: bytes) -> None:
            self.byte = byte

        def update(self, zeros: bytes) -> bytes:
            return self.byte * len(zeros)

    for byte in (b"\x00", b"\xff"):
        stream = SecretStream(bytes(KEY_BYTES), "test")
        monkeypatch.setattr(stream, "_encryptor", Words(byte))
        assert bool(stream.noise(4).isfinite().all())


def test_the_noise_of_one_stream_never_repeats() -> None:
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "test")
    assert len({float(stream.noise(1)) for _ in range(200)}) > 195
