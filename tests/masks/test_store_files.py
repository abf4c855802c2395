"""The records: each can be read once, in its own place, as it was written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cloven.errors import PadMisuse, RunError, StoreUnusable
from cloven.masks.store_files import SEGMENT, TAG_BYTES, GroupFiles, derived_key, record_bytes
from tests.helpers import random_residues
from tests.pad_stores import BUNDLE, OTHER

ROWS, KEY = 5, bytes(range(32))
RECORD = 4 * ROWS + TAG_BYTES
FIRST = "group-00007-000000.pads"
USED = "group-00007.used"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def files(folder: Path, *, group: int = 7, bundle: str = BUNDLE, key: bytes = KEY) -> GroupFiles:
    return GroupFiles(folder, bundle, group, ROWS, key)


def written(folder: Path, count: int = 20, first: int = 0) -> Tensor:
    images = random_residues(count, ROWS, seed=first)
    files(folder).append(first, images)
    return images


def test_what_was_written_is_read_once(tmp_path: Path) -> None:
    images = written(tmp_path)
    reader = files(tmp_path)
    assert reader.counts(20) == (0, 0)
    assert torch.equal(reader.take(3, 4), images[3:7]) and torch.equal(reader.take(0, 3), images[:3])
    assert reader.counts(20) == (7, 0)
    for one in (reader, files(tmp_path)):  # this process, another one
        with pytest.raises(PadMisuse, match=r"pad 3 of group 7 was used before; it was not used again") as caught:
            one.take(3, 1)
        assert caught.value.exit_code == 3
    assert reader.counts(20) == (7, 1)
    assert torch.equal(reader.take(7, 13), images[7:])
    reader.close()


def test_a_record_that_was_read_is_destroyed(tmp_path: Path) -> None:
    """Even when the mark is taken away: the tag is gone."""
    written(tmp_path)
    files(tmp_path).take(0, 2)
    (tmp_path / USED).write_bytes(bytes(20))
    with pytest.raises(StoreUnusable, match="pad 0 is not what was written"):
        files(tmp_path).take(0, 1)
    assert (tmp_path / FIRST).read_bytes()[RECORD - TAG_BYTES : RECORD] == bytes(TAG_BYTES)
    assert (tmp_path / FIRST).read_bytes()[3 * RECORD - TAG_BYTES : 3 * RECORD] != bytes(TAG_BYTES)


def test_several_files(tmp_path: Path) -> None:
    images = written(tmp_path, 2 * SEGMENT + 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"group-00007-00000{n}.pads" for n in range(3)] + [USED]
    assert [(tmp_path / f"group-00007-00000{n}.pads").stat().st_size for n in range(3)] == [SEGMENT * RECORD] * 2 + [10 * RECORD]
    assert (tmp_path / USED).stat().st_size == len(images) and record_bytes(ROWS) == RECORD + 1
    reader = files(tmp_path)
    assert torch.equal(reader.take(SEGMENT - 3, 6), images[SEGMENT - 3 : SEGMENT + 3])
    assert torch.equal(reader.take(2 * SEGMENT - 1, 11), images[2 * SEGMENT - 1 :])


def test_more_is_added_while_somebody_reads(tmp_path: Path) -> None:
    images, reader = written(tmp_path, 4), files(tmp_path)
    assert torch.equal(reader.take(0, 4), images)
    more = written(tmp_path, 3 * SEGMENT, first=4)  # the first file and the marks grow under the reader's maps
    assert torch.equal(reader.take(4, 2 * SEGMENT), more[: 2 * SEGMENT])


def test_the_format_has_a_vector(tmp_path: Path) -> None:
    """Version 1 of the format: another program must read and write the same bytes."""
    files(tmp_path).append(0, torch.arange(-5, 5, dtype=torch.int32).view(2, ROWS))
    assert derived_key(KEY, "masks").hex() == VECTOR_KEY
    assert hashlib.sha256((tmp_path / FIRST).read_bytes()).hexdigest() == VECTOR_RECORDS


VECTOR_KEY = "1bc91616655de9c3cda97c0cbb66367d123da09df16c94837c2470005453a8bc"
VECTOR_RECORDS = "25c48cc5be9133509733138e17983f0d6eae113f91f472a127120025c51644fd"


def test_the_same_pads_again_are_the_same_bytes(tmp_path: Path) -> None:
    """An interrupted fill does its last round again: a nonce must never meet two plaintexts."""
    images = written(tmp_path)
    before = (tmp_path / FIRST).read_bytes()
    files(tmp_path).append(10, images[10:])
    assert (tmp_path / FIRST).read_bytes() == before


def test_nothing_of_the_images_is_on_the_disk(tmp_path: Path) -> None:
    images = written(tmp_path, 50)
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(row.numpy().tobytes() in data for row in images) and KEY not in data
    files(tmp_path).append(50, torch.zeros(2, ROWS, dtype=torch.int32))
    records = (tmp_path / FIRST).read_bytes()[50 * RECORD :]
    assert records[:20] != records[RECORD : RECORD + 20]  # the same image in two places does not look the same


def test_only_the_owner_reads_the_files(tmp_path: Path) -> None:
    written(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("offset", [0, 7, 4 * ROWS - 1, 4 * ROWS, RECORD - 1])
def test_an_altered_byte(offset: int, tmp_path: Path) -> None:
    images = written(tmp_path)
    data = bytearray((tmp_path / FIRST).read_bytes())
    data[2 * RECORD + offset] ^= 1
    (tmp_path / FIRST).write_bytes(data)
    reader = files(tmp_path)
    assert torch.equal(reader.take(0, 2), images[:2])
    with pytest.raises(StoreUnusable, match=rf"{FIRST}: pad 2 is not what was written; it was not used. Remove the store") as caught:
        reader.take(2, 1)
    assert caught.value.exit_code == 1
    assert torch.equal(reader.take(3, 17), images[3:])


def test_swapped_records(tmp_path: Path) -> None:
    written(tmp_path)
    data = (tmp_path / FIRST).read_bytes()
    (tmp_path / FIRST).write_bytes(data[RECORD : 2 * RECORD] + data[:RECORD] + data[2 * RECORD :])
    for index in (0, 1):
        with pytest.raises(StoreUnusable, match=f"pad {index} is not what was written"):
            files(tmp_path).take(index, 1)


@pytest.mark.parametrize("other", [{"group": 8}, {"bundle": OTHER}, {"key": bytes(32)}])
def test_records_of_another_group_bundle_or_key(other: dict[str, int | str | bytes], tmp_path: Path) -> None:
    """The same shape, the same index: a file that was put in another's place."""
    GroupFiles(tmp_path, **({"bundle": BUNDLE, "group": 7, "rows": ROWS, "key": KEY} | other)).append(0, random_residues(20, ROWS))  # type: ignore[arg-type]
    if "group" in other:
        for name in (FIRST, USED):
            shutil.move(tmp_path / name.replace("00007", "00008"), tmp_path / name)
    with pytest.raises(StoreUnusable, match="pad 0 is not what was written"):
        files(tmp_path).take(0, 1)


@pytest.mark.parametrize("name", [FIRST, USED])
@pytest.mark.parametrize("size", [0, 1, 19, 2 * RECORD - 1])
def test_truncated_files(name: str, size: int, tmp_path: Path) -> None:
    written(tmp_path)
    size = min(size, (tmp_path / name).stat().st_size - 1)
    os.truncate(tmp_path / name, size)
    with pytest.raises(StoreUnusable, match=r"Remove the store|remove the store"):
        files(tmp_path).take(19, 1)


@pytest.mark.parametrize("name", [FIRST, USED])
@pytest.mark.parametrize("how", ["missing", "link", "folder"])
def test_strange_files(name: str, how: str, tmp_path: Path) -> None:
    images = written(tmp_path)
    path = (tmp_path / name).rename(tmp_path / "elsewhere")
    if how == "link":
        (tmp_path / name).symlink_to(path)
    elif how == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(StoreUnusable, match="cannot be read; remove the store and fill a new one"):
        files(tmp_path).take(0, 1)
    before = path.read_bytes()
    if how != "missing":
        with pytest.raises(RunError, match="the pads of group 7 cannot be written"):
            files(tmp_path).append(0, images)
    assert path.read_bytes() == before


def test_a_mark_that_was_set_by_somebody_else(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / USED).write_bytes(b"\0\1" + bytes(18))
    files(tmp_path).take(0, 1)
    with pytest.raises(PadMisuse, match="pad 1"):
        files(tmp_path).take(1, 1)


@pytest.mark.parametrize("at", range(3))
def test_a_full_disk(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks, the first file, the second one: what was there stays readable, and it goes on when there is room."""
    images, real, calls = written(tmp_path, 1000), os.posix_fallocate, 0

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, length)

    more = random_residues(200, ROWS, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RunError, match="the pads of group 7 cannot be written: No space left on device"):
            files(tmp_path).append(1000, more)
    reader = files(tmp_path)
    assert torch.equal(reader.take(0, 1000), images) and reader.counts(1000) == (1000, 0)
    reader.append(1000, more)
    assert torch.equal(reader.take(1000, 200), more)


def test_space_is_reserved_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in a memory-mapped file on a full disk is a signal that ends the process, not an error."""
    order = []
    real_allocate, real_encrypt = os.posix_fallocate, GroupFiles._owned
    monkeypatch.setattr(os, "posix_fallocate", lambda *given: (order.append("space"), real_allocate(*given)))
    monkeypatch.setattr(GroupFiles, "_owned", lambda self: (order.append("key"), real_encrypt(self))[1])
    written(tmp_path)
    assert order.count("space") == 2
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_where_space_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    images = written(tmp_path, SEGMENT + 5)
    assert torch.equal(files(tmp_path).take(0, SEGMENT + 5), images)


def test_files_of_used_pads_are_removed(tmp_path: Path) -> None:
    images, reader = written(tmp_path, 3 * SEGMENT), files(tmp_path)
    reader.take(0, SEGMENT)
    reader.drop_before(SEGMENT - 1)
    assert len(list(tmp_path.glob("*.pads"))) == 3
    reader.drop_before(2 * SEGMENT - 1)
    assert sorted(path.name for path in tmp_path.glob("*.pads")) == [f"group-00007-00000{n}.pads" for n in (1, 2)]
    assert torch.equal(reader.take(SEGMENT, 2 * SEGMENT), images[SEGMENT:])
    assert reader.counts(3 * SEGMENT) == (3 * SEGMENT, 0)  # the marks stay


def test_no_marks_no_counts(tmp_path: Path) -> None:
    assert files(tmp_path).counts(10) == (0, 0)


def test_closed_files_give_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    for end in (GroupFiles.close, GroupFiles.forget_key):
        reader = files(tmp_path)
        reader.take(0 if end is GroupFiles.close else 1, 1)
        end(reader)
        end(reader)
        with pytest.raises(PadMisuse, match="closed, or this process was forked"):
            reader.take(5 if end is GroupFiles.close else 6, 1)
        with pytest.raises(PadMisuse):
            reader.append(20, random_residues(1, ROWS))


def test_repr_hides_the_key() -> None:
    assert repr(files(Path("/nowhere"))) == "GroupFiles(7, <secret>)"
