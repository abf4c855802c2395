from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloven.errors import BadInput
from cloven.serving.api_error import ApiError
from cloven.serving.original import Original
from cloven.zoo.demo import demo_model_path
from tests.served import plain_model
from tests.split_models import demo_bundle, tiny_folder


def served(dtype: torch.dtype = torch.float32) -> Any:
    """The demo model, as if it were protected."""
    return SimpleNamespace(model=SimpleNamespace(config=plain_model()[0].config, dtype=dtype))


def test_loaded_when_it_is_asked_for_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    original = Original(folder, served(torch.bfloat16))
    first = original.model()
    assert first.dtype == torch.bfloat16
    shutil.rmtree(folder)
    assert original.model() is first


def test_it_is_gone_when_it_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    original = Original(folder, served())
    shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(ApiError, match="cannot be loaded") as caught:
            original.model()
        assert caught.value.status == 500 and str(folder) not in caught.value.message
    assert str(folder) in caplog.text


def test_what_is_no_original(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no model directory"):
        Original(tmp_path, served())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        Original(tmp_path, served())
    with pytest.raises(BadInput, match="half of a bundle"):
        Original(demo_bundle("int8x2").trusted, served())
    with pytest.raises(BadInput, match="not the original of the model that is served: "):
        Original(tiny_folder("llama"), served())


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers"])
def test_another_size(tmp_path: Path, name: str) -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: config[name] + 1, "layer_types": None}))
    with pytest.raises(BadInput, match=f"{name} is another one"):
        Original(tmp_path, served())
