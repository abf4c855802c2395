from __future__ import annotations

import torch

from cloven.audit.kv_shield.gram import BLOCK, by_gram, gram
from cloven.audit.kv_shield.guesses import hits
from tests.audit.kv_shield.subjects import by_mode, generator, rotated, subject, table, text


def test_gram_finds_the_last_token_of_every_block() -> None:
    rows, last = table()[text()], text()[BLOCK - 1 :: BLOCK]
    assert torch.equal(by_gram(rotated(rows), table(), text()), last)
    assert hits(by_gram(torch.randn(rows.shape, generator=generator(9)), table(), text()), last) < 1


def test_gram_leaves_a_block_that_is_not_whole() -> None:
    tokens = text(2 * BLOCK + 3)
    assert by_gram(table()[tokens], table(), tokens).shape == (2,)


def test_permutations_do_not_withstand_it() -> None:
    """Ten tries: session mode is measured, not claimed."""
    found = by_mode(gram(subject()), "gram")
    assert all(found[mode].value == 1 and found[mode].verdict == "broken" for mode in ("none", "permute"))
    assert found["session"].value < 1 and found["sealed"].value < 0.3
    assert {one.tries for one in found.values()} == {len(subject().tokens) // BLOCK}
