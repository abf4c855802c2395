"""What all schemas share; the worker's and the enclave's own messages are tested with their modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.kv_shield.messages import ENCLAVE
from cloven.wire.limits import MAX_HEADER_BYTES, MAX_TEXT
from cloven.wire.messages import WORKER
from cloven.wire.schema import ERROR_CODES, VERSION, ErrorAnswer, Hello, MalformedMessage, Schema, Welcome, valid_count

BUNDLE = bytes(range(16))


@dataclass(frozen=True)
class Ask:
    """A message of a made-up scheme."""

    id: int
    colour: str


@dataclass(frozen=True)
class Tell:
    """Its answer, with a payload."""

    id: int
    colour: str


COLOURS = Schema({"ask": Ask, "tell": Tell}, (Tell,), lambda name, value: name == "colour" and value in ("red", "blue"))
SCHEMAS = [WORKER, ENCLAVE, COLOURS]


def refusal(schema: Schema, *frames: Any) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        schema.unpack(list(frames))
    assert caught.value.code in ERROR_CODES
    return caught.value


def test_a_schemes_own_messages() -> None:
    assert COLOURS.unpack([COLOURS.pack(Ask(3, "red"))]) == (Ask(3, "red"), None)
    message, payload = COLOURS.unpack([COLOURS.pack(Tell(3, "blue")), b"sky"])
    assert message == Tell(3, "blue") and payload is not None and bytes(payload) == b"sky"


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("message", [Hello(1, BUNDLE), Welcome(1, BUNDLE, 3), ErrorAnswer(1, "session", "no")], ids=str)
def test_the_common_messages_are_the_same_everywhere(schema: Schema, message: Any) -> None:
    assert schema.pack(message) == COLOURS.pack(message)
    assert schema.unpack([schema.pack(message)]) == (message, None)
    assert refusal(schema, schema.pack(message), b"payload").code == "malformed"


def test_values_of_a_schemes_own_fields() -> None:
    for value in ("green", "", None, 3, "RED"):
        error = refusal(COLOURS, msgpack.packb({"v": 5, "type": "ask", "id": 7, "colour": value}))
        assert (error.code, error.request) == ("malformed", 7)


def test_common_fields_are_checked_whatever_the_scheme_says() -> None:
    lax = Schema({"ask": Ask}, (), lambda name, value: True)
    for fields in (
        {"type": "ask", "id": -1, "colour": 1},
        {"type": "hello", "id": 1, "bundle": b""},
        {"type": "hello", "id": True, "bundle": BUNDLE},
    ):
        assert refusal(lax, msgpack.packb({"v": 5, **fields})).code == "malformed"
    assert lax.unpack([msgpack.packb({"v": 5, "type": "ask", "id": 1, "colour": [1, {}]})])[0] == Ask(1, [1, {}])  # type: ignore[arg-type]


def test_messages_of_another_schema_are_unknown() -> None:
    refusal(WORKER, COLOURS.pack(Ask(1, "red")))
    refusal(COLOURS, msgpack.packb({"v": 5, "type": "closed", "id": 1}))
    with pytest.raises(KeyError):
        WORKER.pack(Ask(1, "red"))


@pytest.mark.parametrize("frames", [[], [b"", b"", b""], [b""] * 1000])
def test_number_of_frames(frames: list[bytes]) -> None:
    assert "frames" in str(refusal(COLOURS, *frames))


def test_size_of_the_header() -> None:
    longest = ErrorAnswer(2**63 - 1, "malformed", "\U0001f512" * MAX_TEXT)
    assert len(COLOURS.pack(longest)) <= MAX_HEADER_BYTES
    refusal(COLOURS, bytes(MAX_HEADER_BYTES + 1))
    refusal(COLOURS, msgpack.packb({"v": 5, "type": "error", "id": 1, "code": "size", "text": "x" * (MAX_TEXT + 1)}))


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_any_buffer(buffer: Any) -> None:
    assert COLOURS.unpack([buffer(COLOURS.pack(Ask(1, "red")))])[0] == Ask(1, "red")


def test_the_request_is_named_where_it_can_be() -> None:
    assert refusal(COLOURS, msgpack.packb({"v": 5, "type": "ask", "id": 9})).request == 9
    assert refusal(COLOURS, msgpack.packb({"v": VERSION, "type": "what", "id": 9})).request == 9
    for unusable in (True, -1, 2**63, "9", None):
        assert refusal(COLOURS, msgpack.packb({"v": 5, "type": "what", "id": unusable})).request == 0


@given(st.integers() | st.booleans() | st.floats() | st.none(), st.integers(0, 1))
def test_counts(value: object, lowest: int) -> None:
    assert valid_count(value, lowest) == (type(value) is int and lowest <= value < 2**63)


# --- which part a worker holds


@pytest.mark.parametrize("holds", ["", "layers:1/2", "rows:2/2", "layers:4096/9999", "rows:9999/1"])
def test_holds(holds: str) -> None:
    """The form only: which parts there are is `cloven.bundle.placement`'s matter."""
    message = Welcome(1, BUNDLE, 3, holds)
    assert COLOURS.unpack([COLOURS.pack(message)]) == (message, None)


NO_PARTS = [
    *("all", "layers", "layers:", "layers:1", "layers:0/2", "layers:1/0", "layers:01/2", "layers:1/20000", "layers:10000/2", "Rows:1/2"),
    *("rows:1/2 ", " rows:1/2", "rows:1/2\n", "rows:1/2/3", "rows:-1/2", "rows:1.0/2", "columns:1/2", "rows:\u0661/2"),
    *(b"rows:1/2", None, 0, 1, True, 1.5, [], {}, ["rows:1/2"]),
]


@pytest.mark.parametrize("holds", NO_PARTS, ids=repr)
def test_what_cannot_be_held(holds: object) -> None:
    fields = {"v": VERSION, "type": "welcome", "id": 7, "bundle": BUNDLE, "groups": 3, "holds": holds}
    error = refusal(COLOURS, msgpack.packb(fields))
    assert (error.code, error.request) == ("malformed", 7)


def test_a_welcome_must_say_what_it_holds() -> None:
    """Version 1's welcome, with today's number."""
    fields = {"v": VERSION, "type": "welcome", "id": 7, "bundle": BUNDLE, "groups": 3}
    assert refusal(COLOURS, msgpack.packb(fields)).code == "malformed"
    assert refusal(COLOURS, msgpack.packb({**fields, "holds": "", "more": ""})).code == "malformed"
    assert COLOURS.unpack([msgpack.packb({**fields, "holds": ""})])[0] == Welcome(7, BUNDLE, 3)


@given(st.text(max_size=30))
def test_any_text_for_holds(text: str) -> None:
    fields = {"v": VERSION, "type": "welcome", "id": 7, "bundle": BUNDLE, "groups": 3, "holds": text}
    try:
        message, _ = COLOURS.unpack([msgpack.packb(fields)])
    except MalformedMessage:
        return
    assert message.holds == text and (text == "" or text.isascii())


@pytest.mark.parametrize("version", [1, 2, 0, -3, 3.0, True, "3", None])
def test_exactly_this_version(version: object) -> None:
    error = refusal(COLOURS, msgpack.packb({"v": version, "type": "hello", "id": 7, "bundle": BUNDLE}))
    assert (error.code, error.request) == ("version", 7) and str(error) == "this side speaks wire version 5 only"
