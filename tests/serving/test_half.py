from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cloven.errors import BadBundle, BadInput, TamperedBundle
from cloven.kv_shield.messages import ENCLAVE
from cloven.private_lora.messages import ADAPTER
from cloven.serving.half import open_half
from cloven.wire.messages import WORKER
from tests.kv_bundles import kv_bundle
from tests.lora_bundles import lora_bundle
from tests.split_models import tiny_bundle

ALL = ("ipc:///w", "ipc:///e", "ipc:///s")


def test_the_three_schemes() -> None:
    """Each takes the address of its own peer."""
    slip = open_half(tiny_bundle("llama").trusted, *ALL)
    assert (slip.scheme, slip.address, slip.peer, slip.schema, slip.batches) == ("slip", "ipc:///w", "worker", WORKER, True)
    assert slip.bundle == tiny_bundle("llama").id
    for mode, batches in (("permute", True), ("session", False)):
        kv = open_half(kv_bundle("llama", mode) / "exposed", *ALL)
        assert (kv.scheme, kv.address, kv.peer, kv.schema, kv.batches) == ("kv-shield", "ipc:///e", "enclave", ENCLAVE, batches)
    lora = open_half(lora_bundle() / "client", *ALL)
    assert (lora.scheme, lora.address, lora.peer, lora.schema, lora.batches) == (
        "private-lora",
        "ipc:///s",
        "adapter-server",
        ADAPTER,
        True,
    )


@pytest.mark.parametrize(("half", "command"), [("kv", "cloven enclave"), ("lora", "cloven adapter-server")])
def test_the_other_half(half: str, command: str) -> None:
    folder = kv_bundle("llama", "permute") / "trusted" if half == "kv" else lora_bundle() / "server"
    with pytest.raises(BadInput, match=command):
        open_half(folder, *ALL)


def test_no_address_of_its_own_peer() -> None:
    for folder, option in (
        (tiny_bundle("llama").trusted, "--worker ADDRESS .or CLOVEN_WORKER"),
        (kv_bundle("llama", "permute") / "exposed", "--enclave ADDRESS .or CLOVEN_ENCLAVE"),
        (lora_bundle() / "client", "--server ADDRESS .or CLOVEN_SERVER"),
    ):
        with pytest.raises(BadInput, match=option):
            open_half(folder, None, None, None)


def test_an_altered_or_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(BadBundle):
        open_half(tmp_path, *ALL)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle("llama").trusted, copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(TamperedBundle, match=r"config\.json"):
        open_half(copy, *ALL)
