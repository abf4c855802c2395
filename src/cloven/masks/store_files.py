"""The records of a pad store: one file per group and thousand pads, one AES-256-GCM record per pad.

    group-00012-000003.pads     pads 3·1024 … of group 12, memory-mapped: u int32 [N] encrypted ‖ tag, 4 N + 16 bytes each
    group-00012.used            one byte per pad: 0 not used, 1 used, 2 somebody tried to use it again

Key of a group's records: HKDF(store key, group); nonce: the pad's index, which never comes again; AAD: bundle, group and index. The mask
m is not stored: it is the keystream of HKDF(store key, "masks") at (group, index). A record that was read is destroyed: its tag is
overwritten, so that no second reading of it can succeed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from cloven.errors import PadMisuse, RunError, StoreUnusable

SEGMENT = 1024
TAG_BYTES = 16


def derived_key(key: bytes, label: str) -> bytes:
    """A key for one purpose."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"cloven/pads/1/" + label.encode()).derive(key)


def record_bytes(rows: int) -> int:
    """Disk space of one pad with N = `rows`, and its mark."""
    return 4 * rows + TAG_BYTES + 1


class GroupFiles:
    """One group's records.

    Args:
        folder: of the store.
        bundle: its id; group: the group's number; rows: N.
        key: the store's key.
    """

    def __init__(self, folder: Path, bundle: str, group: int, rows: int, key: bytes) -> None:
        self._folder, self._group, self._rows = folder, group, rows
        self._aad = bytes.fromhex(bundle) + group.to_bytes(4, "big")
        self._cipher: AESGCM | None = AESGCM(derived_key(key, f"records/{group}"))
        self._record = 4 * rows + TAG_BYTES
        self._maps: dict[int, mmap.mmap] = {}
        self._used: mmap.mmap | None = None

    def __repr__(self) -> str:
        return f"GroupFiles({self._group}, <secret>)"

    def append(self, first: int, images: Tensor) -> None:
        """Write the images of pads `first` …, int32 [rows, N], durably. The same index always gets the same bytes.

        Raises:
            RunError: the disk is full; the store is as it was.
        """
        try:
            self._extend_used(first + images.shape[0])
            for segment in range(first // SEGMENT, (first + images.shape[0] - 1) // SEGMENT + 1):
                start, end = max(first, segment * SEGMENT), min(first + images.shape[0], (segment + 1) * SEGMENT)
                self._write(segment, start, images[start - first : end - first])
        except OSError as error:
            raise RunError(
                f"{self._folder}: the pads of group {self._group} cannot be written: {error.strerror}; "
                "what was written before is kept: make room and run the same command again"
            ) from error

    def take(self, first: int, rows: int) -> Tensor:
        """Read the images of pads first … first + rows − 1, int32 [rows, N], and destroy their records.

        Raises:
            PadMisuse: one of them was used before.  StoreUnusable: a record is missing or was altered.
        """
        self._owned()  # before anything is marked
        images = np.empty((rows, self._rows), dtype="<i4")
        for row in range(rows):
            index = first + row
            used = self._used_map(index)
            if used[index]:
                used[index] = 2
                raise PadMisuse(f"{self._folder}: pad {index} of group {self._group} was used before; it was not used again")
            used[index] = 1
            images[row] = self._decrypted(index)
        return torch.from_numpy(images.astype(np.int32, copy=False))

    def drop_before(self, index: int) -> None:
        """Remove files that hold no pad from `index` on."""
        for path in self._folder.glob(f"group-{self._group:05d}-*.pads"):
            if (int(path.stem.rpartition("-")[2]) + 1) * SEGMENT <= index:
                path.unlink(missing_ok=True)
        for segment in [segment for segment in self._maps if (segment + 1) * SEGMENT <= index]:
            self._maps.pop(segment).close()

    def counts(self, filled: int) -> tuple[int, int]:
        """Pads that were used, and those that somebody tried to use twice."""
        with contextlib.suppress(OSError):
            marks = np.fromfile(self._used_path, dtype=np.uint8)[:filled]
            return int((marks > 0).sum()), int((marks > 1).sum())
        return 0, 0

    def forget_key(self) -> None:
        """Drop the key; nothing can be read or written any more."""
        self._cipher = None

    def close(self) -> None:
        """Unmap the files and drop the key."""
        self.forget_key()
        for one in (*self._maps.values(), *([self._used] if self._used is not None else [])):
            one.close()
        self._maps.clear()
        self._used = None

    def _owned(self) -> AESGCM:
        cipher = self._cipher
        if cipher is None:
            raise PadMisuse("the pad store is closed, or this process was forked: open a session of its own")
        return cipher

    @property
    def _used_path(self) -> Path:
        return self._folder / f"group-{self._group:05d}.used"

    def _segment_path(self, segment: int) -> Path:
        return self._folder / f"group-{self._group:05d}-{segment:06d}.pads"

    def _nonce(self, index: int) -> bytes:
        return index.to_bytes(12, "big")

    def _write(self, segment: int, start: int, images: Tensor) -> None:
        values: npt.NDArray[np.int32] = images.numpy().astype("<i4", copy=False)
        cipher = self._owned()
        with os.fdopen(os.open(self._segment_path(segment), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            offset = (start - segment * SEGMENT) * self._record
            _allocate(file.fileno(), offset, len(values) * self._record)
            file.seek(offset)
            for row, value in enumerate(values):
                index = start + row
                file.write(cipher.encrypt(self._nonce(index), value.tobytes(), self._aad + index.to_bytes(8, "big")))
            file.flush()
            os.fsync(file.fileno())

    def _extend_used(self, count: int) -> None:
        with os.fdopen(os.open(self._used_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            length = os.fstat(file.fileno()).st_size
            if length < count:
                _allocate(file.fileno(), length, count - length)
                os.fsync(file.fileno())

    def _used_map(self, index: int) -> mmap.mmap:
        if self._used is None or len(self._used) <= index:
            if self._used is not None:
                self._used.close()
            self._used = self._map(self._used_path)
        if len(self._used) <= index:
            raise StoreUnusable(f"{self._used_path}: too short; remove the store and fill a new one")
        return self._used

    def _decrypted(self, index: int) -> npt.NDArray[np.int32]:
        cipher = self._owned()
        segment, place = index // SEGMENT, index % SEGMENT * self._record
        records = self._maps.get(segment)
        if records is None or len(records) < place + self._record:
            if records is not None:
                records.close()
            records = self._maps[segment] = self._map(self._segment_path(segment))
        data = records[place : place + self._record]
        try:
            plain = cipher.decrypt(self._nonce(index), data, self._aad + index.to_bytes(8, "big"))
        except (InvalidTag, ValueError) as error:
            raise StoreUnusable(
                f"{self._segment_path(segment)}: pad {index} is not what was written; it was not used. Remove the store and fill a new one"
            ) from error
        records[place + self._record - TAG_BYTES : place + self._record] = bytes(TAG_BYTES)
        return np.frombuffer(plain, dtype="<i4")

    def _map(self, path: Path) -> mmap.mmap:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                return mmap.mmap(descriptor, 0)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise StoreUnusable(f"{path}: cannot be read; remove the store and fill a new one") from error


def _allocate(descriptor: int, offset: int, length: int) -> None:
    """Reserve space now: a full disk must be an error here, not a signal when a mapped page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, length)
    elif os.fstat(descriptor).st_size < offset + length:
        os.ftruncate(descriptor, offset + length)
