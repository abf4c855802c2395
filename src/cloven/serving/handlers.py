"""transformers' handlers, told what to do otherwise: sampling as OpenAI means it, a stop string is no part of the answer."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager

from cloven.serving.api_error import unreadable_tool_call
from cloven.serving.generation import Generation, OneGeneration
from cloven.serving.model import ServedModel
from cloven.serving.order import Order
from cloven.serving.stop_strings import cut

_COLDEST = 1e-5  # below, logits divided by the temperature overflow, and would end the whole batch; it is greedy as well


class LoadedModel(ModelManager):  # type: ignore[misc]
    """What a handler takes for the manager of all models: it knows one, loaded, and loads nothing."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(device="cpu")
        self._served, self.force_model = served, served.name

    def process_model_name(self, model_id: str) -> str:
        """See `ModelManager`: the name is one, not a path."""
        del model_id
        return self._served.name

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """See `ModelManager`."""
        del model_id_and_revision
        return self._served.model, self._served.tokenizer


def _sampling(config: Any, order: Order) -> Any:
    """A temperature or a top_p that is given asks for sampling, and temperature 0 for none; else the model's own settings hold."""
    for name, value in (("temperature", order.temperature), ("top_p", order.top_p)):
        if value is not None:
            config.do_sample = True
            setattr(config, name, value)
    if order.temperature is not None and order.temperature < _COLDEST:
        config.do_sample = False
    if not config.do_sample:
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50  # unused: transformers would warn
    return config


class ChatHandler(ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions for one request."""

    def __init__(self, models: LoadedModel, generation: Generation) -> None:
        super().__init__(models, OneGeneration(generation))
        self._order, self._generation = generation.order, generation

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        return _sampling(super()._build_generation_config(body, model_generation_config, use_cb=use_cb), self._order)

    async def _non_streaming(self, *arguments: Any, **more: Any) -> Any:
        try:
            return await super()._non_streaming(*arguments, **more)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
            if self._order.body.get("tools") and self._generation.failure is None and self._generation.length():
                raise unreadable_tool_call() from None  # transformers reads the whole text when it is complete
            raise

    def _build_completion(self, request_id: str, content: str, model_id: str, finish_reason: str, **more: Any) -> Any:
        content, stopped = cut(content, self._order.stops)
        return super()._build_completion(request_id, content, model_id, finish_reason="stop" if stopped else finish_reason, **more)


class TextHandler(CompletionHandler):  # type: ignore[misc]
    """/v1/completions for one request."""

    def __init__(self, models: LoadedModel, generation: Generation) -> None:
        super().__init__(models, OneGeneration(generation))
        self._order = generation.order

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        return _sampling(super()._build_generation_config(body, model_generation_config, use_cb=use_cb), self._order)
