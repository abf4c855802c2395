"""Secret randomness: AES-256-CTR keystreams, and the distributions that the schemes draw from them.

Two uses, never with the same key:

`pad_residues`   the masks of one-time pads. IV = group (4 bytes) ‖ pad index (8 bytes) ‖ block counter (4 bytes), so that the
                 residues of a pad depend on nothing but (key, group, index); the rare rejection (2^-31 per entry) takes a word
                 from the pad's own tail and never shifts the next pad.
`SecretStream`   one sequential stream per (key, label): permutations, signs, uniform residues, Gaussians.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from cloven.errors import RunError
from cloven.field.residues import H, P

KEY_BYTES = 32
TAIL = 16  # spare words of a pad; needing more of them has probability < 2^-400 for any width below 2^20


def residues_of_words(words: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.int32]:
    """The first `width` words of each row with 31 bits ≠ p, centred: [rows, width + TAIL] -> [rows, width]. Row by row, in the cache."""
    residues = np.empty((len(words), width), np.int32)
    for row, out in zip(words, residues, strict=True):
        bits = row & np.uint32(P)
        np.copyto(out, bits[:width], casting="unsafe")
        rejected = out == P
        if rejected.any():
            tail = [word for word in bits[width:] if word != P]
            count = int(rejected.sum())
            if count > len(tail):  # NumPy would repeat a single word
                raise RunError("a pad needs more spare words than it has")
            out[rejected] = tail[:count]
        out -= np.multiply((out > H).view(np.int8), P, dtype=np.int32)
    return residues


def pad_residues(key: bytes | bytearray, group: int, first: int, rows: int, width: int) -> Tensor:
    """The masks of pads first … first + rows − 1 of a group: int32 residues [rows, width], uniform for whoever lacks the key."""
    length = 4 * (width + TAIL)
    zeros = bytes(length)
    stream = bytearray(rows * length)
    view = memoryview(stream)
    aes = algorithms.AES256(bytes(key))
    for row in range(rows):
        iv = group.to_bytes(4, "big") + (first + row).to_bytes(8, "big") + bytes(4)
        view[row * length : (row + 1) * length] = Cipher(aes, modes.CTR(iv)).encryptor().update(zeros)
    words = np.frombuffer(stream, dtype="<u4").reshape(rows, width + TAIL)
    return torch.from_numpy(residues_of_words(words, width))


class SecretStream:
    """A sequential keystream with the distributions that the schemes need.

    Args:
        key: 32 secret bytes; a fresh key, or a label nobody used with it, per stream.
        label: what the stream is for; HKDF-SHA256 derives the stream's own key from both.
    """

    def __init__(self, key: bytes, label: str) -> None:
        derived = HKDF(hashes.SHA256(), 32, salt=None, info=b"cloven/stream/1/" + label.encode()).derive(key)
        self._encryptor = Cipher(algorithms.AES256(derived), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "SecretStream(<secret>)"

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` uniform 64-bit words."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def residues(self, rows: int, width: int) -> Tensor:
        """Uniform centred residues, int32 [rows, width]."""
        stream = self._encryptor.update(bytes(4 * rows * (width + TAIL)))
        words = np.frombuffer(stream, dtype="<u4").reshape(rows, width + TAIL)
        return torch.from_numpy(residues_of_words(words, width))

    def permutation(self, n: int) -> Tensor:
        """A uniform permutation of 0 … n − 1, int64 [n]: the order of n random 64-bit words (a tie has probability < n²·2^-65)."""
        return torch.from_numpy(np.argsort(self.words(n), kind="stable"))

    def signs(self, n: int) -> Tensor:
        """n independent signs ±1, float64 [n]."""
        return torch.from_numpy((self.words(n) >> np.uint64(63)).astype(np.float64) * 2 - 1)

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """n numbers uniform in the open interval (0, 1), 53 bits each."""
        return ((self.words(n) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, rows: int, columns: int) -> Tensor:
        """Standard Gaussians by Box–Muller, float64 [rows, columns]."""
        count = rows * columns
        radius = np.sqrt(-2 * np.log(self.uniform(count)))
        return torch.from_numpy(radius * np.cos(2 * np.pi * self.uniform(count))).view(rows, columns)

    def noise(self, *shape: int) -> Tensor:
        """Standard Gaussians in float32 by Box–Muller, both of each pair, |x| < 6.8: for masking noise, many at a time."""
        count = math.prod(shape)
        half = (count + 1) // 2
        words = np.frombuffer(self._encryptor.update(bytes(8 * half)), dtype="<u4").astype(np.float32)
        radius = np.sqrt(np.float32(-2) * np.log((words[:half] + np.float32(0.5)) * np.float32(2.0**-32)))
        angle = words[half:] * np.float32(2 * math.pi * 2.0**-32)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(both[:count]).view(shape)

    def orthogonal(self, n: int) -> Tensor:
        """A Haar-random orthogonal matrix, float64 [n, n]: QR of a Gaussian with the signs of R's diagonal taken out."""
        q, r = torch.linalg.qr(self.normal(n, n))
        haar: Tensor = q * torch.sign(torch.diagonal(r))
        return haar
