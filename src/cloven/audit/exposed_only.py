"""What the exposed half is worth to the worker (A1), or to a thief of it: the split model with zero in the place of the secret part.

The thief is given for free, on top of OUT/exposed:

    always           the architecture, which matrix is which linear's, and everything of OUT/trusted that is not split: embeddings, norms,
                     biases; of every matrix the size of its rows' scales, in the model's order
    knows_scramble   also the scramble of rows and columns, the columns' scales and, with int8x2, which row is of which term: all of
                     OUT/trusted but the secret factors A and B. The worst case: what the secret part alone withholds.

Without the scramble's keys it takes the first N rows as they lie, and the columns as they lie, for the matrix. It does not train: what it
can do with data and time is another attack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloven.bundle.bundle import Bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.slip.layer import Product, SplitGroup
from cloven.slip.split_model import groups_of

_ROWS_AT_A_TIME = 4096


def exposed_model(bundle: Bundle, *, knows_scramble: bool) -> PreTrainedModel:
    """The exposed half of a bundle alone, in float32: see `exposed_only`."""
    model = AutoModelForCausalLM.from_pretrained(bundle.trusted, dtype=torch.float32)
    return exposed_only(model, ExposedCopy(bundle.exposed, bundle.manifest), knows_scramble=knows_scramble)


@torch.no_grad()
def exposed_only(model: PreTrainedModel, exposed: ExposedCopy, *, knows_scramble: bool) -> PreTrainedModel:
    """A model that computes with the exposed matrices alone, in this process, without a worker.

    Args:
        model: OUT/trusted as loaded; it is not changed, and its embeddings, norms and scales are shared, not copied.
        exposed: its exposed half; every matrix is hashed once, then read from disk as it is needed.
        knows_scramble: whether the thief has the scramble's keys and all scales.

    Raises:
        BadInput: the model is not split by SLIP.  TamperedBundle: a matrix.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    for group in groups_of(twin):
        exposed.verified(group.index)
        for member in group.members:
            member.secret_a = _constant(torch.empty(0, member.in_features))
            member.secret_b = _constant(torch.empty(member.out_features, 0))
        if not knows_scramble:
            _take_as_it_lies(group)
        rows = sum(member.row_gather.numel() for member in group.members)  # of the codes: all, or the first N
        group.attach(_product(exposed, group.index, rows))
    return twin


def _take_as_it_lies(group: SplitGroup) -> None:
    leader, start = group.members[0], 0
    rows = torch.ones(leader.mixing_scale.shape[1]) if not len(leader.mixing_scale) else leader.mixing_scale[-1].abs()
    leader.column_gather = _constant(torch.arange(leader.in_features, dtype=torch.int32)[None])
    leader.column_scale = _constant(torch.ones(1, leader.in_features))
    leader.mixing_gather, leader.mixing_scale = (_constant(empty[:0]) for empty in (leader.mixing_gather, leader.mixing_scale))
    for member in group.members:
        part = slice(start, start + member.out_features)
        member.row_gather = _constant(torch.arange(part.start, part.stop, dtype=torch.int32)[None])
        member.row_scale = _constant(member.row_scale[:1].abs() * rows[part])
        start += member.out_features


def _product(exposed: ExposedCopy, index: int, count: int) -> Product:
    """The worker's product with the first rows of its matrix, unmasked, in float32: some rows at a time."""

    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        meanwhile()
        rows = exposed.mapped(index)[:count].split(_ROWS_AT_A_TIME)
        return torch.cat([x.float() @ part.float().t() for part in rows], dim=1).double()

    return product


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
