"""Every attack on a private-LoRA bundle: on a tiny model's adapter, on single matrices, and on matrices whose protection is missing."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.private_lora import (
    Target,
    _coin_verdict,
    _honest,
    _nearest,
    audit_private_lora,
    averaging,
    distinguish,
    hint_inversion,
    open_target,
    packing,
    regression,
    unit_queries,
)
from cloven.errors import BadBundle, ForeignBundle, LedgerUnusable
from cloven.field.products import multiply
from cloven.field.residues import H, P, centre
from cloven.field.selection import select_backend
from cloven.masks import lwe
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.masks.public_matrix import a_pub
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ClientGroup, ClientModule, ServerManifest
from cloven.private_lora.prepare import with_pad
from tests.lora_bundles import own_bundle, tensors
from tests.split_models import scratch

COLUMNS = 48  # of the narrowest group of the tiny Llama
WIDE = 10_000
SMALL = 8
REGRESSIONS = ("regression_quarter", "regression_half", "regression_all", "regression_budget")
NAMES = (*REGRESSIONS, "averaging", "unit_queries", "packing", "hint_inversion", "distinguish", "division")


@functools.cache
def bundle(budget: int, bits: int = 16, hint: str = "lwe") -> Path:
    out = scratch() / f"audit-{budget}-{bits}-{hint}"
    with patch.dict(os.environ, {"CLOVEN_STATE": str(state_of(out))}):
        return own_bundle(out, budget=budget, bits=bits, hint=hint)


def state_of(out: Path) -> Path:
    return scratch() / f"state-{out.name}"


@functools.cache
def audited(budget: int, bits: int = 16, hint: str = "lwe") -> dict[str, Attack]:
    out = bundle(budget, bits, hint)
    with patch.dict(os.environ, {"CLOVEN_STATE": str(state_of(out))}):
        attacks = audit_private_lora(out)
    assert [attack.name for attack in attacks] == list(NAMES)
    return {attack.name: attack for attack in attacks}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=generator(seed)).to(torch.int8)


@functools.cache
def target(rows: int = 4, columns: int = COLUMNS, budget: int = WIDE, bits: int = 16, hint: str = "lwe", seed: int = 0) -> Target:
    """A random matrix, padded and hinted as `prepare` does it."""
    parameters, codes = lwe_parameters(hint), codes_of(rows, columns, seed)
    height = parameters.pad_columns + columns
    matrix, published = with_pad(codes, parameters, a_pub(height).t().contiguous())
    group = ClientGroup(columns, int(codes.double().norm(dim=1).max()) + 1, (ClientModule("layer", 16, rows // 2),))
    return Target(matrix, published, group, parameters, bits, budget)


# --- whole audits


def test_as_json() -> None:
    for attack in json.loads(json.dumps([attack.to_dict() for attack in audited(WIDE).values()])):
        assert set(attack) == {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict"}
        assert attack["scheme"] == ("private-lora/fhe" if attack["name"] == "division" else "private-lora/lwe")
        assert attack["adversary"].startswith("a server" if attack["name"] == "distinguish" else "a client")
        assert attack["tries"] > 0 and 0 <= attack["chance"] <= 1 and 0 <= attack["value"] <= 1


@pytest.mark.parametrize(("budget", "bits", "hint"), [(WIDE, 16, "lwe"), (SMALL, 16, "lwe"), (SMALL, 8, "statistical")])
def test_every_attack_succeeds_where_the_protection_is_missing(budget: int, bits: int, hint: str) -> None:
    weakened = {name: attack.weakened_value for name, attack in audited(budget, bits, hint).items()}
    assert all(value >= 0.95 for value in weakened.values()), weakened


@pytest.mark.parametrize(("budget", "bits", "hint"), [(WIDE, 16, "lwe"), (SMALL, 16, "lwe"), (SMALL, 8, "statistical")])
def test_what_no_budget_buys(budget: int, bits: int, hint: str) -> None:
    attacks = audited(budget, bits, hint)
    assert {name: attacks[name].verdict for name in ("averaging", "hint_inversion", "division")} == dict.fromkeys(
        ("averaging", "hint_inversion", "division"), "holds"
    )
    assert attacks["averaging"].value < 1e-9 and attacks["hint_inversion"].value < 0.01 and attacks["division"].value < 0.05
    assert abs(attacks["distinguish"].value - 0.5) < 0.2  # 5.6 standard deviations
    assert attacks["distinguish"].verdict == _coin_verdict(attacks["distinguish"].value, 200)


def test_a_wide_budget_buys_everything() -> None:
    attacks = audited(WIDE)
    for name in ("regression_all", "regression_budget", "unit_queries", "packing"):
        assert attacks[name].verdict == "broken" and attacks[name].value > 0.99
    assert attacks["unit_queries"].chance == attacks["packing"].chance == 1.0


@pytest.mark.parametrize("hint", ["lwe", "statistical"])
def test_a_small_budget_buys_its_share(hint: str) -> None:
    attacks = audited(SMALL, 16 if hint == "lwe" else 8, hint)
    for name in ("regression_quarter", "regression_budget", "unit_queries", "packing"):
        assert attacks[name].verdict == "measured" and 0.05 < attacks[name].value < 0.5
    assert attacks["regression_budget"].tries == SMALL and attacks["regression_budget"].value < 2.5 * SMALL / COLUMNS
    assert attacks["unit_queries"].value == pytest.approx(SMALL / COLUMNS)
    bits = 16 if hint == "lwe" else 8
    assert attacks["packing"].value == pytest.approx(attacks["packing"].chance) == SMALL * bits / (8 * COLUMNS)  # it reaches the bound
    assert attacks["regression_all"].verdict == "broken"  # what a larger budget would give away is shown as well


def test_the_regression_does_not_depend_on_the_hint_and_grows_with_the_queries() -> None:
    for hint, bits in (("lwe", 16), ("statistical", 8)):
        quarter, half, everything = (audited(SMALL, bits, hint)[name] for name in REGRESSIONS[:3])
        assert [one.tries for one in (quarter, half, everything)] == [COLUMNS // 4, COLUMNS // 2, COLUMNS]
        assert quarter.value < half.value < everything.value
        assert (quarter.chance, half.chance, everything.chance) == (0.25, 0.5, 1.0)


def test_the_verdict_on_half_of_the_queries_is_the_same_for_all_matrices() -> None:
    """`regression_half` reaches 0.5 ± 0.01: "broken" must not begin there, or two preparations of one adapter differ in it."""
    assert len({regression(target(seed=seed), generator())[1].verdict for seed in range(16)}) == 1


def test_the_narrowest_group_is_attacked_with_the_ledgers_budget(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out", budget=77)
    manifest, found = ServerManifest.read(out / "server"), open_target(out)
    assert found.group.columns == COLUMNS == min(g.columns for g in manifest.groups) - 1280 and found.budget == 77 and found.bits == 16
    index = [group.name for group in manifest.groups].index(found.group.name)
    stored = tensors(out / "server" / "adapter.safetensors")[str(index)]
    assert torch.equal(found.matrix, stored) and torch.equal(found.codes, stored[:, 1280:])
    assert torch.equal(found.hint, tensors(out / "client" / "model.safetensors")[f"cloven.{index}.hint"])


def test_an_audit_charges_nothing_and_changes_no_file(tmp_path: Path) -> None:
    def contents() -> dict[str, str]:
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}

    out = own_bundle(tmp_path / "out", budget=SMALL)
    before = contents()
    audit_private_lora(out)
    assert contents() == before
    manifest = ServerManifest.read(out / "server")
    with closing(Ledger(manifest.ledger_path(out / "server"), manifest.adapter)) as ledger:
        assert ledger.accounts() == []


def test_halves_that_are_missing(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    for half in ("client", "server"):
        alone = tmp_path / half
        shutil.copytree(out / half, alone / half)
        with pytest.raises(BadBundle):
            audit_private_lora(alone)


def test_no_audit_without_the_ledger(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    (out / "server" / "ledger.sqlite").unlink()
    with pytest.raises(LedgerUnusable, match="missing"):
        audit_private_lora(out)


def test_halves_of_two_bundles_are_a_security_failure_as_everywhere_else(tmp_path: Path) -> None:
    """ForeignBundle, exit 3, as `inspect` and KV-Shield's audit say."""
    first, second = own_bundle(tmp_path / "first"), own_bundle(tmp_path / "second", "gpt2")
    shutil.rmtree(first / "client")
    shutil.copytree(second / "client", first / "client")
    with pytest.raises(ForeignBundle, match="halves are of two bundles"):
        audit_private_lora(first)


# --- the attacks one by one


@pytest.mark.parametrize("bits", [16, 12, 8])
@pytest.mark.parametrize("hint", ["lwe", "statistical"])
def test_honest_answers_are_the_products_but_for_a_small_error(bits: int, hint: str) -> None:
    one = target(bits=bits, hint=hint)
    x = torch.randn(5, COLUMNS, dtype=torch.float64, generator=generator())
    wanted = x @ one.codes.double().t()
    error = float((_honest(one, x) - wanted).norm() / wanted.norm())
    assert 0 < error < 20 * 2.0**-bits + 1e-3


def test_regression_needs_as_many_answers_as_there_are_columns() -> None:
    quarter, half, everything, budget = regression(target(budget=6), generator())
    assert abs(quarter.value - 0.25) < 0.15 and abs(half.value - 0.5) < 0.15 and everything.value > 0.9
    assert budget.tries == 6 and budget.value < 0.35 and budget.chance == 6 / COLUMNS
    assert "6 honest answers" in budget.metric


def test_regression_asks_no_more_than_it_needs() -> None:
    assert regression(target(budget=10**9), generator())[3].tries == 2 * COLUMNS


@pytest.mark.parametrize("budget", [1, 5, 24, 47, 48, 1000])
def test_unit_queries_give_one_column_per_answer(budget: int) -> None:
    attack = unit_queries(target(budget=budget))
    assert attack.value == pytest.approx(min(1.0, budget / COLUMNS)) and attack.weakened_value == 1.0
    assert attack.verdict == ("broken" if budget >= 24 else "measured")
    assert attack.chance == min(1.0, 2 * budget / COLUMNS) and attack.tries == min(budget, COLUMNS)


@pytest.mark.parametrize(("bits", "each"), [(8, 1), (12, 1), (15, 1), (16, 2)])
def test_packing_gives_as_many_columns_per_answer_as_its_bits_hold(bits: int, each: int) -> None:
    attack = packing(target(budget=7, bits=bits))
    assert attack.value == pytest.approx(7 * each / COLUMNS) and attack.tries == 7 * each and attack.weakened_value == 1.0
    assert attack.value <= attack.chance == min(1.0, 7 * bits / (8 * COLUMNS)) and attack.verdict == "measured"
    assert packing(target(bits=bits)).verdict == "broken" and packing(target(bits=bits)).value == 1.0


def test_large_matrices_are_shown_in_part_and_counted_in_full() -> None:
    one = target(2, 1100)
    assert unit_queries(one).tries == packing(one).tries == 1024
    assert unit_queries(one).value == packing(one).value == 1.0
    few = replace(one, budget=110)
    assert unit_queries(few).value == pytest.approx(0.1) and packing(few).value == pytest.approx(0.2)


def test_averaging_takes_nothing_away_from_one_answer() -> None:
    attack = averaging(target(), generator())
    assert attack.value < 1e-9 and attack.verdict == "holds" and attack.weakened_value > 0.95


class Dithering(Target):
    """A server that adds fresh noise before it rounds."""

    def answer(self, c: Tensor) -> Tensor:
        z = multiply(select_backend("cpu"), c, select_backend("cpu").place(self.matrix)).long()
        step = 2 ** (31 - self.bits)
        return self.rounded(centre(z + torch.randint(-step, step, z.shape, generator=DITHER)))


DITHER = generator(9)


def test_averaging_breaks_a_server_with_fresh_noise() -> None:
    attack = averaging(Dithering(**vars(target())), generator())
    assert attack.value > 0.9 and attack.verdict == "broken"


@pytest.mark.parametrize(("columns", "hint"), [(COLUMNS, "lwe"), (COLUMNS, "statistical"), (600, "lwe")])  # 600: the attack knows 88
def test_the_hint_cannot_be_inverted(columns: int, hint: str) -> None:
    attack = hint_inversion(target(2, columns, hint=hint))
    assert attack.value < 0.02 and attack.verdict == "holds" and attack.weakened_value == 1.0
    assert attack.tries == 2 * min(columns, 512)


def test_a_hint_without_a_pad_is_inverted() -> None:
    one = target(2, COLUMNS)
    bare = a_pub(1280 + COLUMNS)[1280:].t().contiguous()
    hint = multiply(select_backend("cpu"), bare, select_backend("cpu").place(one.codes.contiguous())).t().contiguous()
    attack = hint_inversion(replace(one, hint=hint))
    assert attack.value == 1.0 and attack.verdict == "broken"


def test_queries_cannot_be_told_apart() -> None:
    attack = distinguish(target(), generator())
    assert abs(attack.value - 0.5) < 0.2 and attack.weakened_value == 1.0 and attack.tries == 200


def test_queries_without_noise_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gaussians(keys: list[bytes], count: int, sigma: str) -> npt.NDArray[np.int8]:
        return np.zeros((len(keys), count), np.int8)

    monkeypatch.setattr(lwe, "gaussians", no_gaussians)
    attack = distinguish(target(), generator())
    assert attack.value == 1.0 and attack.verdict == "broken"


def test_a_coin_is_believed_within_four_standard_deviations() -> None:
    assert [_coin_verdict(value, 200) for value in (0.5, 0.64, 0.36, 0.65, 0.35, 1.0, 0.0)] == ["holds"] * 3 + ["broken"] * 4


# --- the nearest entry on the circle of residues

RESIDUES = st.integers(-H, H)


def distance(a: int, b: int) -> int:
    return min((a - b) % P, (b - a) % P)


@given(st.lists(RESIDUES, min_size=1, max_size=12), st.lists(RESIDUES, min_size=1, max_size=12, unique=True))
def test_nearest_is_the_nearest(z: list[int], table: list[int]) -> None:
    found = _nearest(torch.tensor([z], dtype=torch.int32), torch.tensor(table, dtype=torch.int32))
    assert found.shape == (1, len(z))
    for value, index in zip(z, found[0].tolist(), strict=True):
        assert distance(value, table[index]) == min(distance(value, entry) for entry in table)


@given(st.lists(RESIDUES, min_size=1, max_size=12, unique=True))
def test_entries_of_the_table_are_found_themselves(table: list[int]) -> None:
    entries = torch.tensor(table, dtype=torch.int32)
    assert torch.equal(_nearest(entries.view(-1, 1), entries), torch.arange(len(table)).view(-1, 1))


def test_nearest_goes_around_the_circle() -> None:
    near: Callable[[int], int] = lambda z: int(_nearest(torch.tensor([[z]], dtype=torch.int32), table))  # noqa: E731
    table = torch.tensor([H - 5, 0, -H + 100], dtype=torch.int32)
    assert (near(H), near(-H), near(-H + 40), near(-H + 60), near(3)) == (0, 0, 0, 2, 1)
