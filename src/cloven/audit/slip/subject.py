"""What is attacked: a SLIP bundle with both halves, the model it was made of put together again, and a text."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloven.audit.slip.scrambled import Scrambled, coarse, sizes_of
from cloven.bundle.bundle import Bundle, open_bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.errors import BadInput
from cloven.field.prg import SecretStream
from cloven.model.linears import is_linear, matrix_of
from cloven.slip.exposed_matrix import ExposedMatrix, expose
from cloven.slip.layer import SplitGroup, SplitLinear
from cloven.slip.split_model import groups_of
from cloven.zoo.text import perplexity, sample_text

TEXT_WINDOWS, TEXT_TOKENS = 8, 256
_LEAST_TOKENS = 128


@dataclass(frozen=True, repr=False, eq=False)
class AttackedGroup:
    """One group: what the worker holds, and the truth that an attack is marked by.

    Args:
        matrix: the exposed matrix, and the secret keys and scales; its codes, int8 [T·N, K], are all that an attacker has.
        exposed: E [N, K] without scramble and quantisation, float32.
        parts: the member linears and their rows of E.
    """

    group: SplitGroup
    matrix: ExposedMatrix
    exposed: Tensor
    parts: tuple[tuple[SplitLinear, slice], ...]

    @property
    def name(self) -> str:
        """The linears' names."""
        return self.group.name

    @property
    def codes(self) -> Tensor:
        """What the worker holds, int8 [T·N, K]."""
        return self.matrix.codes

    @property
    def terms(self) -> int:
        """T."""
        return int(self.matrix.row_gather.shape[0])

    @functools.cached_property
    def seen(self) -> Scrambled:
        """The first term as it lies, and the truth about its rows and columns: square matrices of both sizes."""
        return Scrambled.of(self.matrix)

    def coarse(self) -> Tensor:
        """The first term as it lies, float32 [N, K], without the truth."""
        return coarse(self.matrix)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Scales of the model's rows [N] and columns [K], without signs: gifts to an attacker."""
        return sizes_of(self.matrix)

    def without_scales(self, part: int) -> Tensor:
        """One member's E in the model's order, every row and column of the same scale: only the size of the whole is right."""
        exposed, (rows, columns) = self.exposed[self.parts[part][1]], self.sizes()
        flat = exposed / rows[self.parts[part][1], None] / columns
        scaled: Tensor = flat * (exposed.norm() / flat.norm().clamp_min(1e-30))
        return scaled

    def weight(self, part: int) -> Tensor:
        """W = E + B A of one member, float32."""
        member, rows = self.parts[part]
        return self.exposed[rows] + member.secret_b @ member.secret_a


@dataclass(frozen=True, repr=False, eq=False)
class Subject:
    """A bundle under attack.

    Args:
        split: OUT/trusted as loaded, without a worker.
        plain: the unsplit model, float32.
        text: windows that perplexities are measured on, int64 [windows, tokens].
        seed: of the attackers' own choices; no secret depends on it.
        relative: a public relative of the model, where the user has named one.
        scramble: see `SlipConfig`.
    """

    bundle: Bundle
    split: PreTrainedModel
    plain: PreTrainedModel
    exposed: ExposedCopy
    groups: tuple[AttackedGroup, ...]
    text: Tensor
    seed: int
    relative: PreTrainedModel | None
    scramble: str

    @property
    def scheme(self) -> str:
        """SLIP and what was chosen: slip/int8, mixing; or slip/int8, no scramble."""
        precision = self.bundle.manifest.parameters["precision"]
        return f"slip/{precision}, {'no scramble' if self.scramble == 'none' else self.scramble}"

    @property
    def scrambled(self) -> bool:
        """Whether rows and columns of the exposed matrices are hidden by secret keys."""
        return self.scramble != "none"

    def permuted(self) -> Subject:
        """The same exposed parts under a scramble of permutations and signs alone, for comparison; keys are the attacker's own."""
        groups = []
        for group in self.groups:
            matrix = expose(group.exposed, group.terms, self.stream(f"permuted {group.name}"))
            groups.append(AttackedGroup(group.group, matrix, group.exposed, group.parts))
        return replace(self, groups=tuple(groups), scramble="permutation")

    @property
    def origin(self) -> str:
        """Where the model comes from: "private", or a public base that the secret is a difference from."""
        return str(self.bundle.manifest.parameters["origin"])

    @functools.cached_property
    def nats(self) -> float:
        """What the unsplit model needs per token of the text."""
        return math.log(perplexity(self.plain, self.text))

    def random(self, what: str) -> torch.Generator:
        """An attacker's coin, the same for the same seed and use."""
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {what}".encode()).digest()[:7]))

    def stream(self, what: str) -> SecretStream:
        """Keys for systems that an attacker builds to learn from: they follow from the seed, so that its figures do."""
        return SecretStream(hashlib.sha256(f"{self.seed} {what}".encode()).digest(), "audit")

    def with_matrices(self, matrix: Callable[[AttackedGroup, int], Tensor]) -> PreTrainedModel:
        """The model with other matrices, `matrix(group, part)` [N, K] for every linear; all else is the model's, shared and frozen."""
        return _with_matrices(self.plain, self.groups, matrix)

    def relative_weight(self, member: SplitLinear) -> Tensor:
        """The public relative's matrix of a linear, float32 [N, K]."""
        assert self.relative is not None
        return matrix_of(self.relative.get_submodule(member.name)).detach().float()


@torch.no_grad()
def open_subject(out: Path, text: Tensor | None, seed: int, relative: PreTrainedModel | None = None) -> Subject:
    """Read both halves and put the model together again, in float32 and in memory.

    Args:
        text: int64 [windows, tokens]; sampled from the model if None.

    Raises:
        BadBundle, TamperedBundle, ForeignBundle: the halves.  BadInput: the text is too short; the relative has another architecture.
    """
    bundle = open_bundle(out)
    bundle.verify()
    split = AutoModelForCausalLM.from_pretrained(bundle.trusted, dtype=torch.float32, trust_remote_code=False).eval()
    exposed = ExposedCopy(bundle.exposed, bundle.manifest)
    groups = tuple(_attacked(group, exposed.verified(group.index)) for group in groups_of(split))
    if relative is not None:
        _require_relative(relative, groups)
    plain = _with_matrices(split, groups, lambda group, part: group.weight(part))
    if text is None:
        text = sample_text(plain, TEXT_WINDOWS, TEXT_TOKENS, seed)
    if text.numel() < _LEAST_TOKENS:
        raise BadInput(f"the text has {text.numel()} tokens: give at least {_LEAST_TOKENS}")
    return Subject(bundle, split, plain, exposed, groups, text, seed, relative, bundle.manifest.parameters["scramble"])


def compared(subject: Subject) -> list[Subject]:
    """The subject, and where it is scrambled by more than permutations the same under these alone. Nothing where it is not scrambled."""
    if not subject.scrambled:
        return []
    return [subject] if subject.scramble == "permutation" else [subject, subject.permuted()]


def _attacked(group: SplitGroup, codes: Tensor) -> AttackedGroup:
    members = group.members
    starts = [sum(member.out_features for member in members[:i]) for i in range(len(members))]
    parts = tuple((member, slice(start, start + member.out_features)) for member, start in zip(members, starts, strict=True))
    matrix = _stored(group, codes)
    return AttackedGroup(group, matrix, matrix.dequantised(torch.float32), parts)


def _stored(group: SplitGroup, codes: Tensor) -> ExposedMatrix:
    leader = group.members[0]
    gather, scale = (torch.cat([getattr(member, name) for member in group.members], dim=1) for name in ("row_gather", "row_scale"))
    mixing = leader.mixing_gather, leader.mixing_scale
    return ExposedMatrix(codes, leader.column_gather, leader.column_scale, gather, scale, *mixing)


def _require_relative(relative: PreTrainedModel, groups: tuple[AttackedGroup, ...]) -> None:
    modules = dict(relative.named_modules())
    for member in (member for group in groups for member, _ in group.parts):
        module = modules.get(member.name)
        if module is None or not is_linear(module) or matrix_of(module).shape != (member.out_features, member.in_features):
            raise BadInput(f"the relative has no {member.name} of the bundle's shape: give a model of the same architecture and sizes")


def _with_matrices(
    model: PreTrainedModel, groups: tuple[AttackedGroup, ...], matrix: Callable[[AttackedGroup, int], Tensor]
) -> PreTrainedModel:
    shared: dict[int, nn.Parameter] = {id(parameter): parameter for parameter in model.parameters()}
    other: PreTrainedModel = copy.deepcopy(model, shared)
    for group in groups:
        for part, (member, _) in enumerate(group.parts):
            other.set_submodule(member.name, _dense(matrix(group, part), member.bias))
    return other.eval()


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these weights, shared, not copied."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
