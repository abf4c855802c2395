from __future__ import annotations

from pathlib import Path

import pytest

from cloven.bench.prepare import bench_prepare
from cloven.engine import pool
from cloven.errors import BadInput


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_tiny_shape(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: processes)
    stages: list[str] = []
    result = bench_prepare("tiny", lambda stage, done, total: stages.append(stage), layers=1, engine="pool", folder=tmp_path)
    assert list(dict.fromkeys(stages)) == ["writing random weights", "spectra", "split", "write"]
    assert (result.layers, result.layers_of_shape, result.engine) == (1, 5, "pool")
    assert result.parameters == 256 * 32 * (2 * 8 + 2 * 4) + 3 * 256 * 672 + 256 * 1024
    assert result.job_bound_bytes == 5 * 4 * 2 * 256 * 672 + 10**9
    assert 2**25 < result.job_peak_bytes < result.job_bound_bytes  # a process with torch in it has more than 32 MB
    assert result.job_peak_bytes + result.parent_peak_bytes >= result.total_peak_bytes / 3 > 0
    assert result.to_dict()["seconds"] > 0
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_an_unknown_shape(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="shape 'huge'"):
        bench_prepare("huge", folder=tmp_path)
