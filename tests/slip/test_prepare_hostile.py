"""`prepare` on a directory that somebody else made: links, leftovers, code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloven.errors import BadInput
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from tests.split_models import tiny, tiny_folder

QUICK = SlipConfig(rank=0)


def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    return folder


def test_a_link_in_the_place_of_the_partial_folder(tmp_path: Path) -> None:
    """It would be emptied, made readable and renamed."""
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "letter").write_text("dear")
    (tmp_path / ".out.partial").symlink_to(victim)
    with pytest.raises(BadInput, match="partial"):
        prepare_slip(tiny("llama"), tmp_path / "out", QUICK)
    assert (victim / "letter").read_text() == "dear" and not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_in_the_place_of_the_partial_one(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "letter").write_text("dear")
    with pytest.raises(BadInput, match="remove it first"):
        prepare_slip(tiny("llama"), tmp_path / "out", QUICK)
    assert (tmp_path / ".out.partial" / "letter").exists()


def test_what_an_earlier_run_left_is_replaced(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "trusted").mkdir(parents=True)
    (partial / ".cloven-partial").touch()
    (partial / "link").symlink_to(tmp_path)
    partial.chmod(0o777)
    bundle = prepare_slip(tiny("llama"), tmp_path / "out", QUICK)
    assert sorted(path.name for path in bundle.path.iterdir()) == ["exposed", "trusted"]
    assert bundle.trusted.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json"])
def test_links_out_of_the_model_directory_are_not_followed(tmp_path: Path, name: str) -> None:
    """A licence file that is a link to a key would be shipped to the worker."""
    folder = source(tmp_path)
    (tmp_path / "key").write_text("secret key")
    (folder / name).symlink_to(tmp_path / "key")
    bundle = prepare_slip(folder, tmp_path / "out", QUICK)
    assert not (bundle.exposed / name).exists() and not (bundle.trusted / name).exists()


def test_code_is_neither_run_nor_copied(tmp_path: Path) -> None:
    folder = source(tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "model_max_length": 5}))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    bundle = prepare_slip(folder, tmp_path / "out", QUICK)
    assert not list(bundle.path.rglob("*.py"))
    assert "auto_map" not in (bundle.trusted / "config.json").read_text()
    assert json.loads((bundle.trusted / "tokenizer_config.json").read_text()) == {"model_max_length": 5}


def test_code_for_an_unknown_class_is_not_offered(tmp_path: Path) -> None:
    """transformers would ask on the terminal whether to run it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text("raise SystemExit('run')")
    config = {"model_type": "vit", "architectures": ["EvilForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.EvilForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput):
        prepare_slip(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_summary_counts_what_is_exposed_whole(tmp_path: Path) -> None:
    bundle = prepare_slip(tiny_folder("llama"), tmp_path / "out", QUICK)
    kinds = bundle.manifest.summary["kinds"]
    assert all(kind["layers_without_secret"] == kind["layers"] for kind in kinds.values())
