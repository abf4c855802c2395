"""A linear layer split by SLIP, as the trusted process runs it.

    y = W x + b = (E x) + B (A x) + b
        E x   the worker's part, for all linears that share x in one exchange: masked, verified, exact integers
        B A   the secret part, W − E, rank k: float32, computed while the worker works

Parties: the trusted process holds A [k, K], B [N, k], scales, permutations, biases and x; the worker holds int8 codes of E, scrambled.
Guarantee: W − E never leaves this process; the worker sees one-time-padded x (`cloven.offload`). Not hidden: what E gives away of W
(measured by the audit), the number of rows and their times. Source: SLIP, arXiv 2407.10886.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cloven.errors import NotAttached
from cloven.field.hadamard import Places, Units, block_of, turn, turn_onto
from cloven.field.native.exchange import FusedExchange
from cloven.field.native.library import KINDS, kernels_in_use
from cloven.field.native.low_rank import LowRank
from cloven.field.residues import row_blocks
from cloven.model.shared_input import SharedInput
from cloven.slip.mixing import Mixing

_ROWS_AT_A_TIME = 32  # keeps float64 intermediates in the cache
Product = Callable[[Tensor, Callable[[], None]], Tensor]
Fused = Callable[[Tensor, FusedExchange, Tensor, Callable[[Tensor], None]], bool]  # x, passes, out, meanwhile


class SplitLinear(nn.Module):
    """One linear layer of a group, with the trusted process's tensors.

    Args:
        name: the module's name in the model.
        rows, columns: N and K of the layer.
        rank: k.
        terms: number of int8 terms of the exposed matrix.
        bias: whether there is one.
        rounds: of mixing.
        group_rows: of all linears of the group, where this is the first of them and carries what belongs to the group; else 0.

    `weight` is empty [0]: a directory opened without `import cloven` then fails with a size mismatch instead of running on random
    weights, and code that looks for a `weight` finds one on the right device.
    """

    def __init__(self, name: str, rows: int, columns: int, rank: int, terms: int, bias: bool, rounds: int, group_rows: int) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, columns, rows
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self.secret_a = _fixed(rank, columns, dtype=torch.float32)
        self.secret_b = _fixed(rows, rank, dtype=torch.float32)
        self.row_gather = _fixed(terms, rows, dtype=torch.int32)
        self.row_scale = _fixed(terms, rows, dtype=torch.float32)
        if group_rows:
            self.column_gather = _fixed(1 + rounds, columns, dtype=torch.int32)
            self.column_scale = _fixed(1 + rounds, columns, dtype=torch.float32)
            self.mixing_gather = _fixed(rounds, group_rows, dtype=torch.int32)
            self.mixing_scale = _fixed(rounds, group_rows, dtype=torch.float32)
        self.group: SplitGroup | None = None
        self.position = 0

    def extra_repr(self) -> str:
        """Shapes only."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.secret_a.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b: [..., K] -> [..., N], in the dtype of x."""
        if self.group is None:
            raise NotAttached(f"{self.name} is not part of a loaded split model; load OUT/trusted with from_pretrained")
        return self.group.output(self.position, x)

    def trusted_part(self, x: Tensor, out: Tensor) -> None:
        """Fill out, float32 [M, N] with rows of any distance, with B (A x) + b for float32 x [M, K]."""
        torch.mm(x @ self.secret_a.t(), self.secret_b.t(), out=out)
        if self.bias is not None:
            out += self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SplitLinear:
        """`model.to(dtype)` leaves the float32 factors and scales alone: rounding them would change tokens silently."""
        kept = {name: parameter.data for name, parameter in self.named_parameters(recurse=False) if name not in ("weight", "bias")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != original.dtype:
                parameter.data = original.to(parameter.device)
        if self.group is not None:
            self.group.place_factors()
        return self


class SplitGroup:
    """The linears of a group and, once a session is attached, their common exchange.

    Args:
        index: the group's number in the bundle.
        members: the linears, in the order of the bundle; the first one leads.
    """

    def __init__(self, index: int, members: list[SplitLinear]) -> None:
        self.index, self.members = index, members
        self.name = _join_names([member.name for member in members])
        self._widths = [member.out_features for member in members]
        self._product: Product | None = None
        self._low_rank: LowRank | None = None
        self._fused: tuple[Fused, FusedExchange] | None = None
        self._shared = SharedInput(self._compute)
        for position, member in enumerate(members):
            member.group, member.position = self, position

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitGroup:
        """A copy of the model starts without a session: pads and connections are not copied."""
        clone = SplitGroup.__new__(SplitGroup)
        memo[id(self)] = clone
        clone.members = copy.deepcopy(self.members, memo)
        clone.index, clone.name, clone._widths = self.index, self.name, self._widths
        clone._product, clone._low_rank, clone._fused = None, None, None
        clone._shared = SharedInput(clone._compute)
        return clone

    def attach(self, product: Product, fused: Fused | None = None) -> None:
        """Use `product(x, meanwhile)`: float64 [M, K] in the worker's basis -> float64 [M, T·N], for all later calls.

        With `fused`, see `OffloadedMatrix.fused`, this is asked first, where the kernels are there and there is one term. Replaces an
        earlier product, and with it whatever secrets it held.
        """
        leader = self.members[0]
        self._columns = leader.column_gather.numpy(), leader.column_scale.numpy()  # stages [1 + rounds, K]
        self._rows = Mixing(leader.mixing_gather, leader.mixing_scale)
        gather, scale = (torch.cat([getattr(member, name) for member in self.members], dim=1) for name in ("row_gather", "row_scale"))
        self._row_gather, self._row_scale = gather.long().numpy(), scale.double().numpy()  # [T, N of all members]
        self._one_term: tuple[Places, Units] | None = None  # stages [1 + rounds, N], where there is one term
        if len(gather) == 1:
            stages = torch.cat([gather, leader.mixing_gather]), torch.cat([scale, leader.mixing_scale])
            self._one_term = stages[0].numpy(), stages[1].numpy()
        kernels = kernels_in_use()
        self.place_factors()
        self._fused = None
        if fused is not None and kernels is not None and self._one_term is not None:
            blocks = block_of(leader.in_features), block_of(self._one_term[0].shape[1])
            self._fused = fused, FusedExchange(kernels, self._columns, self._one_term, blocks)
        self._product = product

    def place_factors(self) -> None:
        """Show the kernels, where there are any, where the members' factors and biases are now."""
        kernels, factors = kernels_in_use(), [(member.secret_a, member.secret_b, member.bias) for member in self.members]
        self._low_rank = LowRank.of(kernels, factors) if kernels is not None else None

    def stages(self) -> tuple[tuple[Places, Units], tuple[Places, Units]]:
        """How x gets into the worker's basis and the answer out of it (of one term), once a product is attached: for measurements."""
        assert self._one_term is not None
        return self._columns, self._one_term

    def passes(self) -> FusedExchange | None:
        """The passes before and after an exchange, where they are fused: for measurements."""
        return self._fused[1] if self._fused is not None else None

    def output(self, position: int, x: Tensor) -> Tensor:
        """The output of one member; the first sibling to be called computes for all."""
        return self._shared.output(position, x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _compute(self, x: Tensor) -> list[Tensor]:
        if self._product is None:
            raise NotAttached(
                f"{self.name}: no worker is attached: start `cloven worker`, then set CLOVEN_WORKER before loading, "
                "or call cloven.attach(model, ADDRESS)"
            )
        rows = x.detach().reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        outputs = torch.empty(rows.shape[0], sum(self._widths), dtype=x.dtype)
        if self._fused is not None and x.dtype in KINDS:
            (fused, passes), rows = self._fused, rows.contiguous()
            if fused(rows, passes, outputs, lambda total: self.secret_part(rows, total)):
                return self._split(outputs, x)
        total = torch.empty(outputs.shape, dtype=torch.float32)
        y = self._product(self._scrambled(rows), lambda: self.secret_part(rows, total))  # [M, T·N]
        if self._one_term is not None:
            turn_onto(y.numpy(), self._one_term, total, outputs)
        else:
            for y_rows, total_rows, out in row_blocks(_ROWS_AT_A_TIME, y, total, outputs):
                out.copy_(self._unscrambled(y_rows).add_(total_rows))
        return self._split(outputs, x)

    def secret_part(self, x: Tensor, total: Tensor) -> None:
        """Fill total, float32 [M, N of all members], with B (A x) + b of each, once a product is attached: x [M, K] of any real dtype."""
        if len(x) == 1 and self._low_rank is not None and x.dtype in KINDS:
            self._low_rank.onto(x.contiguous(), total)
            return
        x = x.float()
        with torch.autocast("cpu", enabled=False):
            for member, part in zip(self.members, total.split(self._widths, dim=1), strict=True):
                member.trusted_part(x, part)

    def _split(self, outputs: Tensor, x: Tensor) -> list[Tensor]:
        parts = outputs.split(self._widths, dim=1)
        return [part.contiguous().view(*x.shape[:-1], part.shape[1]) for part in parts]  # of no rows, too

    def _scrambled(self, rows: Tensor) -> Tensor:
        """[M, K] -> float64 [M, K] in the worker's basis."""
        return torch.from_numpy(turn(rows.double().contiguous().numpy(), *self._columns, leading=False))

    def _unscrambled(self, y: Tensor) -> Tensor:
        """What the worker's basis hides, of two terms: float64 [M, T·N] -> E x, float64 [M, N of all members]."""
        values = y.numpy()
        result = values.take(self._row_gather[0], axis=1)
        result *= self._row_scale[0]
        for gather, scale in zip(self._row_gather[1:], self._row_scale[1:], strict=True):
            result += values.take(gather, axis=1) * scale
        return torch.from_numpy(self._rows.apply(result))


def _fixed(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _join_names(names: list[str]) -> str:
    """model.layers.0.self_attn.q_proj, … -> model.layers.0.self_attn.{q_proj,k_proj,v_proj}."""
    if len(names) == 1:
        return names[0]
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) == 1:
        return f"{parents.pop()}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
    return "+".join(names)
