from __future__ import annotations

import json

import pytest

from cloven.slip.summary import Summary
from tests.split_models import demo_bundle


def test_totals_by_kind() -> None:
    summary = Summary()
    summary.add("layers.0.q_proj", 4, 6, 1, 9.0, 10.0)
    summary.add("layers.1.q_proj", 4, 6, 2, 8.0, 10.0)
    summary.add("lm_head", 10, 6, 0, 0.0, 2.0)
    summary.add_quantisation(4 * 0.1**2, 4 * 10.0**2)
    summary.add_quantisation(0.0, 0.0)
    figures = summary.to_dict()
    assert figures["kinds"] == {
        "q_proj": {
            "layers": 2,
            "parameters": 48,
            "secret_parameters": 30,
            "layers_without_secret": 0,
            "secret_energy": pytest.approx((9 + 8) / 20),
        },
        "lm_head": {"layers": 1, "parameters": 60, "secret_parameters": 0, "layers_without_secret": 1, "secret_energy": 0.0},
    }
    assert figures["secret_fraction"] == pytest.approx(30 / 108)
    assert figures["secret_energy"] == pytest.approx(17 / 22)
    assert figures["quantisation_error"] == pytest.approx(0.01, rel=1e-4)
    assert json.loads(json.dumps(figures)) == figures


def test_a_model_of_zeros_divides_by_nothing() -> None:
    summary = Summary()
    summary.add("a", 2, 2, 0, 0.0, 0.0)
    summary.add_quantisation(0.0, 0.0)
    figures = summary.to_dict()
    assert figures["secret_energy"] == figures["quantisation_error"] == 0


def test_the_demo_model() -> None:
    int8, int8x2 = (demo_bundle(precision).manifest.summary for precision in ("int8", "int8x2"))
    assert 0.0295 < int8["secret_fraction"] <= 0.03
    assert int8["secret_energy"] > 2 * int8["secret_fraction"]  # the top of the spectrum carries more than its share
    assert 1e-3 < int8["quantisation_error"] < 2e-2
    assert int8x2["quantisation_error"] < int8["quantisation_error"] / 100
    assert int8["kinds"]["q_proj"]["layers"] == 5 and int8["kinds"]["lm_head"]["layers"] == 1
