from __future__ import annotations

from pathlib import Path

from cloven.private_lora.names import CLIENT_FILE, basis_name, hint_name, scales_name
from tests.lora_bundles import client_manifest, lora_bundle, tensors


def test_names_differ() -> None:
    names = [make(group) for group in range(30) for make in (hint_name, scales_name)]
    names += [basis_name(group, position) for group in range(30) for position in range(30)]
    assert len(set(names)) == len(names)
    assert (hint_name(3), scales_name(3), basis_name(3, 1)) == ("cloven.3.hint", "cloven.3.scales", "cloven.3.1.basis")


def test_they_are_all_that_a_bundle_holds() -> None:
    """And the tripwire: an empty tensor by a name of the base."""
    out = lora_bundle()
    expected = set()
    for index, group in enumerate(client_manifest(out).groups):
        expected |= {hint_name(index), scales_name(index)} | {basis_name(index, position) for position in range(len(group.modules))}
    held = tensors(out / "client" / CLIENT_FILE)
    (tripwire,) = set(held) - expected
    assert set(held) - {tripwire} == expected
    assert not tripwire.startswith("cloven.") and held[tripwire].numel() == 0
    assert Path(CLIENT_FILE).name == CLIENT_FILE
