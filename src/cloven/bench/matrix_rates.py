"""What the machine's matrix products reach by themselves, in a process of its own, see `cloven.bench.commands`.

    python -m cloven.bench.matrix_rates SHAPE

Command: {"op": "products", "rows": M}: seconds for x [M, K] times each matrix [N, K] of one decoder layer, matrices that share x stacked as
the worker has them, and of the head:

    bf16     torch.nn.functional.linear, weights as the unsplit model has them: the layer only, since a prefill needs one row of the head
    int8     torch._int_mm, int8 in, int32 out, into memory that is there already: what a plain int8 product reaches
    exact    the back end's product of residues (`cloven.field.selection`): four int8 products, combined and reduced
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from cloven.bench.commands import answer_commands, claim_output
from cloven.bench.runner_process import median_of
from cloven.field.products import DIGITS, multiply
from cloven.field.residues import H
from cloven.field.selection import select_backend
from cloven.zoo.shapes import linear_parameters, shape_config

OPERATIONS = ("products",)


class Products:
    """One decoder layer's matrices and the head's, random."""

    def __init__(self, config: LlamaConfig) -> None:
        self._generator = torch.Generator().manual_seed(0)  # no secrets in here
        self._backend = select_backend("cpu")
        self.layer, self.head = [self._codes(*shape) for shape in layer_shapes(config)], self._codes(config.vocab_size, config.hidden_size)
        self._scratch = torch.zeros(0, dtype=torch.int32)
        self._bf16 = [torch.nn.Parameter(codes.to(torch.bfloat16)) for codes in self.layer]  # without gradients, linear is slower

    def _codes(self, rows: int, columns: int) -> Tensor:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=self._generator)

    @torch.no_grad()
    def products(self, rows: int) -> dict[str, Any]:
        """Seconds, by name. The first call's are longer: its memory is fresh."""
        layer, head = self.layer, [self.head]
        if self._scratch.numel() < (most := rows * max(len(w) for w in (*layer, *head))):
            self._scratch = torch.zeros(most, dtype=torch.int32)
        scratch = self._scratch
        x = {k: torch.randn(rows, k, generator=self._generator).to(torch.bfloat16) for k in {w.shape[1] for w in layer}}
        small = {
            w.shape[1]: torch.randint(-128, 128, (rows, w.shape[1]), dtype=torch.int8, generator=self._generator) for w in (*layer, *head)
        }
        residues = {k: torch.randint(-H, H + 1, (rows, k), dtype=torch.int32, generator=self._generator) for k in small}

        def int8(w: Tensor) -> None:
            torch._int_mm(small[w.shape[1]], w.t(), out=scratch[: rows * len(w)].view(rows, len(w)))

        def exact(w: Tensor) -> None:
            multiply(self._backend, residues[w.shape[1]], self._backend.place(w))

        return {
            "bf16": _seconds(lambda w: torch.nn.functional.linear(x[w.shape[1]], w), self._bf16),
            "int8": _seconds(int8, layer),
            "exact": _seconds(exact, layer),
            "int8_head": _seconds(int8, head),
            "exact_head": _seconds(exact, head),
        }


def layer_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """[N, K] of a decoder layer's groups: q, k and v; o; gate and up; down."""
    d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(heads + 2 * kv, d), (d, heads), (2 * f, d), (d, f)]


def _seconds(product: Callable[[Tensor], object], matrices: Sequence[Tensor]) -> list[float]:
    started = time.perf_counter()
    for w in matrices:
        product(w)
    return [time.perf_counter() - started]


@dataclass(frozen=True)
class RateFigures:
    """Medians of one run, of multiplications and additions per second; the exact product counts as the four int8 products that it is.

    `floor` is the least that a split prefill costs if the unsplit model's is nothing but bf16 products: four int8 products for each, times
    the int8 terms, at the rate of the faster of int8 and exact. `pad_floor_seconds` is the same for the pads of one row in every group,
    the head's among them.
    """

    bf16_operations_per_s: float
    int8_operations_per_s: float
    exact_operations_per_s: float
    floor: float
    pad_floor_seconds: float


def rate_figures(config: LlamaConfig, rows: int, terms: int, results: list[dict[str, Any]]) -> RateFigures:
    """What the rounds gave.

    Args:
        config: of the model that was measured, with its number of layers.
        terms: of the exposed matrices.
    """
    bf16, int8, exact, int8_head, exact_head = (median_of(results, name) for name in ("bf16", "int8", "exact", "int8_head", "exact_head"))
    layer, head = min(DIGITS * int8, exact), min(DIGITS * int8_head, exact_head)
    operations = 2 * rows * linear_parameters(config)[0]
    return RateFigures(
        bf16_operations_per_s=operations / bf16,
        int8_operations_per_s=operations / int8,
        exact_operations_per_s=DIGITS * operations / exact,
        floor=terms * layer / bf16,
        pad_floor_seconds=terms * (config.num_hidden_layers * layer + head) / rows,
    )


def main() -> None:
    """Make random matrices, then answer commands."""
    answers = claim_output()
    answer_commands(Products(shape_config(sys.argv[1], 1)), OPERATIONS, answers)


if __name__ == "__main__":
    main()
