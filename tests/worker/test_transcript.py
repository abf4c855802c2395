"""The transcript of a curious worker: what is written is what comes back, and a cut file is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.errors import BadInput
from cloven.field.residues import H
from cloven.worker.transcript import Transcript, read_transcript


def write(path: Path, records: list[tuple[int, torch.Tensor]]) -> None:
    transcript = Transcript(path)
    for group, c in records:
        transcript.append(group, c)
    transcript.close()


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9)), max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, int]]) -> None:
    path = tmp_path_factory.mktemp("t") / "transcript"
    records = [(group, torch.randint(-H, H + 1, (rows, columns), dtype=torch.int32)) for group, rows, columns in shapes]
    write(path, records)
    found = list(read_transcript(path))
    assert [group for group, _ in found] == [group for group, _ in records]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, records, strict=True))


@pytest.mark.parametrize("kept", [5, 12, 20])
def test_a_cut_transcript(tmp_path: Path, kept: int) -> None:
    write(tmp_path / "t", [(1, torch.ones(2, 3, dtype=torch.int32))])
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:kept])
    with pytest.raises(BadInput, match="middle of a record"):
        list(read_transcript(tmp_path / "t"))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot record there"):
        Transcript(tmp_path / "missing" / "t")
