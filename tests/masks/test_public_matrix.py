from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.field.prg import TAIL
from cloven.field.residues import H, P, is_residue
from cloven.masks import public_matrix
from cloven.masks.public_matrix import BLOCK_ROWS, BLOCK_SHA256, COLUMNS, a_pub, a_pub_planes, block, cache_folder, expand_rows
from tests.helpers import centred


def slow_row(number: int) -> list[int]:
    """Row i from the specification: SHAKE-256, little-endian words of 32 bits, 31 of each, p rejected, centred."""
    stream = hashlib.shake_256(b"cloven/private-lora/A_pub/1/" + number.to_bytes(8, "big")).digest(4 * (COLUMNS + 16))
    words = [int.from_bytes(stream[i : i + 4], "little") % 2**31 for i in range(0, len(stream), 4)]
    return [centred(word) for word in words if word != P][:COLUMNS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and an empty memory."""
    monkeypatch.setenv("CLOVEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(public_matrix, "_planes", torch.empty(0, 4, COLUMNS, dtype=torch.int8))
    yield tmp_path / "cache"


@settings(max_examples=25)
@given(st.integers(0, 2**63) | st.integers(0, 30_000))
def test_rows_against_the_specification(number: int) -> None:
    assert expand_rows(number, 1).tolist() == [slow_row(number)]


def test_consecutive_rows_against_the_specification() -> None:
    assert expand_rows(1022, 4).tolist() == [slow_row(number) for number in range(1022, 1026)]


def test_a_row_with_rejected_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of 31 ones is never an entry; its place takes the row's first spare word. No row of the first 24 blocks has one."""
    words = np.arange(COLUMNS + TAIL, dtype="<u4")
    words[[0, 7, COLUMNS + 1]] = [P, 2**32 - 1, P]  # with the highest bit, which is ignored, and without

    class Shake:
        """Gives these words."""

        def digest(self, length: int) -> bytes:
            return words.tobytes()[:length]

    monkeypatch.setattr(hashlib, "shake_256", lambda _: Shake())
    row = expand_rows(0, 1)[0].tolist()
    assert row[0] == COLUMNS and row[7] == COLUMNS + 2 and row[1:7] == [1, 2, 3, 4, 5, 6] and row[8:] == list(range(8, COLUMNS))


def test_a_vector() -> None:
    """Of specification 1."""
    assert expand_rows(0, 1)[0, :6].tolist() == VECTOR
    assert hashlib.sha256(expand_rows(0, 2).astype("<i4").tobytes()).hexdigest() == VECTOR_SHA256


def test_the_matrix_is_a_prefix_of_one_expansion() -> None:
    small, large = a_pub(5), a_pub(BLOCK_ROWS + 3)
    assert small.shape == (5, COLUMNS) and small.dtype == torch.int32 and large.shape == (BLOCK_ROWS + 3, COLUMNS)
    assert torch.equal(large[:5], small) and is_residue(large)
    assert large[-1].tolist() == slow_row(BLOCK_ROWS + 2) and large[BLOCK_ROWS].tolist() == slow_row(BLOCK_ROWS)


def test_it_looks_uniform() -> None:
    values = a_pub(500).double()
    assert abs(float(values.mean())) < 0.01 * H and abs(float(values.std()) / H - 3**-0.5) < 0.005
    assert float(values.max()) > 0.9999 * H and float(values.min()) < -0.9999 * H


def test_planes_are_the_digits() -> None:
    planes = a_pub_planes(BLOCK_ROWS + 2)
    assert planes.shape == (BLOCK_ROWS + 2, 4, COLUMNS) and planes.dtype == torch.int8
    weights = torch.tensor([1, 256, 65_536, 16_777_216]).view(1, 4, 1)
    assert torch.equal((planes.to(torch.int64) * weights).sum(1).to(torch.int32), a_pub(BLOCK_ROWS + 2))


def test_planes_grow_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = block
    monkeypatch.setattr(public_matrix, "block", lambda index: (asked.append(index), original(index))[1])
    first = a_pub_planes(3).clone()
    a_pub_planes(BLOCK_ROWS)
    a_pub_planes(BLOCK_ROWS + 1)
    assert torch.equal(a_pub_planes(2 * BLOCK_ROWS)[:3], first) and asked == [0, 1]


def test_planes_in_eight_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_matrix, "block", lambda index: expand_rows(index * BLOCK_ROWS, BLOCK_ROWS))
    expected, wrong = a_pub(BLOCK_ROWS + 10), []

    def use(rows: int) -> None:
        if int(a_pub_planes(rows)[rows - 1, 0, 0]) != int((expected[rows - 1, 0] + 128) % 256 - 128):
            wrong.append(rows)

    threads = [threading.Thread(target=use, args=(rows,)) for rows in (1, 5, BLOCK_ROWS, BLOCK_ROWS + 10) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and len(public_matrix._planes) == 2 * BLOCK_ROWS


# --- the cache


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CLOVEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "cloven"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "cloven"


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def test_a_block_is_cached_and_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = block(1)
    assert list(files(cache)) == ["a-pub-1-01.bin"]
    assert hashlib.sha256(files(cache)["a-pub-1-01.bin"]).hexdigest() == BLOCK_SHA256[1]
    monkeypatch.setattr(public_matrix, "expand_rows", lambda *_: pytest.fail("it is cached"))
    again = block(1)
    assert np.array_equal(again, made)
    again[0, 0] = 0  # the reader's own copy
    assert np.array_equal(block(1), made)


@pytest.mark.parametrize("damage", ["a bit", "short", "long", "empty", "another block", "out of range"])
def test_a_damaged_block_is_made_anew(damage: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = block(0)
    data = bytearray(files(cache)["a-pub-1-00.bin"])
    path = cache / "a-pub-1-00.bin"
    if damage == "a bit":
        data[12_345] ^= 1
    elif damage == "short":
        del data[-4:]
    elif damage == "long":
        data += bytes(4)
    elif damage == "empty":
        data.clear()
    elif damage == "another block":
        data = bytearray(expand_rows(BLOCK_ROWS, BLOCK_ROWS).astype("<i4").tobytes())
    else:
        data[:4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(block(0), good)
    assert "made anew" in caplog.text
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BLOCK_SHA256[0]  # and repaired
    assert [name for name in files(cache) if name.startswith(".")] == []


def test_a_folder_in_the_place_of_a_block(cache: Path) -> None:
    (cache / "a-pub-1-00.bin" / "x").mkdir(parents=True)
    assert block(0)[0].tolist() == slow_row(0)
    assert [path.name for path in cache.iterdir()] == ["a-pub-1-00.bin"]  # nothing half-written stays


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CLOVEN_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.INFO, "cloven"):
        assert block(0)[0].tolist() == slow_row(0)
    assert "not cached" in caplog.text and "file" not in caplog.text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert block(0)[0].tolist() == slow_row(0)
    assert list(cache.iterdir()) == []


def test_the_cache_is_the_users_own(cache: Path) -> None:
    block(0)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_rows_beyond_the_listed_blocks_are_not_cached(cache: Path) -> None:
    index = len(BLOCK_SHA256)
    assert block(index)[3].tolist() == slow_row(index * BLOCK_ROWS + 3) and not cache.exists()


@pytest.mark.parametrize("index", [*range(3), *(pytest.param(i, marks=pytest.mark.long) for i in range(3, len(BLOCK_SHA256)))])
def test_the_hashes_of_the_blocks(index: int) -> None:
    rows = expand_rows(index * BLOCK_ROWS, BLOCK_ROWS)
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest() == BLOCK_SHA256[index]


@pytest.mark.long
def test_a_whole_block_against_the_specification() -> None:
    assert block(2).tolist() == [slow_row(2 * BLOCK_ROWS + i) for i in range(BLOCK_ROWS)]


VECTOR = [-881190294, -324556637, -530156781, 353892615, -400001299, -490412332]
VECTOR_SHA256 = "fa2bdebd2a09d52315d5ff1a14c057c7d71389f6caa8eccf971d5eaccc49933b"
