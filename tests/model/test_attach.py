from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

import cloven
from cloven.errors import NotAttached
from cloven.model.runtime import session_of
from tests.split_models import (
    attached,
    demo_bundle,
    load,
    logits,
    open_session,
    random_ids,
    relative_error,
    tiny,
    tiny_bundle,
    worker_thread,
)

IDS = random_ids(97, 2, 6)


def test_it_returns_the_models_session() -> None:
    with attached(tiny_bundle("llama")) as (model, session):
        assert isinstance(session, cloven.Session) and session_of(model) is session
        assert repr(session).endswith("open)")


def test_a_deep_copy_starts_without_a_session() -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address):
        expected = logits(model, IDS)
        clone = copy.deepcopy(model)
        assert session_of(clone) is None
        with pytest.raises(NotAttached):
            logits(clone, IDS)
        with open_session(clone, address):  # pads of its own: the same logits, not the same masks
            assert relative_error(logits(clone, IDS), expected) < 1e-6
            assert relative_error(logits(model, IDS), expected) < 1e-6


def test_the_model_in_bf16() -> None:
    """`.to(bfloat16)` after loading: activations in bf16, factors and scales still float32."""
    bundle = tiny_bundle("llama", "int8x2")
    model = load(bundle.trusted).to(torch.bfloat16)
    with worker_thread(bundle) as address, open_session(model, address):
        result = logits(model, IDS)
    assert result.dtype == torch.bfloat16
    reference = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    exact = logits(tiny("llama"), IDS)
    # No further from float32 than the unsplit model in bf16 is.
    assert relative_error(result.float(), exact) < 2 * relative_error(logits(reference, IDS).float(), exact)


def test_no_gradients_flow_and_none_are_asked_for() -> None:
    with attached(tiny_bundle("llama")) as (model, _):
        output = model(input_ids=IDS).logits  # not under no_grad
        assert output.shape == (2, 6, 97)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("count", [8])
def test_threads_on_one_model(count: int) -> None:
    """Each thread's answers are its own, whichever thread the worker answered in between."""
    with attached(tiny_bundle("llama", "int8x2")) as (model, session):
        inputs = [random_ids(97, 1 + seed % 3, 4 + seed, seed) for seed in range(count)]
        expected = [logits(tiny("llama"), ids) for ids in inputs]
        errors: list[str] = []

        def work(number: int) -> None:
            try:
                for _ in range(5):
                    if relative_error(logits(model, inputs[number]), expected[number]) > 1e-3:
                        errors.append(f"{number}: another's answer")
            except Exception as error:
                errors.append(f"{number}: {error!r}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert session.telemetry.total().exchanges == count * 5 * 9


def test_two_threads_generate() -> None:
    from tests.split_models import demo_model, greedy

    prompts = ["ROMEO:", "KING RICHARD III:"]
    results: dict[str, list[int]] = {}
    with attached(demo_bundle("int8x2")) as (model, _):
        threads = [threading.Thread(target=lambda p=prompt: results.__setitem__(p, greedy(model, p, 8))) for prompt in prompts]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {prompt: greedy(demo_model(), prompt, 8) for prompt in prompts}


def test_closing_while_another_thread_generates() -> None:
    """The session ends under a running generation: an error of ours, not a crash or a hang."""
    bundle = demo_bundle()
    model = load(bundle.trusted)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=400, min_new_tokens=400, do_sample=False)
        except Exception as error:
            caught.append(error)

    with worker_thread(bundle) as address, open_session(model, address) as session:
        thread = threading.Thread(target=work)
        thread.start()
        while session.telemetry.total().exchanges < 50:
            assert thread.is_alive(), caught
            time.sleep(0.01)
        session.close()
        thread.join(20)
        assert not thread.is_alive()
    assert len(caught) == 1 and isinstance(caught[0], cloven.ClovenError)
    assert type(caught[0]).__name__ == "SessionClosed"
