"""A request's body: JSON of bounded shape. What it says is checked afterwards, in time that grows with its parts, and its clients share one
thread: so a body of a few hundred thousand parts, or one nested without end, is refused before anybody looks at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from cloven.serving.api_error import bad_request

MOST_PARTS, DEEPEST = 20_000, 64
_LONGEST_NUMBER = 32


def parsed(data: bytes) -> Any:
    """The JSON value.

    Raises:
        ApiError: 400: no JSON as RFC 8259 has it (there is no NaN), text that is no Unicode, too many parts, or too deep.
    """
    try:
        value = json.loads(data, parse_constant=_no_number, parse_int=_integer)
    except (ValueError, RecursionError):
        raise bad_request("the body is no JSON", "invalid_json") from None
    _check(value)
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError("no number that anybody means")
    return int(digits)


def _check(value: Any) -> None:
    left = MOST_PARTS
    level = [value]
    for _ in range(DEEPEST):
        left -= len(level)
        if left < 0:
            raise bad_request(f"the body has more than {MOST_PARTS} parts", "invalid_json")
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict | list) and len(one) + len(deeper) > left:
                raise bad_request(f"the body has more than {MOST_PARTS} parts", "invalid_json")
            deeper.extend(_inside(one))
        if not deeper:
            return
        level = deeper
    raise bad_request(f"the body is nested deeper than {DEEPEST} levels", "invalid_json")


def _inside(value: Any) -> Iterator[Any]:
    """What a value holds; its own text is looked at."""
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key)
            yield inner
    elif isinstance(value, str):
        _check_text(value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request("text with half of a surrogate pair is no Unicode", "invalid_json") from None
