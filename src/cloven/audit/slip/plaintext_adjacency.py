"""Does what the worker sees go together with what comes out of a layer?

Adversary: A1, with everything that it received.
Method: whoever has the plaintext input and output of a split layer solves for its secret part by linear algebra. A real worker records
    real passes; the attacker takes its rows of one group for inputs and those of the next group for outputs, in the true order of their
    columns, and solves by least squares.
Success: the share of the secret part B A that is recovered: 1 − ‖recovered − B A‖ / ‖B A‖ after the best scale.
Weakened: plaintext pairs, leaked on purpose.
Source: known for SLIP-like schemes; design of the project.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.recording import record
from cloven.audit.slip.scrambled import columns_of
from cloven.audit.slip.subject import AttackedGroup, Subject

MOST_COLUMNS = 1024  # of a layer: it takes as many tokens
_MORE = 1.1  # rows per column
_TOKENS = 64  # of a recorded sequence


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


def pair_of(subject: Subject) -> tuple[AttackedGroup, AttackedGroup] | None:
    """The group with most secret directions in its first linear, and the one after it, whose input follows from its output."""
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(subject.groups)
        if first.codes.shape[1] <= MOST_COLUMNS and first.parts[0][0].secret_a.shape[0]
    ]
    return max(pairs, key=lambda pair: pair[0].parts[0][0].secret_a.shape[0], default=None)


def recorded(subject: Subject, group: AttackedGroup, second: AttackedGroup) -> tuple[Tensor, Tensor]:
    """What a real worker received for both groups, in the model's own basis (the worst case), float64."""
    needed, vocabulary = int(_MORE * group.codes.shape[1]) + 8, int(subject.plain.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (-(-needed // _TOKENS), _TOKENS), generator=subject.random("adjacency, recorded"))
    (seen,) = record(subject, ids, 1)
    first, following = (seen[one.group.index].double() @ columns_of(one.matrix).double() for one in (group, second))  # (C S)⁻¹ c
    return first, following


@torch.no_grad()
def plaintext_adjacency(subject: Subject) -> list[Attack]:
    """See the module."""
    pair = pair_of(subject)
    if pair is None:
        return []
    group, second = pair
    member, rows = group.parts[0]
    secret, exposed = (member.secret_b @ member.secret_a).double(), group.exposed[rows].double()
    x, y = _rows_into(subject, group)
    y = y - (member.bias.double() if member.bias is not None else 0.0)
    leaked = recovered_share(solve(x, y) - exposed, secret)
    c, c_next = recorded(subject, group, second)
    width = min(len(secret), c_next.shape[1])
    found = solve(c, c_next[:, :width])
    value = max(recovered_share(found, secret[:width]), recovered_share(found - exposed[:width], secret[:width]))
    metric = f"share of the secret part of {member.name} recovered from {len(c)} rows that a worker received for it and for what follows"
    adversary = "A1, with all that it received"
    return [Attack("plaintext_adjacency", subject.scheme, adversary, metric, value, 0.0, leaked, len(c), verdict_of(value, 0.0, len(c)))]
