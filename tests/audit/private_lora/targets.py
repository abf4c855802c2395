"""Bundles of a tiny model that are audited once, and single matrices under attack."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.findings import Findings
from cloven.audit.private_lora.audit import audit_private_lora
from cloven.audit.private_lora.subject import Target
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.masks.public_matrix import a_pub
from cloven.private_lora.manifest import ClientGroup, ClientModule
from cloven.private_lora.prepare import with_pad
from tests.lora_bundles import own_bundle
from tests.split_models import scratch

COLUMNS = 48  # of the narrowest group of the tiny Llama
WIDE = 10_000
SMALL = 8


@functools.cache
def bundle(budget: int, bits: int = 16, hint: str = "lwe") -> Path:
    out = scratch() / f"audit-{budget}-{bits}-{hint}"
    with patch.dict(os.environ, {"CLOVEN_STATE": str(state_of(out))}):
        return own_bundle(out, budget=budget, bits=bits, hint=hint)


def state_of(out: Path) -> Path:
    return scratch() / f"state-{out.name}"


@functools.cache
def findings(budget: int, bits: int = 16, hint: str = "lwe") -> Findings:
    out = bundle(budget, bits, hint)
    with patch.dict(os.environ, {"CLOVEN_STATE": str(state_of(out))}):
        return audit_private_lora(out)


def audited(budget: int, bits: int = 16, hint: str = "lwe") -> dict[str, Attack]:
    """By name."""
    return {attack.name: attack for attack in findings(budget, bits, hint).attacks}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=generator(seed)).to(torch.int8)


def target(rows: int = 4, columns: int = COLUMNS, budget: int = WIDE, bits: int = 16, hint: str = "lwe", seed: int = 0) -> Target:
    """A random matrix, padded and hinted as `prepare` does it; attackers' choices begin anew."""
    codes = codes_of(rows, columns, seed)
    matrix, published = _padded(rows, columns, hint, seed)
    group = ClientGroup(columns, int(codes.double().norm(dim=1).max()) + 1, (ClientModule("layer", 16, rows // 2),))
    return Target(matrix, published, group, lwe_parameters(hint), bits, budget)


@functools.cache
def _padded(rows: int, columns: int, hint: str, seed: int) -> tuple[Tensor, Tensor]:
    parameters = lwe_parameters(hint)
    return with_pad(codes_of(rows, columns, seed), parameters, a_pub(parameters.pad_columns + columns).t().contiguous())


class Elsewhere(Target):
    """A server that answers with another matrix than the one that the client wants."""

    def answer(self, c: Tensor) -> Tensor:
        """See `Target.answer`."""
        return target(seed=1).answer(c)
