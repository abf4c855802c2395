"""Bundles under attack, opened once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.slip.subject import Subject, open_subject
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.zoo.demo import demo_model_path
from tests.split_models import demo_bundle, demo_model, scratch, tiny, tiny_bundle


@functools.cache
def text() -> Tensor:
    """Windows of tokens, int64 [4, 64]; of the demo model's vocabulary."""
    from cloven.zoo.text import sample_text

    return sample_text(demo_model(), 4, 64, seed=5)


def demo_subject(precision: str = "int8", scramble: str = "mixing") -> Subject:
    """The demo model, split."""
    return _demo_subject(precision, scramble)


@functools.cache
def _demo_subject(precision: str, scramble: str) -> Subject:
    out, config = scratch() / f"audit-{precision}-{scramble}", SlipConfig(precision=precision, scramble=scramble)
    if config == SlipConfig(precision=precision):
        out = demo_bundle(precision).path
    else:
        prepare_slip(demo_model_path(), out, config, engine="inline")
    return open_subject(out, text(), seed=1)


@functools.cache
def based_subject() -> Subject:
    """A full-rank synthetic fine-tune of the demo model, split by its difference from it, with the demo model as the relative."""
    tuned, random = type(demo_model())(demo_model().config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, true in zip(tuned.parameters(), demo_model().parameters(), strict=True):
            ours.copy_(true + 0.03 * true.std() * torch.randn(true.shape, generator=random) if true.dim() > 1 else true)
    folder, out = scratch() / "tuned", scratch() / "audit-tuned"
    tuned.save_pretrained(folder)
    config = SlipConfig(scramble="none", origin="public-base")
    prepare_slip(folder, out, config, engine="inline", public_base=demo_model_path())
    return open_subject(out, text(), 1, demo_model())


def tiny_subject(family: str = "llama", scramble: str = "mixing") -> Subject:
    """A tiny random model, split."""
    return _tiny_subject(family, scramble)


@functools.cache
def _tiny_subject(family: str, scramble: str) -> Subject:
    out = tiny_bundle(family).path
    if scramble != "mixing":
        out = scratch() / f"audit-tiny-{family}-{scramble}"
        prepare_slip(tiny(family), out, SlipConfig(scramble=scramble), engine="inline")
    return open_subject(out, torch.randint(1, 40, (4, 64), generator=torch.Generator().manual_seed(0)), 0)


def named(attacks: list[Attack], scramble: str = "") -> dict[str, Attack]:
    """By name, each once; of one scramble, where two were attacked."""
    chosen = [attack for attack in attacks if attack.scheme.endswith(scramble)]
    found = {attack.name: attack for attack in chosen}
    assert len(found) == len(chosen)
    return found
