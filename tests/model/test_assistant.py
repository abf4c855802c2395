from __future__ import annotations

from pathlib import Path

import pytest

from cloven.errors import BadInput
from cloven.model.assistant import open_assistant
from cloven.zoo.demo import demo_model_path
from tests.split_models import demo_model, tiny, tiny_folder


def test_another_model_with_the_same_vocabulary() -> None:
    source = open_assistant(str(tiny_folder("gpt2")), tiny("llama").config)
    assert source.load().config.model_type == "gpt2"


def test_another_vocabulary() -> None:
    with pytest.raises(BadInput, match=r"model-llama: .* its vocabulary has 97 tokens, the model's 1024"):
        open_assistant(str(tiny_folder("llama")), demo_model().config)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model directory"):
        open_assistant(str(tmp_path / "nowhere"), demo_model().config)
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_assistant(str(tmp_path), demo_model().config)


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    config = (demo_model_path() / "config.json").read_text(encoding="utf-8").replace('"model_type": "llama"', '"model_type": "mine"')
    assert "mine" in config
    (tmp_path / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(BadInput, match=r"config\.json cannot be used"):
        open_assistant(str(tmp_path), demo_model().config)
