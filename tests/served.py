"""A served model in this process, for the tests of `cloven.serving`: the unsplit demo model, a session that a test ends as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloven.model.runtime import Session
from cloven.serving.api_keys import ApiKeys
from cloven.serving.endpoint import Endpoint
from cloven.serving.loading import _settle
from cloven.serving.model import ServedModel, one_pass_at_a_time
from cloven.serving.options import ServeOptions
from cloven.telemetry import Telemetry
from cloven.zoo.demo import demo_model_path

NAME = "bard"


class NoConnection:
    """A session's connection to nobody."""

    address = "nowhere"

    def close(self) -> None:
        """Nothing."""


class Peer:
    """What a test decides of the other half: whether it is there, and how often a session was opened."""

    def __init__(self, model: Any) -> None:
        self.model, self.there, self.attached, self.refusal = model, True, 0, None

    refusal: Exception | None

    def attach(self) -> Session:
        """A session, or the test's refusal."""
        if self.refusal is not None:
            raise self.refusal
        self.attached += 1
        return Session(self.model, NoConnection(), Telemetry())

    def is_there(self) -> bool:
        """See `there`."""
        return self.there


@functools.cache
def plain_model() -> tuple[Any, Any]:
    """The demo model and its tokenizer, as `loading` leaves them; float32."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['content'] == 'refuse' %}{{ raise_exception('Xyl') }}{% endif %}{% endfor %}"
    )
    _settle(model, tokenizer)
    one_pass_at_a_time(model)
    return model, tokenizer


def served_model(batches: bool = True) -> tuple[ServedModel, Peer]:
    """The demo model, served; to be closed."""
    model, tokenizer = plain_model()
    peer = Peer(model)
    return ServedModel(model, tokenizer, NAME, peer.attach, peer.is_there, batches), peer


def run(work: Callable[[], Coroutine[Any, Any, None]], seconds: float = 60) -> None:
    """An asynchronous test, which ends."""

    async def bounded() -> None:
        await asyncio.wait_for(work(), seconds)

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def endpoint(keys: ApiKeys | None = None, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Endpoint, Peer]]:
    """A client of the application, without a socket."""
    served, peer = served_model()
    made = Endpoint(served, ServeOptions(**options))
    app: Any = made.application(keys)
    transport = httpx.ASGITransport(app=app)
    async with made._life(None), httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        yield client, made, peer


def generated(prompt: str, tokens: int, **more: Any) -> list[int]:
    """What `generate` writes, greedily."""
    model, tokenizer = plain_model()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": False, **more})
    new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def text_of(tokens: list[int]) -> str:
    """Their text."""
    text: str = plain_model()[1].decode(tokens, skip_special_tokens=True)
    return text
