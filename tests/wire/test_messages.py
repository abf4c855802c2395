from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.field.residues import H
from cloven.wire import messages
from cloven.wire.limits import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_TEXT
from cloven.wire.messages import Message, Multiply, Product, Serve, Serving, pack, residue_frame, residues_of_frame, unpack
from cloven.wire.schema import ERROR_CODES, AskLane, ErrorAnswer, Hello, Laned, MalformedMessage, Welcome

BUNDLE = bytes(range(16))
NUMBER = st.integers(0, 2**63 - 1)
ROWS = st.integers(1, 2**63 - 1)
BUNDLES = st.binary(min_size=16, max_size=16)
TEXT = st.text(max_size=MAX_TEXT)  # without surrogates
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, NUMBER, BUNDLES),
    st.builds(Welcome, NUMBER, BUNDLES, NUMBER),
    st.builds(Multiply, NUMBER, BUNDLES, NUMBER, ROWS),
    st.builds(Product, NUMBER, ROWS),
    st.builds(Serve, NUMBER, BUNDLES),
    st.builds(Serving, NUMBER, NUMBER),
    st.builds(ErrorAnswer, NUMBER, st.sampled_from(ERROR_CODES), TEXT),
)
EXAMPLES: dict[str, Any] = {
    "hello": Hello(1, BUNDLE),
    "welcome": Welcome(2, BUNDLE, 29),
    "multiply": Multiply(2**40, BUNDLE, 7, 128),
    "product": Product(2**63 - 1, 128),
    "error": ErrorAnswer(0, "size", "a payload of 3 bytes"),
    "lane": AskLane(5, BUNDLE),
    "serve": Serve(6, BUNDLE),
    "serving": Serving(6, 16),
    "laned": Laned(5, "cloven-" + "0f" * 16),
}
VECTORS: dict[str, str] = json.loads((Path(__file__).parents[1] / "vectors" / "messages.json").read_text(encoding="utf-8"))


def frames_of(message: Message) -> list[bytes]:
    return [pack(message), b"payload"] if isinstance(message, Multiply | Product) else [pack(message)]


def header(**changes: object) -> bytes:
    """A hello with fields changed; a value of `...` removes one."""
    fields: dict[str, object] = {"v": 5, "type": "hello", "id": 5, "bundle": BUNDLE, **changes}
    return bytes(msgpack.packb({key: value for key, value in fields.items() if value is not ...}))


def refusal(*frames: bytes) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        unpack(list(frames))
    assert caught.value.code in ERROR_CODES
    assert len(str(caught.value)) <= MAX_TEXT
    return caught.value


@given(MESSAGES)
def test_round_trip(message: Message) -> None:
    parsed, payload = unpack(frames_of(message))
    assert parsed == message
    assert (payload is not None) == isinstance(message, Multiply | Product)
    assert payload is None or bytes(payload) == b"payload"


def test_the_longest_text_fits_in_a_header() -> None:
    for character in ("x", "é", "\U0001f512"):
        message = ErrorAnswer(2**63 - 1, "malformed", character * MAX_TEXT)
        assert unpack([pack(message)])[0] == message


@pytest.mark.parametrize("name", EXAMPLES)
def test_vectors(name: str) -> None:
    # the bytes of wire version 5: a change here is a change of version
    assert pack(EXAMPLES[name]).hex() == VECTORS[name]
    assert unpack([bytes.fromhex(VECTORS[name]), *frames_of(EXAMPLES[name])[1:]])[0] == EXAMPLES[name]


def test_every_type_has_a_vector() -> None:
    assert set(VECTORS) == set(EXAMPLES) == set(messages.WORKER._types)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_arbitrary_bytes(frames: list[bytes]) -> None:
    refusal(*frames)


OBJECTS: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20)
    | st.sampled_from(["hello", "multiply", "product", BUNDLE, 1])
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["v", "type", "id", "bundle", "group", "rows", "text", "code"]) | st.text(max_size=3), inner, max_size=6
        )
        | st.dictionaries(st.integers(0, 3) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(OBJECTS, st.lists(st.binary(max_size=8), max_size=1))
def test_arbitrary_msgpack(content: object, payload: list[bytes]) -> None:
    try:
        unpack([msgpack.packb(content), *payload])
    except MalformedMessage as error:
        assert error.code in ERROR_CODES


@given(MESSAGES, st.data())
def test_truncated_or_changed_bytes(message: Message, data: st.DataObject) -> None:
    frames = frames_of(message)
    cut = data.draw(st.integers(0, len(frames[0]) - 1))
    refusal(frames[0][:cut], *frames[1:])
    refusal(frames[0] + b"\x00", *frames[1:])
    changed = bytearray(frames[0])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        unpack([bytes(changed), *frames[1:]])
    except MalformedMessage as error:
        assert error.code in ERROR_CODES


@pytest.mark.parametrize("version", [0, 1, 2, -1, True, 1.0, "1", None, ..., [1], 2**64 - 1])
def test_another_version(version: object) -> None:
    error = refusal(header(v=version))
    assert error.code == "version"
    assert error.request == 5  # the answer can say to whom


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"bundle": ...},
        {"id": ...},
        {"type": ...},
        {"type": "goodbye"},
        {"type": 3},
        {"type": ["hello"]},
        {"type": "multiply"},
        {"type": "welcome"},
        {"id": -1},
        {"id": 2**63},
        {"id": True},
        {"id": 1.0},
        {"id": "1"},
        {"bundle": BUNDLE[:15]},
        {"bundle": BUNDLE + b"x"},
        {"bundle": "0123456789abcdef"},
        {"bundle": None},
        {"bundle": msgpack.ExtType(1, BUNDLE)},
        {"bundle": msgpack.Timestamp(1)},
    ],
    ids=str,
)
def test_schema(changes: dict[str, object]) -> None:
    assert refusal(header(**changes)).code == "malformed"


@pytest.mark.parametrize(
    "content",
    [
        {"v": 5, "type": "multiply", "id": 1, "bundle": BUNDLE, "group": 0, "rows": 0},
        {"v": 5, "type": "multiply", "id": 1, "bundle": BUNDLE, "group": -1, "rows": 1},
        {"v": 5, "type": "multiply", "id": 1, "bundle": BUNDLE, "group": 0, "rows": 2**63},
        {"v": 5, "type": "product", "id": 1, "rows": 0},
        {"v": 5, "type": "product", "id": 1, "rows": True},
    ],
)
def test_schema_of_messages_with_a_payload(content: dict[str, object]) -> None:
    assert refusal(msgpack.packb(content), b"x").code == "malformed"


@pytest.mark.parametrize("code", ["", "fatal", 3, None])
def test_unknown_error_code(code: object) -> None:
    refusal(msgpack.packb({"v": 5, "type": "error", "id": 1, "code": code, "text": ""}))


def test_long_error_text() -> None:
    refusal(msgpack.packb({"v": 5, "type": "error", "id": 1, "code": "size", "text": "x" * (MAX_TEXT + 1)}))


def test_payload_where_there_is_none_and_the_reverse() -> None:
    refusal(pack(Hello(1, BUNDLE)), b"payload")
    refusal(pack(Multiply(1, BUNDLE, 0, 1)))


def test_number_of_frames() -> None:
    refusal()
    refusal(pack(Multiply(1, BUNDLE, 0, 1)), b"x", b"y")
    refusal(*[b""] * 1000)


def test_oversized_header() -> None:
    assert "bytes" in str(refusal(header(extra=b"x" * MAX_HEADER_BYTES)))
    refusal(b"\xc1" * (MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",  # never used in msgpack
        b"\x91" * 1000,  # arrays in arrays
        b"\x81\xa1a" * 300,
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 − 1 entries
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\xc9\xff\xff\xff\xff\x01",  # 4 GiB of extension
        b"\x81\xa1v\xd9\x02\xff\xfe",  # not UTF-8
        header() + header(),
    ],
)
def test_hostile_headers(raw: bytes) -> None:
    assert refusal(raw).code in ("malformed", "version")


def test_residue_frames() -> None:
    residues = torch.tensor([[1, -2, H], [-H, 0, 5]], dtype=torch.int32)
    frame = residue_frame(residues)
    assert bytes(frame) == np.array([[1, -2, H], [-H, 0, 5]], dtype="<i4").tobytes()
    assert torch.equal(residues_of_frame(frame, 2, 3), residues)
    assert bytes(residue_frame(residues.t())) == bytes(residue_frame(residues.t().contiguous()))  # row-major, whatever the strides
    read_only = residues_of_frame(memoryview(bytes(frame)), 2, 3)
    read_only[0, 0] = 7  # a private copy where the buffer is read-only
    assert torch.equal(residues_of_frame(memoryview(bytes(frame)), 2, 3), residues)


@pytest.mark.parametrize(("rows", "width"), [(2, 4), (1, 3), (3, 3), (0, 3), (2, 2**40), (2**62, 2**62)])
def test_residue_frame_of_another_size(rows: int, width: int) -> None:
    with pytest.raises(MalformedMessage) as caught:
        residues_of_frame(memoryview(bytes(24)), rows, width, request=9)
    assert (caught.value.code, caught.value.request) == ("size", 9)


def test_residue_frame_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PAYLOAD_BYTES % 4 == 0
    monkeypatch.setattr(messages, "MAX_PAYLOAD_BYTES", 20)
    with pytest.raises(MalformedMessage):
        residues_of_frame(memoryview(bytes(24)), 2, 3)


@pytest.mark.parametrize("value", [H + 1, -H - 1, 2**31 - 1, -(2**31)])
def test_no_residue(value: int) -> None:
    frame = np.array([[0, value]], dtype="<i4").tobytes()
    with pytest.raises(MalformedMessage, match="no residue") as caught:
        residues_of_frame(memoryview(frame), 1, 2)
    assert caught.value.code == "malformed"
