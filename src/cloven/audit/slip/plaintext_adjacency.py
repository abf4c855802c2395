"""Does what the worker sees go together with what comes out of a layer?

Adversary: A1, with everything that it received.
Method: whoever has the plaintext input and output of a split layer solves for its secret part by linear algebra. The attacker takes the
    masked rows of one group for inputs and the masked rows of the next group for outputs, and solves by least squares.
Success: the share of the secret part B A that is recovered: 1 − ‖recovered − B A‖ / ‖B A‖ after the best scale.
Weakened: the same rows without masks.
Source: known for SLIP-like schemes; design of the project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.field.codec import encode, row_bounds
from cloven.field.residues import add
from cloven.masks.one_time import PadKey

MOST_COLUMNS = 1024  # of a layer: it takes as many tokens
_MORE = 1.1  # rows per column


def solve(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The matrix that maps the inputs [T, K] to the outputs [T, N], by least squares: [N, K]."""
    solution: Tensor = torch.linalg.lstsq(inputs.double(), outputs.double()).solution
    return solution.t()


def recovered_share(found: Tensor, secret: Tensor) -> float:
    """1 − the relative error after the best scale, at least 0."""
    scale = (found * secret).sum() / (found * found).sum().clamp_min(1e-300)
    return max(0.0, 1 - float(torch.linalg.norm(scale * found - secret) / torch.linalg.norm(secret)))


def _rows_into(subject: Subject, group: AttackedGroup) -> tuple[Tensor, Tensor]:
    """Plaintext (input, output of the first member) of a group over enough random tokens, float64."""
    module, caught = subject.plain.get_submodule(group.parts[0][0].name), []
    hook = module.register_forward_hook(lambda _m, arguments, output: caught.append((arguments[0], output)))
    try:
        needed, random = int(_MORE * group.codes.shape[1]) + 8, subject.random("adjacency")
        while sum(len(x) for x, _ in caught) < needed or not caught:
            ids = torch.randint(int(subject.plain.config.get_text_config().vocab_size), (1, 128), generator=random)
            before = len(caught)
            subject.plain(input_ids=ids, use_cache=False)
            caught[before:] = [(x.flatten(0, -2), y.flatten(0, -2)) for x, y in caught[before:]]
    finally:
        hook.remove()
    return torch.cat([x for x, _ in caught]).double(), torch.cat([y for _, y in caught]).double()


@torch.no_grad()
def plaintext_adjacency(subject: Subject) -> list[Attack]:
    """See the module."""
    candidates = [group for group in subject.groups if group.codes.shape[1] <= MOST_COLUMNS and group.parts[0][0].secret_a.shape[0]]
    if not candidates:
        return []
    group = max(candidates, key=lambda one: one.parts[0][0].secret_a.shape[0])
    member, rows = group.parts[0]
    secret, exposed = (member.secret_b @ member.secret_a).double(), group.exposed[rows].double()
    x, y = _rows_into(subject, group)
    y = y - (member.bias.double() if member.bias is not None else 0.0)
    leaked = recovered_share(solve(x, y) - exposed, secret)
    inputs, _ = encode(x, row_bounds(group.codes))
    outputs, _ = encode(y, row_bounds(torch.ones(1, y.shape[1], dtype=torch.int8)))  # as some next layer's input
    key = PadKey()
    c, c_next = (add(values, key.residues(number, 0, *values.shape)) for number, values in enumerate((inputs, outputs)))
    value = recovered_share(solve(c, c_next) - exposed, secret)
    metric = f"share of the secret part of {member.name} recovered from {len(x)} rows of it and of what follows"
    adversary = "A1, with all that it received"
    return [Attack("plaintext_adjacency", subject.scheme, adversary, metric, value, 0.0, leaked, len(x), verdict_of(value, 0.0, len(x)))]
