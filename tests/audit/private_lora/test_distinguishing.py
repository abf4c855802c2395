from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cloven.audit.private_lora.distinguishing import coin_verdict, distinguishing
from cloven.masks import lwe
from tests.audit.private_lora.targets import target


def test_queries_cannot_be_told_apart() -> None:
    (attack,) = distinguishing(target())
    assert abs(attack.value - 0.5) < 0.2 and attack.weakened_value == 1.0 and attack.tries == 200


def test_queries_without_noise_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gaussians(keys: list[bytes], count: int, sigma: str) -> npt.NDArray[np.int8]:
        return np.zeros((len(keys), count), np.int8)

    monkeypatch.setattr(lwe, "gaussians", no_gaussians)
    (attack,) = distinguishing(target())
    assert attack.value == 1.0 and attack.verdict == "broken"


def test_a_coin_is_believed_within_four_standard_deviations() -> None:
    assert [coin_verdict(value, 200) for value in (0.5, 0.64, 0.36, 0.65, 0.35, 1.0, 0.0)] == ["holds"] * 3 + ["broken"] * 4
