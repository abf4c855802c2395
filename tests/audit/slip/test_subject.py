from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.slip.subject import compared, open_subject
from cloven.bundle.bundle import Bundle
from cloven.errors import BadInput, TamperedBundle
from cloven.model.linears import matrix_of
from tests.audit.slip.subjects import demo_subject, text, tiny_subject
from tests.split_models import demo_model, tiny, tiny_bundle


def test_the_model_is_put_together_again() -> None:
    with torch.no_grad():
        ours, true = (model(input_ids=text(), use_cache=False).logits for model in (demo_subject("int8x2").plain, demo_model()))
    assert float((ours - true).norm() / true.norm()) < 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen2"])
def test_every_weight_is_the_models(family: str) -> None:
    subject = tiny_subject(family)
    model = tiny(family)
    for group in subject.groups:
        for part, (member, rows) in enumerate(group.parts):
            weight = matrix_of(model.get_submodule(member.name)).detach()
            assert group.weight(part).shape == weight.shape == (rows.stop - rows.start, group.codes.shape[1])
            assert float((group.weight(part) - weight).norm() / weight.norm()) < 0.02


@pytest.mark.parametrize("scramble", ["mixing", "permutation", "none"])
@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_the_truth_that_attacks_are_marked_by(precision: str, scramble: str) -> None:
    """Turned back by it and scaled by what attackers are given, the first term is the exposed matrix."""
    for group in demo_subject(precision, scramble).groups[:3]:
        seen, (rows, columns) = group.seen, group.sizes()
        assert torch.equal(seen.codes, group.coarse()) and seen.codes.shape == group.exposed.shape
        for basis in (seen.rows, seen.columns):
            assert bool((basis.abs().amax(1) == 1).all()) == (scramble != "mixing")
        back = torch.linalg.solve(seen.columns, torch.linalg.solve(seen.rows, seen.codes).t()).t()
        ours = back * rows[:, None] * columns
        assert float((ours - group.exposed).norm() / group.exposed.norm()) < 0.03
        flat, exposed = group.without_scales(0), group.exposed[group.parts[0][1]]
        assert torch.allclose(flat.norm(), exposed.norm(), rtol=1e-3) and torch.equal(flat.sign(), exposed.sign())
        assert float(flat.norm(dim=0).std() / flat.norm(dim=0).mean()) < 0.2


def test_the_same_under_permutations() -> None:
    subject = tiny_subject()
    permuted = subject.permuted()
    assert permuted.scheme == "slip/int8, permutation" and permuted.plain is subject.plain
    for ours, theirs in zip(subject.groups, permuted.groups, strict=True):
        assert torch.equal(ours.exposed, theirs.exposed) and bool((theirs.seen.columns.abs().amax(1) == 1).all())
    assert [one.scramble for one in compared(subject)] == ["mixing", "permutation"]
    assert (
        compared(tiny_subject(scramble="permutation")) == [tiny_subject(scramble="permutation")]
        and compared(replace(subject, scramble="none")) == []
    )


def test_the_scheme_is_named() -> None:
    assert demo_subject().scheme == "slip/int8, mixing" and demo_subject(scramble="none").scheme == "slip/int8, no scramble"


def test_a_text_is_sampled_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import cloven.audit.slip.subject as subject_module

    monkeypatch.setattr(subject_module, "TEXT_TOKENS", 32)
    subject = open_subject(tiny_bundle("llama").path, None, 0)
    assert subject.text.shape == (8, 32) and torch.equal(subject.text, open_subject(tiny_bundle("llama").path, None, 0).text)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(BadInput, match="the text has 64 tokens: give at least 128"):
        open_subject(tiny_bundle("llama").path, torch.ones(1, 64, dtype=torch.int64), 0)


def test_an_altered_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(self: Bundle) -> None:
        raise TamperedBundle("a file")

    monkeypatch.setattr(Bundle, "verify", altered)
    with pytest.raises(TamperedBundle):
        open_subject(tiny_bundle("llama").path, text(), 0)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_relative_of_another_architecture_is_refused(family: str) -> None:
    with pytest.raises(BadInput, match=r"the relative has no .* of the bundle's shape"):
        open_subject(tiny_bundle("llama" if family == "gpt2" else "gpt2").path, None, 0, tiny(family))


def test_a_relatives_matrices_lie_as_the_models() -> None:
    """GPT-2 stores them the other way round."""
    subject = open_subject(tiny_bundle("gpt2").path, torch.ones(1, 200, dtype=torch.int64), 0, tiny("gpt2"))
    for group in subject.groups:
        for part, (member, _) in enumerate(group.parts):
            weight = subject.relative_weight(member)
            assert float((group.weight(part) - weight).norm() / weight.norm()) < 0.02


def test_coins_depend_on_the_seed() -> None:
    subject = tiny_subject()
    first, second = (torch.rand(3, generator=subject.random("x")) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(3, generator=replace(subject, seed=9).random("x")))
    assert "secret" not in repr(subject) and "tensor" not in repr(subject)
