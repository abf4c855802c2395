from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cloven.audit.private_lora.subject import open_target
from cloven.errors import ForeignBundle
from cloven.private_lora.manifest import ServerManifest
from tests.audit.private_lora.targets import COLUMNS, generator, target
from tests.lora_bundles import own_bundle, tensors


def test_the_narrowest_group_is_attacked_with_the_ledgers_budget(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out", budget=77)
    manifest, found = ServerManifest.read(out / "server"), open_target(out)
    assert found.group.columns == COLUMNS == min(g.columns for g in manifest.groups) - 1280 and found.budget == 77 and found.bits == 16
    index = [group.name for group in manifest.groups].index(found.group.name)
    stored = tensors(out / "server" / "adapter.safetensors")[str(index)]
    assert torch.equal(found.matrix, stored) and torch.equal(found.codes, stored[:, 1280:])
    assert torch.equal(found.hint, tensors(out / "client" / "model.safetensors")[f"cloven.{index}.hint"])


def test_halves_of_two_bundles_are_a_security_failure_as_everywhere_else(tmp_path: Path) -> None:
    """ForeignBundle, exit 3, as `inspect` and KV-Shield's audit say."""
    first, second = own_bundle(tmp_path / "first"), own_bundle(tmp_path / "second", "gpt2")
    shutil.rmtree(first / "client")
    shutil.copytree(second / "client", first / "client")
    with pytest.raises(ForeignBundle, match="halves are of two bundles"):
        open_target(first)


@pytest.mark.parametrize("bits", [16, 12, 8])
@pytest.mark.parametrize("hint", ["lwe", "statistical"])
def test_honest_answers_are_the_products_but_for_a_small_error(bits: int, hint: str) -> None:
    one = target(bits=bits, hint=hint)
    x = torch.randn(5, COLUMNS, dtype=torch.float64, generator=generator())
    wanted = x @ one.codes.double().t()
    error = float((one.honest(x) - wanted).norm() / wanted.norm())
    assert 0 < error < 20 * 2.0**-bits + 1e-3


def test_attackers_choose_the_same_in_every_audit(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    first, second = (torch.randn(3, generator=open_target(out).random) for _ in range(2))
    assert torch.equal(first, second) and "tensor" not in repr(open_target(out))
