"""Engines in this process, and choosing one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from cloven.engine.engine import ENGINES, SMALL, Inline, one_thread, select_engine
from cloven.engine.pool import ProcessPool
from cloven.errors import BadInput
from tests.engine.tasks import compute, fail_at_two, jobs, note, noted


def test_one_after_the_other_in_this_process(tmp_path: Path) -> None:
    given = jobs(tmp_path, 3)
    done = []
    for job in Inline().run(note, given):
        done.append(job)
        assert [other.path.exists() for other in given] == [other in done for other in given]  # none is begun before it is asked for
    assert done == given
    assert noted(given) == [{"process": os.getpid(), "threads": 1}] * 3


def test_no_jobs() -> None:
    assert list(Inline().run(note, [])) == []


def test_the_first_error_ends_it(tmp_path: Path) -> None:
    given, done = jobs(tmp_path, 5), []
    with pytest.raises(BadInput, match="number two is bad"):
        done.extend(Inline().run(fail_at_two, given))
    assert [job.path.exists() for job in given] == [True, True, False, False, False]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_come_back(threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        list(Inline().run(note, jobs(tmp_path, 1)))
        assert torch.get_num_threads() == threads
        with pytest.raises(BadInput):
            list(Inline().run(fail_at_two, jobs(tmp_path, 3)))
        assert torch.get_num_threads() == threads
        with pytest.raises(KeyboardInterrupt), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_bits_do_not_depend_on_this_process_threads(tmp_path: Path) -> None:
    found, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            (job,) = Inline().run(compute, jobs(tmp_path, 1))
            found.add(job.path.read_text())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "parameters", "kind"),
    [("inline", 10**12, Inline), ("pool", 1, ProcessPool), ("auto", SMALL, Inline), ("auto", SMALL + 1, ProcessPool)],
)
def test_choosing(name: str, parameters: int, kind: type[object]) -> None:
    assert name in ENGINES and type(select_engine(name, parameters, 2**20)) is kind


@pytest.mark.parametrize("name", ["", "Pool", "dask", "../pool"])
def test_no_such_engine(name: str) -> None:
    with pytest.raises(BadInput, match="choose one of auto, inline, pool, ray"):
        select_engine(name, 1, 1)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'cloven\[ray\]'"):
        select_engine("ray", 1, 1)


def test_ray_is_not_imported_for_the_others() -> None:
    before = sys.modules.pop("ray", None)
    try:
        for name in ("auto", "inline", "pool"):
            select_engine(name, SMALL + 1, 2**20)
        assert "ray" not in sys.modules
    finally:
        if before is not None:
            sys.modules["ray"] = before
