from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from cloven.bundle.bundle import Bundle
from cloven.demo.slip import all_products_exact
from cloven.slip.config import SlipConfig
from cloven.zoo.random_bundle import write_random_bundle
from cloven.zoo.shapes import shape_config
from tests.split_models import attached, demo_bundle, logits, random_ids


@pytest.fixture(params=[("int8", False), ("int8x2", True)], ids=["int8", "int8x2-tied"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    precision, tied = request.param
    config = LlamaConfig(**{**shape_config("tiny", 2).to_dict(), "tie_word_embeddings": tied})
    return write_random_bundle(config, tmp_path / "out", SlipConfig(precision=precision))


def test_it_loads_and_runs_like_a_prepared_one(bundle: Bundle) -> None:
    bundle.verify()
    with attached(bundle) as (model, session):
        assert all_products_exact(session, bundle)
        result = logits(model, random_ids(1024, 2, 5))
        assert bool(torch.isfinite(result).all()) and 1e-3 < float(result.std()) < 1e3


def test_its_secret_fraction_is_that_of_its_parameters(tmp_path: Path) -> None:
    bundle = write_random_bundle(shape_config("tiny"), tmp_path / "out", SlipConfig())
    real = demo_bundle()  # of the same shape
    assert [(g.rows, g.columns) for g in bundle.manifest.exposed.groups] == [(g.rows, g.columns) for g in real.manifest.exposed.groups]
    sizes = [sum(path.stat().st_size for path in one.trusted.glob("*.safetensors")) for one in (bundle, real)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # ranks are rounded per matrix there, spent globally here


def test_secret_files_are_secret(bundle: Bundle) -> None:
    assert stat.S_IMODE(bundle.trusted.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in bundle.trusted.glob("*.safetensors"))
