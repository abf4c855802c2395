from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloven.errors import BadInput, WorkerUnreachable
from cloven.model.runtime import RuntimeOptions
from cloven.serving.half import open_half
from cloven.serving.loading import LoadOptions, _default_name, _settle, _template, load
from cloven.slip.session import SlipSession
from tests.split_models import demo_bundle, tiny_bundle, worker_thread


def test_a_half_becomes_a_served_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the environment do not get in; the session has the ones that were given."""
    monkeypatch.setenv("CLOVEN_WORKER", "ipc:///nowhere")
    template = tmp_path / "template"
    template.write_text("{{ messages }}")
    with worker_thread(demo_bundle()) as address:
        runtime = RuntimeOptions(address, timeout=7.0, constant_rows=4)
        half = open_half(demo_bundle().trusted, address, None, None)
        served = load(half, LoadOptions(chat_template=template, dtype="bfloat16"), runtime)
        assert served.name == demo_bundle().path.name and served.model.dtype == torch.bfloat16 and served.batches
        assert served.tokenizer.chat_template == "{{ messages }}"
        assert isinstance(served.session, SlipSession) and served.session.channel.timeout == 7.0
        assert served.session.channel.address == address and "CLOVEN_WORKER" not in os.environ
        assert served._peer_is_there()
        served.close()
        assert served.session.closed


def test_nobody_there(socket_folder: Path) -> None:
    address = f"ipc://{socket_folder}/w"
    with pytest.raises(WorkerUnreachable):
        load(open_half(demo_bundle().trusted, address, None, None), LoadOptions(), RuntimeOptions(address, timeout=0.3))


def test_a_model_without_a_fast_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = open_half(tiny_bundle("llama").trusted, "ipc:///w", None, None)
    monkeypatch.setattr("cloven.serving.loading.AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: object()))
    with pytest.raises(BadInput, match="fast tokenizer"):
        load(half, LoadOptions(), RuntimeOptions("ipc:///w"))


@pytest.mark.parametrize(
    ("options", "match"), [({"dtype": "float16"}, "dtype 'float16'"), ({"name": "../x"}, "model_name"), ({"name": ""}, "model_name")]
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        LoadOptions(**options)
    assert LoadOptions(name="org/model-1.5").name == "org/model-1.5"


def test_names() -> None:
    assert _default_name(Path("/a/bundle-1/trusted")) == "bundle-1"
    assert _default_name(Path("/a/über uns/trusted")) == _default_name(Path("/trusted")) == "cloven"


def test_templates(tmp_path: Path) -> None:
    assert _template(None) is None
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    for name in ("none", "binary", "large"):
        with pytest.raises(BadInput, match="chat template"):
            _template(tmp_path / name)


def test_ends_and_pads() -> None:
    """What is missing of them is settled once, and not warned of with every request."""

    def settled(ends: Any, pad: int | None, of_tokenizer: int | None) -> tuple[Any, int | None]:
        model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends, pad_token_id=pad))
        _settle(model, SimpleNamespace(eos_token_id=of_tokenizer))
        return model.generation_config.eos_token_id, model.generation_config.pad_token_id

    assert settled([5, 6], None, 9) == ([5, 6], 5)
    assert settled(5, 3, 9) == (5, 3)
    assert settled(None, None, 9) == (9, 9)
    assert settled(None, None, None) == (None, None)


def test_an_altered_bundle_is_not_served(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "trusted"
    shutil.copytree(demo_bundle().trusted, copy)
    half = open_half(copy, "ipc:///w", None, None)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(Exception, match=r"config\.json"):
        load(half, LoadOptions(), RuntimeOptions("ipc:///w"))
