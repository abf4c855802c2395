from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from cloven.bench import private_lora, references
from cloven.bench.ledgers import ledgers_in
from cloven.bench.private_lora import BackendFigures, LoraBench, bench_private_lora
from cloven.bench.references import Fhe
from cloven.errors import BadInput
from cloven.private_lora.witness import state_folder
from cloven.zoo.random_adapter import write_random_adapter

FIGURES = {  # of the issue: at the top for lwe, and for every backend
    "protocol_ms_per_token",
    "mask_ms_per_token",
    "server_ms_per_token",
    "bytes_up_per_layer",
    "bytes_down_per_layer",
    "prefill_512_s",
}
SLOW = ("tenseal", "concrete_ml_extensions")  # seconds per row
STEPS: list[str] = []


@functools.cache
def small() -> LoraBench:
    """One round of two layers of the demo's shape, beside fhe where that is installed; run once."""
    with patch.dict(sys.modules, dict.fromkeys(SLOW)):
        return bench_private_lora("demo", lambda stage, done, total: STEPS.append(stage), tokens=2, rounds=1, layers=2, prefill=3)


def test_as_json() -> None:
    record = json.loads(json.dumps(small().to_dict()))
    assert set(LoraBench.__dataclass_fields__) | FIGURES <= set(record)
    assert set(record["backends"]) == {"lwe", "fhe"} and record["lwe"] == record["backends"]["lwe"]
    for figures in record["backends"].values():
        assert set(figures) == set(BackendFigures.__dataclass_fields__) >= FIGURES
    assert {name: record[name] for name in FIGURES} == {name: record["lwe"][name] for name in FIGURES}
    assert {"preparing", "rounds"} <= set(STEPS)


def test_figures_belong_together() -> None:
    result = small()
    assert (result.shape, result.layers, result.rank, result.columns, result.rounds) == ("demo", 2, 8, 256, 1)
    for figures in result.backends.values():
        for what in ("protocol", "mask", "server"):
            assert getattr(figures, f"{what}_ms_per_token") == pytest.approx(2 * getattr(figures, f"{what}_ms_per_layer"))
        assert 0 < figures.server_ms_per_token < figures.protocol_ms_per_token
    fhe = result.backends["fhe"]
    assert result.lwe.mask_ms_per_token > 0 and fhe.mask_ms_per_token == 0
    assert result.lwe.prefill_512_s is not None and result.lwe.prefill_512_s > 0 and result.prefill_512_masks_s > 0
    assert fhe.prefill_512_s is None and fhe.bytes_up_per_layer > 20 * result.lwe.bytes_up_per_layer


def test_bytes_of_a_narrow_layer() -> None:
    """Residues of the 1280 pad columns and of the input; 16 bits of two terms of r = 8 for q and v; a header of less than 64 bytes."""
    assert 4 * (1280 + 256) < small().lwe.bytes_up_per_layer < 4 * (1280 + 256) + 64
    assert 2 * 2 * 16 <= small().lwe.bytes_down_per_layer < 2 * 2 * 16 + 64


def test_bytes_at_d_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    """The issue's limits."""
    monkeypatch.setattr(private_lora, "references", lambda adapter: ({}, ["fhe"]))
    result = bench_private_lora("chatglm2-6b", lambda stage, done, total: None, tokens=1, rounds=1, layers=1, prefill=1)
    assert result.columns == 4096 and result.layers == 1
    assert result.lwe.bytes_up_per_layer <= 22_000 and result.lwe.bytes_down_per_layer <= 100
    assert set(result.backends) == {"lwe"} and result.not_installed == ["fhe"]


def test_references_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("seal", *SLOW):
        monkeypatch.setitem(sys.modules, name, None)
    there, missing = references.references(write_random_adapter(tmp_path, "demo", 10, 1))
    assert there == {} and missing == ["fhe", "tenseal", "concrete-ml-extensions"]
    result = bench_private_lora("demo", lambda stage, done, total: None, tokens=1, rounds=1, layers=1, prefill=1)
    assert set(result.backends) == {"lwe"} and result.to_dict()["not_installed"] == missing


def test_the_fhe_reference_multiplies(tmp_path: Path) -> None:
    pytest.importorskip("seal")
    reference = Fhe(write_random_adapter(tmp_path, "demo", 10, 1))
    for _ in range(2):
        reference.measure(torch.ones(256, dtype=torch.float64))
    assert len(reference.client_seconds) == len(reference.server_seconds) == 2
    assert all(seconds > 0 for seconds in reference.client_seconds + reference.server_seconds)
    assert reference.bytes_up > reference.bytes_down > 100_000  # with the public key; 32 rows share two answers


@pytest.mark.long
def test_every_reference_that_is_installed(tmp_path: Path) -> None:
    there, missing = references.references(write_random_adapter(tmp_path, "demo", 10, 1))
    assert set(there) | set(missing) == {"fhe", "tenseal", "concrete-ml-extensions"} and not set(there) & set(missing)
    for reference in there.values():
        reference.measure(torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        assert reference.client_seconds[0] > 0 and reference.server_seconds[0] > 0
        assert reference.bytes_up > 1000 and reference.bytes_down > 1000


def test_unknown_shapes_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(BadInput, match="shape 'gpt-5': choose one of chatglm2-6b, llama-2-7b, demo"):
        bench_private_lora("gpt-5", lambda stage, done, total: None)


def test_its_ledgers_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_folder()
    with ledgers_in(tmp_path):
        assert state_folder() == tmp_path / "state"
    assert state_folder() == before
    monkeypatch.delenv("CLOVEN_STATE")
    with pytest.raises(BadInput), ledgers_in(tmp_path):
        raise BadInput("in between")
    assert "CLOVEN_STATE" not in os.environ
