"""A_pub, the public matrix of all LWE queries: uniform residues [rows, 1280], expanded from a constant of the specification.

Row i is SHAKE-256("cloven/private-lora/A_pub/1/" ‖ i as 8 bytes, big-endian): 32-bit words, little-endian, 31 bits of each, p rejected,
centred. Every height is a prefix of one expansion, and neither client nor server chooses anything. Uniform in the random-oracle sense.

On disk the expansion is cached in blocks of 1024 rows, whose SHA-256 stand here: a cached block that differs is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.field.prg import TAIL, residues_of_words
from cloven.field.products import DIGITS, digits
from cloven.telemetry import logger

COLUMNS = 1280
BLOCK_ROWS = 1024
_DOMAIN = b"cloven/private-lora/A_pub/1/"
BLOCK_SHA256 = (
    "53af02be2f5f0f620a239ca4bb0444c95fd08b631facb99716052666939bae83",
    "7ba0aeaf401e89330be089cd4811962b9e6d354e1fccfc9543ff5163ade30c78",
    "019f0207f98c85c15419097150158d706c2ff51aad3ea0eac94bc8a5ff6ac279",
    "9a32d8de7e8294500ef96ebb430260072129648732efb9304b26f8b75ec70aa0",
    "8b171033ef45d16bfb82865cff6900de467ba081a797667370934f7939ff8181",
    "da420c13a2513c3dc1355a88b0ef163a7af99a095ea997fcf3b497837bd8eaee",
    "73af9cfa8e93908c4714f6af702314d8c0fd2cea8c90940f342808ed589b4f62",
    "8e7b3f906c5cdb68db073bfabfa197ccd3bd7bbe466560a4b8ddb1b1b8a30b5e",
    "fa75c7d8857acefa929d46230ddcef7e724887bdad7bcc04d5f34b9d52e56ebf",
    "7e2a78da3816c21d896b355ec04a9f5cf5ba65fafc08502be287a49422f5360b",
    "b744e39c5c47d3f7ad6be9973a427f335d3b9a3f80d5fc2baf31a55715e34c4f",
    "c8d0f061f4eaaa7d09182436ea17cc410d57c29f0e2f26c3dea7cf806991f161",
    "18e5bcc63aa44bc7d8709dd260ac206a955eaaa0c2e4e2139a79937b53b0b5cf",
    "fe04db4f9f58126471f41caa11ab348a7bcab9730c821cd0de4bc8dd1eb3a50a",
    "6ad9fbcf778ca2520087e8db423d733afad03d2d7bc013ace8a20cef6ad32069",
    "867186dfef8589e70322064764e583ab0113c4330f0b3a757c1b97b91d6524ea",
    "af7aefd9294201b93d4d7ba1f34a0967e2be2f14a9f4b14b08064886ade85451",
    "ed3e0f1e7b8c3588be0b44706dd748b1cae2b8b34a88c616d7158c58e253b42b",
    "9307d383a61a039b5844e9695f32d1e854dba11fcffad6e4cb223321dc766ade",
    "2feb172acb11c02ef9c9626bcc3890206778098af87cd4419f129aba599fdc16",
    "8b7f14e71ad4f740b17bb882699d9ac6cec7fabb4b843770415ee33d24f569f6",
    "5b84ddb8837162abba043bc9a29cdd36805dabe2707b2ed987658fc728d2dfc2",
    "fba95f36361f30206f2b3d2b3d04ab36c7ccbf05e3879de284d685a515db6280",
    "09aa228588217eeb016ff26a9b6be54c9b13a9d7f8f557804a5e2336e4cd0397",
)


def expand_rows(first: int, rows: int) -> npt.NDArray[np.int32]:
    """Rows first … first + rows − 1 from the specification: int32 residues [rows, 1280]."""
    length = 4 * (COLUMNS + TAIL)
    stream = b"".join(hashlib.shake_256(_DOMAIN + row.to_bytes(8, "big")).digest(length) for row in range(first, first + rows))
    return residues_of_words(np.frombuffer(stream, "<u4").reshape(rows, COLUMNS + TAIL), COLUMNS)


def cache_folder() -> Path:
    """Where blocks are cached: $CLOVEN_CACHE, or cloven/ in the user's cache folder."""
    given = os.environ.get("CLOVEN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloven"


def block(index: int) -> npt.NDArray[np.int32]:
    """One block of A_pub, int32 [1024, 1280]: from the cache if its hash is right, else expanded, and cached if that can be done."""
    if index >= len(BLOCK_SHA256):
        return expand_rows(index * BLOCK_ROWS, BLOCK_ROWS)
    path = cache_folder() / f"a-pub-1-{index:02d}.bin"
    with contextlib.suppress(OSError):
        if path.stat().st_size == 4 * BLOCK_ROWS * COLUMNS:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == BLOCK_SHA256[index]:
                return np.frombuffer(bytearray(data), "<i4").reshape(BLOCK_ROWS, COLUMNS)
        logger.warning("%s: not the block that it should be; made anew", path.name)
    rows = expand_rows(index * BLOCK_ROWS, BLOCK_ROWS)
    _store(path, rows.astype("<i4").tobytes())
    return rows


def _store(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        logger.info("A_pub is not cached: %s", error.strerror)
        with contextlib.suppress(OSError):
            partial.unlink()


_growing = threading.Lock()
_planes = torch.empty(0, DIGITS, COLUMNS, dtype=torch.int8)


def _unlock_after_fork() -> None:
    global _growing
    _growing = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)


def a_pub(rows: int) -> Tensor:
    """The first `rows` rows of A_pub: residues int32 [rows, 1280]."""
    return torch.from_numpy(np.concatenate([block(index) for index in range(-(-rows // BLOCK_ROWS))]))[:rows]


def a_pub_planes(rows: int) -> Tensor:
    """The balanced base-256 digits of the first `rows` rows, digit 0 first: int8 [rows, 4, 1280]. Kept, and not to be changed."""
    global _planes
    with _growing:
        blocks = range(len(_planes) // BLOCK_ROWS, -(-rows // BLOCK_ROWS))
        if len(blocks):
            _planes = torch.cat([_planes, *(digits(torch.from_numpy(block(index))).permute(0, 2, 1) for index in blocks)])
        return _planes[:rows]
