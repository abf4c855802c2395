"""A fine-tune of a public model: the scramble is undone by its public relative, and what a split with `--public-base` leaves exposed.

The attacker holds the exposed half and the public base. In the weakened system the fine-tune was split as if it had no public relative
(`--no-public-relative`, a lie): rows match the base's by their sorted absolute entries, which neither permutations nor signs change;
then columns by the rows that were matched, then signs. What is left of the exposed matrix after that is the fine-tune.

With `--public-base` and a difference inside the secret rank there is nothing to be found: the codes are those of the base.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloven.bundle.bundle import Bundle
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.zoo.demo import demo_model_path
from tests.split_models import scratch

RANK, SIZE = 4, 0.05  # of the fine-tune's difference, the size relative to the weights
GROUPS = {  # by number: names of the members
    0: [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
    6: ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
    20: ["lm_head"],
}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def stacked(folder: Path, group: int) -> Tensor:
    """W [N, K] of a group, float64."""
    held = weights(folder)
    return torch.cat([held[f"{name}.weight"].double() for name in GROUPS[group]])


@functools.cache
def tuned() -> Path:
    """The demo model with a random difference of low rank in every linear layer."""
    folder = scratch() / "tuned-demo"
    shutil.copytree(demo_model_path(), folder)
    generator, held = torch.Generator().manual_seed(5), weights(folder)
    for name, tensor in held.items():
        if "proj" in name or "lm_head" in name:
            delta = torch.randn(tensor.shape[0], RANK, generator=generator) @ torch.randn(RANK, tensor.shape[1], generator=generator)
            held[name] = (tensor.float() + SIZE * tensor.float().norm() / delta.norm() * delta).to(tensor.dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def split_as_private() -> Bundle:
    """The weakened system: places are secret, but not mixed."""
    return prepare_slip(tuned(), scratch() / "tuned-private", SlipConfig(precision="int8", scramble="permutation"))


@functools.cache
def split_from_its_base(rank: int) -> Bundle:
    config = SlipConfig(rank=rank, scramble="none", origin="public-base")
    return prepare_slip(tuned(), scratch() / f"tuned-public-{rank}", config, public_base=demo_model_path())


def codes(bundle: Bundle, group: int) -> Tensor:
    """What the worker holds."""
    return load_file(bundle.exposed / f"exposed-{group + 1:05d}.safetensors")[f"group-{group:05d}"].double()


@dataclass(frozen=True)
class Alignment:
    """Row ρ(a) and column κ(b) of the base for every exposed row and column, and the codes in the base's order with its signs."""

    rows: Tensor
    columns: Tensor
    aligned: Tensor


def profile(matrix: Tensor) -> Tensor:
    """Sorted absolute entries of every row, less what all rows have in common."""
    sizes = matrix.abs().sort(1).values
    sizes = sizes / sizes.norm(dim=1, keepdim=True)
    return sizes - sizes.mean(0)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """For every row of a the row of b with the highest correlation."""
    a, b = a - a.mean(0), b - b.mean(0)  # entries that are large in all rows say nothing
    a, b = ((m - m.mean(1, keepdim=True)) / (m.std(1, keepdim=True) + 1e-12) for m in (a, b))
    return (a @ b.t()).argmax(1)


def align(exposed: Tensor, base: Tensor) -> Alignment:
    """Undo the scramble with the public base."""
    base = base / base.norm(dim=0)  # columns were equalised
    exposed, base = (m / m.norm(dim=1, keepdim=True) for m in (exposed, base))
    rows = torch.cdist(profile(exposed), profile(base)).argmin(1)
    for _ in range(6):
        columns = alike(exposed.abs().t(), base[rows].abs().t())
        rows = alike(exposed.abs(), base[:, columns].abs())
    product = exposed * base[rows][:, columns]
    t = torch.ones(product.shape[1], dtype=torch.float64)
    for _ in range(10):  # signs s_a t_b
        s = torch.sign(product @ t)
        t = torch.sign(s @ product)
    aligned = torch.zeros_like(exposed)
    aligned[rows[:, None], columns[None, :]] = exposed * s[:, None] * t
    return Alignment(rows, columns, aligned)


def truth(bundle: Bundle, group: int) -> tuple[Tensor, Tensor]:
    """ρ and κ, from the trusted half."""
    held: dict[str, Tensor] = load_file(bundle.trusted / f"model-{group + 1:05d}.safetensors")
    places = torch.cat([held[f"{name}.row_gather"][0] for name in GROUPS[group]]).long()
    return torch.argsort(places), held[f"{GROUPS[group][0]}.column_gather"][0].long()


def found(alignment: Alignment, bundle: Bundle, group: int) -> tuple[float, float]:
    """Shares of rows and columns that were found."""
    rows, columns = truth(bundle, group)
    return float((alignment.rows == rows).double().mean()), float((alignment.columns == columns).double().mean())


@pytest.mark.parametrize("group", [0, 6])  # the head, of which the budget keeps most secret, would need a better start than sorted entries
def test_a_public_relative_undoes_the_scramble(group: int) -> None:
    """The weakened system: a fine-tune that was split as a private model."""
    bundle = split_as_private()
    rows, columns = found(align(codes(bundle, group), stacked(demo_model_path(), group)), bundle, group)
    assert rows > 0.9 and columns > 0.9  # 0.943 was seen once: keys are random


def test_the_attack_finds_nothing_without_a_relative() -> None:
    """The same attack with a model of the same shape that has nothing to do with it: chance."""
    bundle = split_as_private()
    stranger = torch.randn(stacked(demo_model_path(), 0).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = found(align(codes(bundle, 0), stranger), bundle, 0)
    assert rows < 0.05 and columns < 0.05


@pytest.mark.parametrize("group", GROUPS)
def test_a_fine_tune_inside_the_secret_rank_is_not_exposed(group: int) -> None:
    """The codes are the base's own: whatever is computed from them could have been computed without them."""
    base = prepared_base()
    apart = (codes(split_from_its_base(2 * RANK), group) - codes(base, group)).abs()
    # The fine-tune was rounded to bf16, which no rank takes away: less than a unit of int8, so that some codes are on the other side of a
    # boundary (5 % of them here; in float32 fewer than one in 10,000: tests/slip/test_public_relative.py).
    assert float(apart.max()) <= 1 and float(apart.count_nonzero()) / apart.numel() < 0.1
    difference = stacked(tuned(), group) - stacked(demo_model_path(), group)
    assert (
        seen(codes(split_from_its_base(2 * RANK), group) - codes(base, group), difference, group) < 0.06
    )  # RANK of 256 directions: 0.016 is chance


@pytest.mark.parametrize("group", GROUPS)
def test_what_lies_beyond_the_secret_rank_is_exposed(group: int) -> None:
    """The weakened system: with half the rank half of the fine-tune is there, as the summary says."""
    base, bundle = prepared_base(), split_from_its_base(RANK // 2)
    difference = stacked(tuned(), group) - stacked(demo_model_path(), group)
    assert seen(codes(bundle, group) - codes(base, group), difference, group) > 0.1
    assert 0.4 < bundle.manifest.summary["secret_energy"] < 0.8


@functools.cache
def prepared_base() -> Bundle:
    """What anybody can make."""
    return prepare_slip(demo_model_path(), scratch() / "demo-base", SlipConfig(secret_fraction=0, scramble="none"))


def seen(change: Tensor, difference: Tensor, group: int) -> float:
    """Share of the fine-tune's row space that the changed codes hold, of its RANK directions: |V' V|² / RANK by the top RANK ones."""
    if not change.any():
        return 0.0
    base = stacked(demo_model_path(), group)
    equalised = change * (base.norm(dim=0) / base.norm(dim=0).mean())
    secret = torch.linalg.svd(difference, full_matrices=False).Vh[:RANK]
    top = torch.linalg.svd(equalised, full_matrices=False).Vh[:RANK]
    return float((top @ secret.t()).square().sum()) / RANK
