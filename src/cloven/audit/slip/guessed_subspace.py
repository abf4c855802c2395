"""Is it enough to train the secret's free parameters, where the exposed half shows their subspace?

Adversary: A1 with data, in its best case: given embeddings, norms, biases and scales, the scramble and the rank k of every matrix.
Method: W = E + B A. Whoever knows the row space of A has only B [N, k] to learn. The attacker takes the k right singular vectors at the
    bottom of E's spectrum for it, where a plain SVD split has its hole, starts from B = 0, and trains B alone.
Success: as for recovery by training.
Weakened: the plain SVD split, without the decoy: its hole is the subspace.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from cloven.audit.slip.null_space import hollow
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.audit.slip.training import Start


class _Inside(nn.Module):
    """W ↦ W + B A with A [k, K] fixed; B begins at zero."""

    def __init__(self, a: Tensor, rows: int) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(torch.zeros(rows, len(a)))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + self.b @ self.a


def guessed(exposed: Tensor, k: int) -> Tensor:
    """The k right singular vectors of E at the bottom: float32 [k, K]."""
    vt: Tensor = torch.linalg.svd(exposed, full_matrices=exposed.shape[0] < exposed.shape[1])[2]
    return vt[len(vt) - k :].contiguous()


def inside_a_guess(subject: Subject) -> Start:
    """The attack on the bundle."""
    return Start(lambda: _with_guesses(subject, {(g, p): g.exposed[rows] for g in subject.groups for p, (_, rows) in enumerate(g.parts)}))


def inside_a_hole(subject: Subject) -> Start:
    """The same on a split without the decoy."""

    def model() -> PreTrainedModel:
        return _with_guesses(
            subject,
            {
                (group, part): hollow(group.weight(part), member.secret_a.shape[0], group.terms).float()
                for group in subject.groups
                for part, (member, _) in enumerate(group.parts)
            },
        )

    return Start(model)


def _with_guesses(subject: Subject, exposed: dict[tuple[AttackedGroup, int], Tensor]) -> PreTrainedModel:
    model = subject.with_matrices(lambda group, part: exposed[group, part])
    for (group, part), matrix in exposed.items():
        member = group.parts[part][0]
        if k := member.secret_a.shape[0]:
            inside = _Inside(guessed(matrix, k), member.out_features)
            parametrize.register_parametrization(model.get_submodule(member.name), "weight", inside)
    return model
