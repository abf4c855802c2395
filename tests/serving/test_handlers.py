from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler

from cloven.errors import WorkerTimeout
from cloven.serving.api_error import ApiError
from cloven.serving.handlers import ChatHandler, LoadedModel, TextHandler, _sampling
from cloven.serving.order import Order, chat_order, completion_order
from tests.served import NAME, plain_model, served_model


def order(**more: Any) -> Order:
    return completion_order({"prompt": "x", **more}, NAME, 100)


def test_there_is_one_model_and_nothing_is_loaded() -> None:
    served, _ = served_model()
    models = LoadedModel(served)
    for name in (NAME, "gpt2", "/etc", f"{NAME}@main"):
        assert models.process_model_name(name) == NAME
        assert models.load_model_and_processor(name) == plain_model()
    assert not models.loaded_models and models.force_model == NAME
    models.shutdown()
    assert models.load_model_and_processor(NAME)[0] is served.model
    served.close()


@pytest.mark.parametrize("default", [GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9), GenerationConfig(do_sample=False)])
def test_sampling_as_openai_means_it(default: GenerationConfig) -> None:
    def config(**more: Any) -> Any:
        return _sampling(GenerationConfig(**default.to_dict()), order(**more))

    assert config().do_sample is default.do_sample
    assert not config(temperature=0).do_sample and not config(temperature=0, top_p=0.5).do_sample
    assert not config(temperature=1e-300).do_sample and config(temperature=1e-5).do_sample
    hot = config(temperature=1.5)
    assert hot.do_sample and hot.temperature == 1.5 and hot.top_p == default.top_p
    narrow = config(top_p=0.5)
    assert narrow.do_sample and narrow.top_p == 0.5
    greedy = config(temperature=0)
    assert (greedy.temperature, greedy.top_p) == (1.0, 1.0)  # nothing left that transformers would warn of


@pytest.mark.parametrize("kind", [ChatHandler, TextHandler])
def test_a_handler_takes_no_model_from_the_request(kind: Any) -> None:
    served, _ = served_model()
    generation: Any = SimpleNamespace(order=order(temperature=0))
    handler = kind(LoadedModel(served), generation)
    model_id, model, tokenizer = handler._resolve_model({})
    assert (model_id, model, tokenizer) == (NAME, *plain_model())
    assert handler.generation_state.get_manager("whatever") is generation
    assert not handler.generation_state.use_continuous_batching(model, None)
    config = handler._build_generation_config({}, model.generation_config)
    assert not config.do_sample and config is not model.generation_config
    served.close()


@pytest.mark.parametrize(
    ("tools", "failure", "length", "mine"),
    [(True, None, 3, True), (False, None, 3, False), (True, WorkerTimeout("gone"), 3, False), (True, None, 0, False)],
)
def test_a_whole_text_with_a_tool_call_that_nobody_can_read(
    tools: bool, failure: Exception | None, length: int, mine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's fault, if the text was written and tools were offered; other errors stay what they are."""

    async def broken(*_: Any, **__: Any) -> None:
        raise KeyError("name")

    monkeypatch.setattr(ChatCompletionHandler, "_non_streaming", broken)
    offered = {"tools": [{"type": "function", "function": {"name": "f"}}]} if tools else {}
    asked = chat_order({"messages": [{"role": "user", "content": "x"}], **offered}, NAME, 10)
    generation: Any = SimpleNamespace(order=asked, failure=failure, length=lambda: length)
    served, _ = served_model()
    try:
        handler = ChatHandler(LoadedModel(served), generation)
        with pytest.raises(ApiError if mine else KeyError):
            asyncio.run(handler._non_streaming())
    finally:
        served.close()
