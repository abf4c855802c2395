from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from cloven.errors import BadInput
from cloven.field.native.exchange import FusedExchange
from cloven.field.native.library import Kernels
from cloven.slip.constant_rows import ConstantRows
from cloven.slip.session import SlipSession
from tests.split_models import attached, logits, random_ids, relative_error, tiny, tiny_bundle

ROWS = 4


def recorded(session: SlipSession) -> list[tuple[int, int]]:
    """(group, rows) of every exchange from now on."""
    seen: list[tuple[int, int]] = []
    channel: Any = session.channel.seats[0].channel()
    multiply: Callable[..., Any] = channel.multiply

    def recording(layer: str, group: int, c: torch.Tensor, *more: Any) -> Any:
        seen.append((group, len(c)))
        return multiply(layer, group, c, *more)

    channel.multiply = recording
    return seen


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_exchange_has_the_same_rows_and_the_logits_are_the_same(precision: str, dtype: torch.dtype) -> None:
    """One row, fewer than the constant, as many, more; fused (int8) and not."""
    bundle = tiny_bundle("llama", precision)
    with attached(bundle, constant_rows=ROWS, look_ahead=0) as (model, session):
        model.to(dtype)
        seen = recorded(session)
        groups = len(session.pads)
        for length in (1, 3, ROWS, 2 * ROWS, 2 * ROWS + 1):
            seen.clear()
            ids = random_ids(97, 1, length)
            expected = logits(tiny("llama"), ids)
            assert relative_error(logits(model, ids).float(), expected) < (0.1 if precision == "int8" else 0.03)
            assert [rows for _, rows in seen] == [ROWS] * (groups * -(-length // ROWS))


def test_one_pass_over_any_rows_is_the_same_exchanges() -> None:
    """A token, a batch of three, a piece of a prompt whose logits nobody wants: a worker cannot tell one from another."""
    with attached(tiny_bundle("llama"), constant_rows=ROWS, look_ahead=0) as (model, session):
        seen, passes = recorded(session), []
        empty = torch.zeros(0, dtype=torch.long)
        for ids, more in ((random_ids(97, 1, 1), {}), (random_ids(97, 3, 1), {}), (random_ids(97, 1, 4), {"logits_to_keep": empty})):
            seen.clear()
            logits(model, ids, **more)
            passes.append(list(seen))
        assert passes[0] == passes[1] == passes[2] == [(group, ROWS) for group in range(len(session.pads))]


def test_without_it_a_worker_can_tell() -> None:
    """The weakened system: rows show."""
    with attached(tiny_bundle("llama"), look_ahead=0) as (model, session):
        seen = recorded(session)
        shown = []
        for length in (1, 3):
            seen.clear()
            logits(model, random_ids(97, 1, length))
            shown.append({rows for _, rows in seen})
        assert shown == [{1}, {3}]


def test_generation_by_pieces() -> None:
    """A prompt of nine tokens by pieces of four and three more tokens: 3 + 2 passes, all alike."""
    with attached(tiny_bundle("llama", "int8x2"), constant_rows=ROWS, look_ahead=0) as (model, session):
        seen = recorded(session)
        ids = random_ids(97, 1, 9)
        options: Any = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": ROWS, "pad_token_id": 0}
        mine = model.generate(input_ids=ids, **options)
        one = [(group, ROWS) for group in range(len(session.pads))]
        assert seen == one * 5
        theirs = tiny("llama").generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [-1, 10**9])
def test_bad_numbers(rows: int) -> None:
    with pytest.raises(BadInput, match="constant_rows"), attached(tiny_bundle("llama"), constant_rows=rows):
        pass


def test_several_workers_are_refused_fused_before_anything_is_done() -> None:
    class Several:
        name, group, rows, columns = "g", 0, 2, 2

        def fused(self, *_: Any) -> bool:
            return False

    matrix: Any = Several()
    places, units = np.arange(2, dtype=np.int32)[None], np.ones((1, 2), np.float32)
    out, passes = torch.full((3, 2), 7.0), FusedExchange(cast(Kernels, None), (places, units), (places, units), (2, 2))
    for rows in (3, 0):
        assert not ConstantRows(matrix, 2).fused(torch.ones(rows, 2), passes, out, lambda total: None)
    assert bool((out == 7).all())
