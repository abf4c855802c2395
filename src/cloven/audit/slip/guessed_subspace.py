"""Is it enough to train the secret's free parameters, where the exposed half shows their subspace?

Adversary: A1 with data, in its best case: given embeddings, norms, biases and scales, the scramble and the rank k of every matrix.
Method: W = E + B A. Whoever knows the row space of A has only B [N, k] to learn. The attacker takes the k right singular vectors at the
    bottom of E's spectrum for it, where a plain SVD split has its hole, starts from B = 0, and trains B alone; of wide matrices, whose
    right null space is large anyway, the left ones for the columns of B, and trains A.
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
    """W ↦ W + L F, or F L where the rows are guessed: F [k, K] or [N, k] fixed, L begins at zero."""

    def __init__(self, exposed: Tensor, k: int) -> None:
        super().__init__()
        n, columns = exposed.shape
        self.wide = n < columns
        self.fixed = nn.Parameter(guessed(exposed.t(), k).t() if self.wide else guessed(exposed, k), requires_grad=False)
        self.learnt = nn.Parameter(torch.zeros(k, columns) if self.wide else torch.zeros(n, k))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + (self.fixed @ self.learnt if self.wide else self.learnt @ self.fixed)


def guessed(exposed: Tensor, k: int) -> Tensor:
    """The k right singular vectors at the bottom of E [N, K], N ≥ K: float32 [k, K]."""
    vt: Tensor = torch.linalg.svd(exposed, full_matrices=False)[2]
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
            parametrize.register_parametrization(model.get_submodule(member.name), "weight", _Inside(matrix, k))
    return model
