from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from cloven.errors import BadInput, UnsupportedModel
from cloven.model import source as module
from cloven.model.source import Source, open_source
from cloven.zoo.demo import demo_model_path
from cloven.zoo.tiny import tiny_config
from tests.split_models import tiny, tiny_bundle, tiny_folder


def test_a_directory() -> None:
    source = open_source(demo_model_path())
    assert source.name == "demo_model" and source.config.model_type == "llama"
    assert source.load().dtype == torch.bfloat16  # as it was stored
    assert {path.name for path in source.files()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_a_model_in_memory() -> None:
    source = open_source(tiny("gpt2"))
    assert source.load() is tiny("gpt2") and source.name == "gpt2" and source.licence() == "not stated" and list(source.files()) == []


def test_a_split_model_in_memory_is_refused() -> None:
    from tests.split_models import load

    with pytest.raises(UnsupportedModel, match="already quantised or split"):
        open_source(load(tiny_bundle("llama").trusted))


@pytest.mark.parametrize("name", ["no-such-directory", "a/b/c", "../up", "/nowhere/at/all", "with space/model", ""])
def test_what_is_no_hub_id_is_looked_for_on_this_disk_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(module, "snapshot_download", never)
    with pytest.raises(BadInput):
        open_source(name)


def test_the_hub_has_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("https://token@hub/… cannot be reached")

    monkeypatch.setattr(module, "snapshot_download", offline)
    with pytest.raises(BadInput, match=r"org/model: no such directory, and the Hub gives no such model \(LocalEntryNotFoundError\)"):
        open_source("org/model")


def test_a_model_of_the_hub_is_called_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A snapshot's folder is called by its commit; the card should name the model."""
    snapshot = tmp_path / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    tiny("llama").save_pretrained(snapshot)
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(module, "snapshot_download", download)
    source = open_source("some-org/some-model")
    assert asked["name"] == "some-org/some-model"
    assert not any(
        pattern.endswith((".py", ".bin", ".pt", "*")) and not pattern.startswith(("LIC", "NOT", "tok")) for pattern in asked["patterns"]
    )
    assert source.load().num_parameters() == tiny("llama").num_parameters()
    assert source.name == "some-org/some-model"


def test_code_in_the_directory_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}'
    )
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(BadInput, match=r"config\.json cannot be used"):
        open_source(folder)


def test_other_les_that_are_copied(tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.py",
        "notes.txt",
        "LICENSE",
        "model.safetensors",
    ):
        (tmp_path / name).write_text("x")
    source = Source(tiny_config("llama"), tmp_path)
    assert sorted(path.name for path in source.files()) == ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    assert [path.name for path in source.files(licences=True)] == ["LICENSE"]


def test_the_dtype_of_the_checkpoint_is_kept() -> None:
    assert open_source(tiny_folder("llama")).load().dtype == torch.float32
