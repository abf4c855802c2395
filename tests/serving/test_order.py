from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.serving.api_error import ApiError
from cloven.serving.order import Order, chat_order, completion_order

NAME, LIMIT = "bard", 100
USER = [{"role": "user", "content": "hi"}]


def completion(**body: Any) -> Order:
    return completion_order({"prompt": "x", **body}, NAME, LIMIT)


def chat(**body: Any) -> Order:
    return chat_order({"messages": USER, **body}, NAME, LIMIT)


def refused(act: Any, param: str | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        act()
    error: ApiError = caught.value
    assert error.status in (400, 404) and (param is None or (error.param or "").split(".")[0] == param)
    return error


def test_the_least() -> None:
    order = completion()
    assert order.body == {"prompt": "x", "stream": False}
    assert (order.stream, order.max_tokens, order.temperature, order.top_p, order.seed, order.stops) == (False, None, None, None, None, ())


def test_everything() -> None:
    order = completion(
        model=NAME,
        prompt=["y"],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.5,
        top_p=1,
        seed=-3,
        stop=["a", "b"],
        max_tokens=7,
    )
    assert order.body == {"prompt": "y", "stream": True} and order.stream
    assert (order.max_tokens, order.temperature, order.top_p, order.seed, order.stops) == (7, 0.5, 1.0, -3, ("a", "b"))
    assert completion(stop="a").stops == ("a",)


def test_null_is_the_same_as_nothing() -> None:
    names = ("model", "stream", "temperature", "top_p", "seed", "stop", "max_tokens", "user", "logprobs", "logit_bias", "n", "suffix")
    assert completion(**dict.fromkeys(names)) == completion()


def test_chat_keeps_what_the_template_needs() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    order = chat(
        messages=messages,
        tools=tools,
        tool_choice="auto",
        max_completion_tokens=5,
        max_tokens=9,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert order.max_tokens == 5
    assert order.body["messages"][1] == messages[1] and order.body["messages"][2]["tool_calls"] == [call]
    assert order.body["tools"] == tools and order.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert set(order.body) == {"messages", "tools", "chat_template_kwargs", "stream"}


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs", "logit_bias", "echo", "n", "best_of", "suffix", "frequency_penalty", "store"])
def test_what_is_not_offered(name: str) -> None:
    for value in (True, 1, 2, "x", {"1": 1}, [1]):
        usual = {"n": 1, "best_of": 1, "echo": None, "store": None}
        if value == usual.get(name, object()) and type(value) is int:
            continue
        assert refused(lambda value=value: completion(**{name: value}), name).code == "unsupported_value"  # type: ignore[misc]


def test_logprobs_are_refused_even_where_zero_would_be_none() -> None:
    """`logprobs: 0` asks for the chosen token's."""
    refused(lambda: completion(logprobs=0), "logprobs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "0"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", float("inf")),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["x"] * 5),
        ("stop", ["x" * 65]),
        ("stop", [1]),
        ("max_tokens", 0),
        ("max_tokens", LIMIT + 1),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("prompt", None),
        ("prompt", [[1, 2]]),
        ("prompt", []),
        ("stream", "yes"),
        ("stream_options", {"nonsense": 1}),
        ("user", "x" * 257),
        ("generation_config", "{}"),
        ("guided_json", {}),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    refused(lambda: completion(**{name: value}), name)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "user", "content": 3},
        {"role": "user", "content": "x", "extra": 1},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 100_000}}]},
    ],
)
def test_messages(message: Any) -> None:
    error = refused(lambda: chat(messages=[message]), "messages")
    assert "passwd" not in error.message


def test_templates_are_the_operators() -> None:
    refused(lambda: chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs")
    refused(lambda: chat(messages=USER * 1025), "messages")
    refused(lambda: chat(max_completion_tokens=LIMIT + 1), "max_tokens")


def test_another_model() -> None:
    error = refused(lambda: completion(model="gpt-4"), "model")
    assert error.status == 404 and error.code == "model_not_found" and NAME in error.message


@pytest.mark.parametrize("body", [None, 1, "x", [], [{}]])
def test_no_object(body: Any) -> None:
    refused(lambda: completion_order(body, NAME, LIMIT))


def test_how_many_tokens() -> None:
    assert completion(max_tokens=7).tokens(10, 50) == 7
    assert completion().tokens(10, 50) == 40 and completion().tokens(10, None) == LIMIT and completion().tokens(10, 500) == LIMIT
    for order, prompt in ((completion(max_tokens=41), 10), (completion(), 50), (completion(), 60)):
        error = refused(lambda order=order, prompt=prompt: order.tokens(prompt, 50))  # type: ignore[misc]
        assert error.code == "context_length_exceeded" and "50 together" in error.message
    assert "empty" in refused(lambda: completion().tokens(0, 50)).message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("model", "prompt", "messages", "stream", "stop", "temperature", "logit_bias", "n", "tools", "max_tokens", "response_format", "x")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_nothing_else_than_an_order_or_a_refusal(body: dict[str, Any]) -> None:
    for parse in (completion_order, chat_order):
        try:
            order = parse(body, NAME, LIMIT)
        except ApiError as error:
            assert error.status in (400, 404)
        else:
            assert set(order.body) <= {"prompt", "messages", "tools", "chat_template_kwargs", "stream"}


@pytest.mark.parametrize(
    ("parse", "more", "place", "words"),
    [
        (completion_order, {"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4"),
        (completion_order, {"prompt": "x", "stop": [""]}, "stop", "1 to 64"),
        (completion_order, {"prompt": "x", "stop": 5}, "stop", "a string"),
        (completion_order, {"prompt": ["a", "b"]}, "prompt", "several requests"),
        (completion_order, {"prompt": [1, 2]}, "prompt", "one string"),
        (chat_order, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "nothing but text"),
        (chat_order, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "give text"),
    ],
)
def test_what_may_be_one_thing_or_another(parse: Any, more: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse(more, "bard", 10)
    assert caught.value.param == place and caught.value.message.startswith(f"{place}: ")


def test_many_wrong_parts_are_refused_as_quickly_as_one() -> None:
    body = {"messages": [{"role": "user", "content": [0] * 15_000}]}
    started = time.process_time()
    with pytest.raises(ApiError):
        chat_order(body, "bard", 10)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("arguments", ["[1]", "{", '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a": NaN}'])
def test_arguments_of_a_tool_call_are_as_simple_as_a_body(arguments: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ApiError, match="JSON object"):
        chat_order({"messages": [{"role": "assistant", "tool_calls": [call]}]}, "bard", 10)
