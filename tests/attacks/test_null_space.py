"""Does the exposed matrix single out the secret's subspaces U_k and V_k?

Removing the top k singular triples leaves U_k and V_k as the directions in which nothing is left: an SVD of the exposed matrix reads
them off its bottom. With the decoy they must not stand out: neither at the bottom nor at the top, in no part of the spectrum more than
in another, and not by values that lie closer together than a random matrix's do.

The attacker's best case: it knows k, and it knows the scramble and all scales, as only the trusted side does.

Measure: the share ‖Xᵀ U_k‖² / k of the secret's subspace that a set X of the exposed matrix's singular vectors holds. For a set that
knows nothing of the secret it is the set's share of all vectors: that is chance. Shares are averages over the demo model's layers,
weighted by k: one layer's k is small, and its share a matter of luck.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cloven.audit.slip.null_space import View, bottom, closest_pairs, peaked, share, side, top
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import Split, allocate_ranks, spectrum, split
from cloven.slip.exposed_matrix import expose
from tests.attacks.weakened import split_with_copied_values, split_without_decoy
from tests.split_models import demo_model

FRACTION = 0.03
Splitter = Callable[[Tensor, int, Tensor, SecretStream], Split]
Chooser = Callable[[View, Tensor], Tensor]
ALL_LAYERS = (
    *(
        f"model.layers.{i}.{kind}_proj"
        for i in range(5)
        for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ),
    "lm_head",
)
TALL = ("model.layers.3.mlp.gate_proj", "model.layers.4.mlp.gate_proj", "model.layers.4.mlp.up_proj", "lm_head")
SQUARE = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(5))
WIDE = ("model.layers.4.mlp.down_proj", "model.layers.4.self_attn.k_proj", "model.layers.1.self_attn.k_proj")
LAYERS = (*TALL, *SQUARE, *WIDE)


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def weight(name: str) -> Tensor:
    value = demo_model().get_submodule(name).weight
    assert isinstance(value, Tensor)
    return value.detach().double()


@functools.cache
def ranks() -> dict[str, int]:
    """As `prepare` spends 3 % over the whole model: some layers get many, some none."""
    matrices = [weight(name) for name in ALL_LAYERS]
    given = allocate_ranks([spectrum(w) for w in matrices], [(w.shape[0], w.shape[1]) for w in matrices], FRACTION)
    return dict(zip(ALL_LAYERS, given, strict=True))


@functools.cache
def _top(w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(w.double(), full_matrices=False)
    return u[:, :k], vt[:k].t()


def views(splitter: Splitter, terms: int, layers: tuple[str, ...]) -> tuple[View, ...]:
    """Split, quantise and scramble every layer; undo the scramble; singular value decompositions."""
    seen = []
    for name in layers:
        w, k = weight(name), ranks()[name]
        if k:
            exposed = expose(splitter(w, k, spectrum(w), stream()).exposed, terms, stream(), mixed=True).dequantised()
            seen.append(View.of(exposed, *_top(w, k)))
    return tuple(seen)


def shares(seen: tuple[View, ...], choose: Chooser) -> tuple[float, float, float]:
    """(share on the left, share on the right, chance) for the vectors that an attacker chooses."""
    left, right = side(list(seen), choose, 0), side(list(seen), choose, 1)
    return left[0], right[0], left[1]


def tenth(number: int) -> Chooser:
    """The vectors of one tenth of the spectrum."""
    return lambda view, vectors: torch.arange(number * len(view.values) // 10, (number + 1) * len(view.values) // 10)


def locally_closest_pairs(view: View, vectors: Tensor) -> Tensor:
    """As `closest_pairs`, measured by the usual distance in the neighbourhood."""
    del vectors
    gaps = view.values[:-1] - view.values[1:]
    usual = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(gaps[None], (8, 8), mode="replicate"), 17, stride=1)[0]
    first = (gaps / usual).argsort()[: view.k]
    return torch.cat([first, first + 1]).unique()


FORMS = pytest.mark.parametrize("layers", [LAYERS, pytest.param(ALL_LAYERS, marks=pytest.mark.long)], ids=["some", "all"])
TERMS = pytest.mark.parametrize("terms", [1, 2], ids=["int8", "int8x2"])


def test_the_layers_are_worth_attacking() -> None:
    assert sum(ranks()[name] for name in LAYERS) > 60 and all(ranks()[name] > 1 for name in LAYERS)
    assert all(weight(name).shape[0] > weight(name).shape[1] for name in TALL)
    assert all(weight(name).shape[0] < weight(name).shape[1] for name in WIDE)


@FORMS
@TERMS
@pytest.mark.parametrize("choose", [bottom, top, closest_pairs, locally_closest_pairs], ids=lambda choose: choose.__name__)
def test_the_secret_does_not_stand_out(choose: Chooser, terms: int, layers: tuple[str, ...]) -> None:
    left, right, chance = shares(views(split, terms, layers), choose)
    # About 90 directions: 0.15 above chance is more than four standard deviations of luck.
    assert left < chance + 0.15 and right < chance + 0.15


@FORMS
@TERMS
def test_the_secret_lies_in_no_part_of_the_spectrum(terms: int, layers: tuple[str, ...]) -> None:
    seen = views(split, terms, layers)
    for number in range(10):
        if layers is ALL_LAYERS and number:
            seen = views(split, terms, layers)  # the long form: new randomness for every part
        left, right, _ = shares(seen, tenth(number))
        assert left < 0.3 and right < 0.3  # 0.1 is expected; 0.2 more is six standard deviations


@FORMS
@TERMS
def test_the_secret_is_not_told_by_the_shape_of_its_vectors(terms: int, layers: tuple[str, ...]) -> None:
    """A trained layer's top singular vectors are more peaked than its others; scramble and signs do not change that. Mixed they are not."""
    found, chance = share(list(views(split, terms, layers)), peaked)
    assert found < chance + 0.15


@pytest.mark.parametrize(("layers", "hollow"), [(TALL, "right"), (WIDE, "left"), (SQUARE, "both")], ids=["tall", "wide", "square"])
@TERMS
def test_without_a_decoy_the_bottom_is_the_secret(layers: tuple[str, ...], hollow: str, terms: int) -> None:
    """A tall matrix shows V_k (its column space, where U_k is missing, is not full anyway), a wide one U_k, a square one both."""
    left, right, chance = shares(views(split_without_decoy, terms, layers), bottom)
    least = 0.9 if terms == 1 else 0.99
    assert chance < 0.1
    assert hollow == "right" or left > least
    assert hollow == "left" or right > least


def test_a_decoy_of_copied_values_marks_itself() -> None:
    """Every copied value is in the spectrum twice, and with two int8 terms hardly anything blurs the two: the pairs span the secret."""
    for choose in (closest_pairs, locally_closest_pairs):
        left, right, chance = shares(views(split_with_copied_values, 2, LAYERS), choose)
        assert left > 0.9 and right > 0.9 and chance < 0.2
