from __future__ import annotations

import json
from typing import Any

import pytest

from cloven.errors import BadInput
from cloven.kv_shield.config import MODES, KvShieldConfig


def test_defaults() -> None:
    assert KvShieldConfig() == KvShieldConfig("permute", 16, False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noise", [2, 16, 256])
def test_json(mode: str, noise: int) -> None:
    config = KvShieldConfig(mode, noise, True)
    assert KvShieldConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("mode", ["", "Permute", "sealed", "trusted", "none", None, 3, ["session"]])
def test_modes(mode: Any) -> None:
    with pytest.raises(BadInput, match="permute, session"):
        KvShieldConfig(mode)


@pytest.mark.parametrize("noise", [-2, 0, 1, 15, 257, 258])
def test_noise(noise: int) -> None:
    with pytest.raises(BadInput, match="even number from 2 to 256"):
        KvShieldConfig("session", noise)
