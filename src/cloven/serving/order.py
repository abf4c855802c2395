"""What a request asks for, checked: strict, so that nothing is ignored silently and nothing unexpected reaches transformers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from cloven.serving.api_error import ApiError, bad_request
from cloven.serving.body import parsed

_MOST_MESSAGES, _MOST_TOOLS, _MOST_STOPS, _LONGEST_STOP = 1024, 128, 4, 64
_LOGITS = "whoever sees full logits can compute the output layer: they are not offered"
_GREEDY = "change the logits, which this server does not do"
# field -> values that mean "as usual", and why there are no others
_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((None, False), _LOGITS),
    "top_logprobs": ((None, 0), _LOGITS),
    "logit_bias": ((None, {}), "with a bias on logits one can read them off the answers: it is not offered"),
    "echo": ((None, False), "the prompt is not repeated"),
    "n": ((None, 1), "one answer for a request: send several requests"),
    "best_of": ((None, 1), "one answer for a request: send several requests"),
    "suffix": ((None, ""), "text is not filled in before a suffix"),
    "frequency_penalty": ((None, 0), f"penalties {_GREEDY}"),
    "presence_penalty": ((None, 0), f"penalties {_GREEDY}"),
    "response_format": ((None, {"type": "text"}), "answers are text"),
    "tool_choice": ((None, "auto", "none"), "the model decides whether it calls a tool"),
    "parallel_tool_calls": ((None, True), "the model decides how many tools it calls"),
    "modalities": ((None, ["text"]), "answers are text"),
    "store": ((None, False), "nothing is stored"),
}
# what may be one thing or another: pydantic would name the first of them
_EITHER = {
    "stop": f"give a string of 1 to {_LONGEST_STOP} characters, or up to {_MOST_STOPS} of them",
    "prompt": "give one string; for several prompts send several requests",
    "content": 'give text, or a list of {"type": "text", "text": …}: there is nothing but text here',
}
_Text = Annotated[str, StringConstraints(strict=True)]
_Name = Annotated[str, StringConstraints(strict=True, max_length=256)]
_Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=_LONGEST_STOP)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Part(_Strict):
    type: Literal["text"]
    text: _Text


def _json_object(text: str) -> str:
    """transformers parses it for the chat template."""
    with contextlib.suppress(ApiError):
        if isinstance(parsed(text.encode("utf-8", "surrogatepass")), dict):
            return text
    raise PydanticCustomError("json_object", "should be a JSON object")


class _Function(_Strict):
    name: _Name
    arguments: Annotated[_Text, AfterValidator(_json_object)]


class _ToolCall(_Strict):
    id: _Name
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[_Part], Field(fail_fast=True)] | None = None
    name: _Name | None = None
    tool_calls: Annotated[list[_ToolCall], Field(max_length=_MOST_TOOLS)] | None = None
    tool_call_id: _Name | None = None
    refusal: None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: dict[str, Any]


class _TemplateArguments(_Strict):
    enable_thinking: bool | None = None


class _Common(_Strict):
    model: _Name | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: _Name | None = None


class _Chat(_Common):
    messages: Annotated[list[_Message], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[_Tool], Field(max_length=_MOST_TOOLS)] | None = None
    chat_template_kwargs: _TemplateArguments | None = None
    metadata: dict[_Name, _Name] | None = None


class _Completion(_Common):
    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=1)]


@dataclass(frozen=True)
class Order:
    """A request, checked.

    Args:
        body: what transformers' handler gets: fields that it honours.
        stream: whether the answer comes in pieces; usage: and a last one says what it took.
        max_tokens: of the answer, None: not said.
        limit: of any answer.
        temperature, top_p: None: not said.
        seed: for sampling; None: another one for every request.
        stops: strings that end the answer.
    """

    body: dict[str, Any]
    stream: bool
    usage: bool
    max_tokens: int | None
    limit: int
    temperature: float | None
    top_p: float | None
    seed: int | None
    stops: tuple[str, ...]

    def tokens(self, prompt: int, context: int | None) -> int:
        """How many tokens the answer may have, after a prompt of so many in a model for so many.

        Raises:
            ApiError: the prompt is empty, or both together do not fit.
        """
        if prompt == 0:
            raise bad_request("the prompt is empty")
        left = self.limit if context is None else context - prompt
        if left < 1 or (self.max_tokens is not None and self.max_tokens > left):
            wanted = f" and {self.max_tokens} for the answer" if self.max_tokens is not None else ""
            raise bad_request(f"{prompt} tokens{wanted}: the model takes {context} together", "context_length_exceeded")
        return self.max_tokens if self.max_tokens is not None else min(left, self.limit)


def chat_order(body: Any, name: str, limit: int) -> Order:
    """A request of /v1/chat/completions.

    Args:
        body: the JSON value.
        name: the model's.
        limit: tokens of an answer.

    Raises:
        ApiError: it is wrong, or asks for what is not offered.
    """
    return _order(_Chat, body, name, limit)


def completion_order(body: Any, name: str, limit: int) -> Order:
    """A request of /v1/completions: see `chat_order`."""
    return _order(_Completion, body, name, limit)


def _order(kind: type[_Common], body: Any, name: str, limit: int) -> Order:
    if not isinstance(body, dict):
        raise bad_request("send a JSON object")
    body = dict(body)
    for field, (usual, why) in _NOT_OFFERED.items():
        if field in body and not any(type(body[field]) is type(value) and body[field] == value for value in usual):
            raise bad_request(f"{field}: {why}", "unsupported_value", field)
        body.pop(field, None)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _of(error) from None
    if request.model not in (None, name):
        raise ApiError(404, f"there is one model here, {name}", "model_not_found", param="model")
    most = request.max_tokens
    if isinstance(request, _Chat) and request.max_completion_tokens is not None:
        most = request.max_completion_tokens
    if most is not None and most > limit:
        raise bad_request(f"max_tokens: at most {limit} here", param="max_tokens")
    stops = () if request.stop is None else (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    kept = {"messages", "tools", "chat_template_kwargs"} if isinstance(request, _Chat) else {"prompt"}
    passed = request.model_dump(include=kept, exclude_none=True)
    if isinstance(passed.get("prompt"), list):
        passed["prompt"] = passed["prompt"][0]
    stream = bool(request.stream)
    usage = request.stream_options is not None and bool(request.stream_options.include_usage)
    return Order({**passed, "stream": stream}, stream, usage, most, limit, request.temperature, request.top_p, request.seed, stops)


def _of(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = first["loc"][:4]
    place = ".".join(str(part) for part in path)[:100]
    for depth, part in enumerate(path):
        if part in _EITHER and any((isinstance(inner, str) and not inner.isidentifier()) or inner == "str" for inner in path[depth + 1 :]):
            place = ".".join(str(part) for part in path[: depth + 1])
            return bad_request(f"{place}: {_EITHER[str(part)]}", param=place)
    if first["type"] == "extra_forbidden":
        return bad_request(f"{place}: this server knows no such field", "unknown_parameter", place)
    return bad_request(f"{place}: {first['msg']}", param=place)
