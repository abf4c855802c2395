"""Attacks on a private-LoRA bundle, on its own matrices: what clients get out of answers, and what the server gets out of queries.

Every attack also runs on a system without the protection, where it must succeed (`weakened_value`). Nothing is charged to the ledger: the
attacks ask a copy of the server's arithmetic, as often as the budget allows or, where it says so, without a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cloven.audit.attack import Attack, Verdict, verdict_of
from cloven.audit.fhe import division
from cloven.audit.linear_algebra import solve_left
from cloven.errors import ForeignBundle
from cloven.field.codec import encode
from cloven.field.products import multiply
from cloven.field.residues import H, P, add, centre, subtract
from cloven.field.selection import select_backend
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import LweParameters
from cloven.masks.public_matrix import a_pub
from cloven.private_lora.config import revealed_share
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ClientGroup, ServerManifest, read_client
from cloven.private_lora.messages import rounded, unrounded
from cloven.private_lora.names import hint_name
from cloven.private_lora.server import server_matrices
from cloven.private_lora.session import client_tensors, remote_bounds

SCHEME = "private-lora/lwe"
_CLIENT = "a client that wants the adapter"
_SERVER = "a server that wants the input"
_TRIES = 200
_REPEATS = 64
_CODES = 255  # values of an int8 weight
_SHOWN_COLUMNS = 1024  # of wider matrices the attacks show this many: the others are alike


@dataclass(frozen=True)
class Target:
    """One group under attack: W' int8 [N, D] as the server holds it, and what a client holds."""

    matrix: Tensor = field(repr=False)
    hint: Tensor = field(repr=False)
    group: ClientGroup
    parameters: LweParameters
    bits: int
    budget: int

    @property
    def codes(self) -> Tensor:
        """W, int8 [N, K]: what the client wants."""
        return self.matrix[:, self.parameters.pad_columns :]

    def answer(self, c: Tensor) -> Tensor:
        """What the server answers to residues c int32 [M, D], unrounded to the middles of the intervals: int32 [M, N]."""
        return self.rounded(multiply(select_backend("cpu"), c, select_backend("cpu").place(self.matrix)))

    def rounded(self, z: Tensor) -> Tensor:
        """What is left of residues z when they are rounded to `bits`."""
        return unrounded(rounded(z, self.bits), z.shape[0], z.shape[1], self.bits)


def audit_private_lora(out: Path) -> list[Attack]:
    """Attack the narrowest group of a bundle.

    Args:
        out: OUT of `prepare private-lora`, both halves: the owner audits.

    Raises:
        BadBundle, ForeignBundle: a half is missing, or they do not belong together.
    """
    target = open_target(out)
    generator = torch.Generator().manual_seed(0)  # of the attackers' choices: no secrets
    return [
        *regression(target, generator),
        averaging(target, generator),
        unit_queries(target),
        packing(target),
        hint_inversion(target),
        distinguish(target, generator),
        *division(target.codes),
    ]


def open_target(out: Path) -> Target:
    """The narrowest group: it needs the fewest answers."""
    client, server = read_client(out / "client"), ServerManifest.read(out / "server")
    if client.bundle != server.bundle:
        raise ForeignBundle(f"{out}: the halves are of two bundles, {client.bundle} and {server.bundle}")
    tensors = client_tensors(out / "client", client)
    ledger = Ledger(server.ledger_path(out / "server"), server.adapter)
    budget, _ = ledger.budget()
    ledger.close()
    index = min(range(len(client.groups)), key=lambda i: client.groups[i].columns)
    matrix = server_matrices(out / "server", server)[index]
    return Target(matrix, tensors[hint_name(index)], client.groups[index], client.parameters, client.bits, budget)


def _honest(target: Target, x: Tensor) -> Tensor:
    """What an honest client decodes for rows x float64 [M, K]: W x in the units of x, float64 [M, N]."""
    noise = target.parameters.noise(target.group.l2, target.bits)
    x_int, alpha = encode(x, remote_bounds(target.group), noise)
    masks = LweMasks(target.hint, target.matrix.shape[1], target.parameters, select_backend("cpu"))
    pads = masks.take(len(x))
    y = pads.unmask(target.answer(pads.mask(torch.nn.functional.pad(x_int, (target.parameters.pad_columns, 0)))))
    return y.double() / alpha


def regression(target: Target, generator: torch.Generator) -> list[Attack]:
    """Least squares on honest answers, for a quarter, one half and all of the columns' number of queries, the budget, and without one."""
    columns = target.codes.shape[1]
    w = target.codes.double()

    def recovered(queries: int) -> float:
        x = torch.randn(queries, columns, dtype=torch.float64, generator=generator)
        estimate = torch.linalg.lstsq(x, _honest(target, x), driver="gelsd").solution.t()
        return max(0.0, 1 - float((estimate - w).square().sum() / w.square().sum()))

    unlimited = recovered(2 * columns)
    result = []
    for name, queries in (
        ("quarter", columns // 4),
        ("half", columns // 2),
        ("all", columns),
        ("budget", min(target.budget, 2 * columns)),
    ):
        value = recovered(queries)
        result.append(
            Attack(
                f"regression_{name}",
                SCHEME,
                _CLIENT,
                f"1 − relative squared error of the weights, least squares on {queries} honest answers (weakened: no budget)",
                value,
                queries / columns if queries < columns else 1.0,
                unlimited,
                queries,
                "broken" if value >= 0.9 else "measured",  # a fraction of the columns' number gives that fraction
            )
        )
    return result


def averaging(target: Target, generator: torch.Generator) -> Attack:
    """The same query again and again: how much of the squared rounding error averaging takes away. Weakened: answers with fresh noise."""
    c = torch.randint(-H, H + 1, (1, target.matrix.shape[1]), dtype=torch.int32, generator=generator)
    exact = multiply(select_backend("cpu"), c, select_backend("cpu").place(target.matrix))

    def remaining(answer: Callable[[], Tensor]) -> float:
        errors = [subtract(answer(), exact).double() for _ in range(_REPEATS)]
        return float(torch.stack(errors).mean(0).square().mean() / torch.stack(errors).square().mean())

    def noisy() -> Tensor:
        step = 2.0 ** (31 - target.bits)
        dither = (torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 0.5) * 2 * step
        return target.rounded(centre(exact.long() + dither.round().long()))

    value, weakened = 1 - remaining(lambda: target.answer(c)), 1 - remaining(noisy)
    metric = f"share of the squared rounding error that averaging {_REPEATS} answers to one query takes away"
    return Attack("averaging", SCHEME, _CLIENT, metric, value, 0.0, weakened, _REPEATS, verdict_of(value, 0.0, _REPEATS))


def unit_queries(target: Target) -> Attack:
    """One weight of every row per answer: c = ⌊p/255⌋·e_i, far above the norm of honest queries. As many as the budget allows."""
    codes = target.codes
    count = min(codes.shape[1], _SHOWN_COLUMNS, target.budget)
    step = P // _CODES
    c = torch.zeros(count, target.matrix.shape[1], dtype=torch.int32)
    c[torch.arange(count), target.parameters.pad_columns + torch.arange(count)] = step
    table = centre(torch.arange(-127, 128) * step)
    found = _nearest(target.answer(c), table) - 127
    exact = float((found.t() == codes[:, :count]).double().mean())
    return _fraction(target, "unit_queries", "large unit vectors: one weight of every row per answer", exact, count, count)


def packing(target: Target) -> Attack:
    """As many weights per answer as b bits hold: c = Σ_k ⌊p/255^k⌋·e_{i+k}, through the wrap. As many as the budget allows."""
    codes = target.codes
    each = max(1, target.bits // 8)
    answers = min(min(codes.shape[1], _SHOWN_COLUMNS) // each, target.budget)
    steps = [P // _CODES ** (k + 1) for k in range(each)]
    c = torch.zeros(answers, target.matrix.shape[1], dtype=torch.int32)
    for k, step in enumerate(steps):
        c[torch.arange(answers), target.parameters.pad_columns + each * torch.arange(answers) + k] = step
    weights = torch.cartesian_prod(*[torch.arange(-127, 128)] * each).view(-1, each)  # [255^each, each]
    table = centre((weights * torch.tensor(steps)).sum(1))
    found = weights[_nearest(target.answer(c), table)]  # [answers, N, each]
    exact = float((found.permute(1, 0, 2).reshape(len(codes), -1) == codes[:, : each * answers]).double().mean())
    return _fraction(target, "packing", f"{each} weights of every row per answer, through the wrap", exact, each * answers, answers)


def _fraction(target: Target, name: str, what: str, exact: float, shown: int, answers: int) -> Attack:
    """`exact`: share of the `shown` columns that `answers` answers gave exactly; the rest of the budget goes on like that."""
    columns = target.codes.shape[1]
    value = exact * min(1.0, target.budget * (shown / answers) / columns)
    bound = revealed_share(target.budget, columns, target.bits, 8.0)
    metric = f"fraction of the weights exact, within the budget of {target.budget:,} answers ({what}); chance: the information bound"
    return Attack(name, SCHEME, _CLIENT, metric, value, bound, exact, shown, "broken" if value >= 0.5 else "measured")


def _nearest(z: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of `table` (residues [T]) that is nearest to each z (residues [M, N]) on the circle of residues."""
    order = torch.argsort(table)
    ordered = table[order].long()
    circle = torch.cat([ordered[-1:] - P, ordered, ordered[:1] + P])
    place = torch.searchsorted(circle, z.long()).clamp(1, len(circle) - 1)
    left = (z.long() - circle[place - 1]).abs() <= (circle[place] - z.long()).abs()
    return order[(place - left.long() - 1) % len(table)]


def hint_inversion(target: Target) -> Attack:
    """Solve W A = H for W by linear algebra, as if there were no pad. Weakened: a hint without one."""
    columns = min(target.codes.shape[1], 512)
    codes, known = target.codes[:, :columns], target.codes[:, columns:]
    first = target.parameters.pad_columns
    rows = a_pub(target.matrix.shape[1])[first:, :columns]
    a = rows[:columns]  # square: as many equations as unknowns

    def product(part: Tensor, weights: Tensor) -> Tensor:
        return multiply(select_backend("cpu"), part.t().contiguous(), select_backend("cpu").place(weights.contiguous())).t()

    def recovered(hint: Tensor) -> float:
        rest = subtract(hint, product(rows[columns:], known).contiguous()) if known.shape[1] else hint
        return float((solve_left(a, rest) == codes.long()).double().mean())

    value = recovered(target.hint[:, :columns].contiguous())
    weakened = recovered(product(rows, target.codes).contiguous())
    chance, tries = 1 / P, codes.numel()
    metric = f"fraction of {columns} columns' weights that follow from the hint by linear algebra, all other columns known"
    return Attack("hint_inversion", SCHEME, _CLIENT, metric, value, chance, weakened, tries, verdict_of(value, chance, tries))


def distinguish(target: Target, generator: torch.Generator) -> Attack:
    """Which of two known inputs was asked, by correlation with their difference. Weakened: an earlier query had the same (s, e)."""
    x = torch.randn(2, target.codes.shape[1], dtype=torch.float64, generator=generator)
    x_int, _ = encode(x, remote_bounds(target.group), target.parameters.noise(target.group.l2, target.bits))
    rows = torch.nn.functional.pad(x_int, (target.parameters.pad_columns, 0))
    coins = torch.randint(0, 2, (_TRIES,), generator=generator)
    masks = LweMasks(target.hint, target.matrix.shape[1], target.parameters, select_backend("cpu"))
    difference = (rows[1] - rows[0]).double()
    middle = (rows[1].double() + rows[0].double()) / 2

    def guessed(seen: Tensor) -> float:
        guesses = ((seen.double() - middle) @ difference > 0).long()
        return float((guesses == coins).double().mean())

    value = guessed(masks.take(_TRIES).mask(rows[coins]))
    earlier = masks.take(_TRIES).mask(torch.zeros_like(rows[coins]))  # a query for zeros: the bare mask
    weakened = guessed(subtract(add(rows[coins], earlier), earlier))
    metric = "fraction of queries told apart, of two inputs that the server knows"
    return Attack("distinguish", SCHEME, _SERVER, metric, value, 0.5, weakened, _TRIES, _coin_verdict(value, _TRIES))


def _coin_verdict(value: float, tries: int) -> Verdict:
    return "holds" if abs(value - 0.5) <= 4 * (0.25 / tries) ** 0.5 else "broken"
