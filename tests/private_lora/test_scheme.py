"""OUT/client through stock `from_pretrained`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import cloven
from cloven.errors import BadBundle, BadInput, ClovenError, ForeignBundle, NotAttached, TamperedBundle
from cloven.model.registration import ClovenConfig
from cloven.model.runtime import session_of
from cloven.private_lora.manifest import SIGNATURE, fingerprint
from cloven.private_lora.scheme import PrivateLora
from tests.lora_bundles import adapter_server, copied, ids_of, lora_bundle, merged, own_bundle, plain
from tests.split_models import logits, relative_error, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # transformers says so of its own way


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base is."""
    monkeypatch.setenv("CLOVEN_BASE", str(tiny_folder("llama")))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """OUT/client, and the address of its server."""
    out = copied(lora_bundle(), tmp_path / "out")
    with tempfile.TemporaryDirectory(prefix="c-") as folder, adapter_server(out / "server", f"ipc://{folder}/s"):
        yield out / "client", f"ipc://{folder}/s"


def load(client: Path, **settings: Any) -> Any:
    options = {"quantization_config": ClovenConfig(**settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(client, dtype=torch.float32, **options)


def right(model: Any, family: str = "llama") -> bool:
    return relative_error(logits(model, ids_of(2, 6)), logits(merged(family), ids_of(2, 6))) < 1e-3


def test_attached_by_the_environment(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_SERVER", served[1])
    model = load(served[0])
    session = session_of(model)
    assert session is not None and right(model)
    session.close()


def test_attached_by_settings(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOVEN_BASE")
    model = load(served[0], server=served[1], base=str(tiny_folder("llama")), pin=fingerprint(served[0]), timeout=10)
    session = session_of(model)
    assert session is not None and right(model)
    session.close()


def test_attached_later(served: tuple[Path, str]) -> None:
    model = load(served[0])
    with pytest.raises(NotAttached, match="set CLOVEN_SERVER before loading"):
        logits(model, ids_of(1, 2))
    with cloven.attach(model, served[1], look_ahead=0):
        assert right(model)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "phi3"])
def test_other_families(family: str, tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_BASE", str(tiny_folder(family)))
    out = copied(lora_bundle(family), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s"):
        model = load(out / "client")
        with cloven.attach(model, f"ipc://{socket_folder}/s", look_ahead=0):
            assert right(model, family)


def test_a_base_in_several_files(tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain().save_pretrained(tmp_path / "base", max_shard_size="50KB")
    monkeypatch.setenv("CLOVEN_BASE", str(tmp_path / "base"))
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s"):
        model = load(out / "client", server=f"ipc://{socket_folder}/s")
        assert right(model)
        session = session_of(model)
        assert session is not None
        session.close()


def test_a_workers_address_is_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_WORKER", "ipc:///nowhere/w")
    load(lora_bundle() / "client")  # nobody is asked


def test_the_adapter_of_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same shapes, by hash; and no base at all."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("CLOVEN_BASE", str(tmp_path / "base"))
    with pytest.raises(ForeignBundle, match="not the weights of the base"):
        load(lora_bundle() / "client")
    monkeypatch.setenv("CLOVEN_BASE", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput):
        load(lora_bundle() / "client")
    monkeypatch.delenv("CLOVEN_BASE")
    with pytest.raises(BadInput, match=r"the base model is needed: .* CLOVEN_BASE"):
        load(lora_bundle() / "client")


@pytest.mark.parametrize("way", ["setting", "environment"])
def test_pins(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = lora_bundle() / "client"

    def load_with(pin: str) -> Any:
        if way == "setting":
            return load(client, pin=pin)
        monkeypatch.setenv("CLOVEN_PIN", pin)
        return load(client)

    load_with(fingerprint(client))
    with pytest.raises(ForeignBundle, match="do not use it"):
        load_with("f" * 64)
    with pytest.raises(BadInput, match="no fingerprint"):
        load_with("f" * 63)


def test_a_pin_at_attaching(served: tuple[Path, str]) -> None:
    model = load(served[0])
    with pytest.raises(ForeignBundle):
        cloven.attach(model, served[1], pin="f" * 64)
    with cloven.attach(model, served[1], pin=fingerprint(served[0]), look_ahead=0):
        assert right(model)


def test_the_bundle_may_choose_no_run_time_settings(tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    config = json.loads((out / "client" / "config.json").read_text(encoding="utf-8"))
    for name in ("server", "base", "pin"):
        changed = config | {"quantization_config": config["quantization_config"] | {name: "x"}}
        (out / "client" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(BadBundle, match=f"holds the run-time setting '{name}'"):
            load(out / "client")


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "manifest.json", SIGNATURE])
def test_altered_files(damage: str, tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    path = out / "client" / damage
    data = bytearray(path.read_bytes())
    if damage == "config.json":
        data += b" "
    elif damage == SIGNATURE:
        data[0] = ord("0") if data[0] != ord("0") else ord("1")
    else:
        data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises((TamperedBundle, BadBundle)):
        load(out / "client")


def test_a_mixture_of_two_bundles(tmp_path: Path) -> None:
    one = own_bundle(tmp_path / "one")
    two = own_bundle(tmp_path / "two", ledger=one / "server" / "ledger.sqlite")
    for name in ("manifest.json", SIGNATURE):
        shutil.copyfile(two / "client" / name, one / "client" / name)
    with pytest.raises((ForeignBundle, TamperedBundle)):
        load(one / "client")


def test_the_server_half_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises((ClovenError, OSError, ValueError)):
        load(lora_bundle() / "server")


def test_nothing_else_is_swapped() -> None:
    scheme = PrivateLora()
    scheme.swap(None, {})
    with pytest.raises(BadBundle, match="malformed"):
        scheme.swap(None, {"layers": []})
