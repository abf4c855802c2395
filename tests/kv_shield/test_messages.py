from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.kv_shield import messages
from cloven.kv_shield.messages import (
    DTYPES,
    ENCLAVE,
    MAX_BATCH,
    MAX_POSITION,
    NO_SESSION,
    STORED_DTYPES,
    Close,
    Closed,
    Key,
    Keyed,
    Open,
    Opened,
    Restore,
    Restored,
    Seal,
    Sealed,
    SealEnd,
    SealEnded,
    Step,
    Stepped,
    Unseal,
    Unsealed,
    frame_of,
    tensor_of,
)
from cloven.wire.schema import ERROR_CODES, AskLane, ErrorAnswer, Hello, Laned, MalformedMessage, Welcome

BUNDLE, SESSION = bytes(range(16)), bytes(range(16, 32))
NUMBER, NAMES = st.integers(0, 2**63 - 1), st.binary(min_size=16, max_size=16)
BATCH, ROWS, FIRST = st.integers(1, MAX_BATCH), st.integers(1, MAX_POSITION), st.integers(0, MAX_POSITION)
DTYPE = st.sampled_from(STORED_DTYPES)
PART, SHAPE = st.sampled_from(["keys", "_v", "K9"]), st.lists(NUMBER, min_size=1, max_size=8)
MESSAGES: st.SearchStrategy[Any] = st.one_of(
    st.builds(Open, NUMBER, NAMES, BATCH),
    st.builds(Opened, NUMBER, NAMES),
    st.builds(Key, NUMBER, NAMES, NAMES, NUMBER, BATCH, ROWS, FIRST, DTYPE),
    st.builds(Keyed, NUMBER, BATCH, ROWS),
    st.builds(Restore, NUMBER, NAMES, NAMES, NUMBER, BATCH, ROWS, DTYPE),
    st.builds(Restored, NUMBER, BATCH, ROWS),
    st.builds(Close, NUMBER, NAMES, NAMES),
    st.builds(Closed, NUMBER),
    st.builds(Step, NUMBER, NAMES, NAMES, BATCH, ROWS, FIRST, DTYPE),
    st.builds(Stepped, NUMBER, NUMBER),
    st.builds(Seal, NUMBER, NAMES, NAMES, NUMBER, PART, NUMBER, SHAPE, DTYPE),
    st.builds(Sealed, NUMBER, NUMBER),
    st.builds(SealEnd, NUMBER, NAMES, NAMES, NUMBER),
    st.builds(SealEnded, NUMBER, NUMBER),
    st.builds(Unseal, NUMBER, NAMES, NAMES, NUMBER, NUMBER, PART, NUMBER, SHAPE, DTYPE),
    st.builds(Unsealed, NUMBER, NUMBER),
)
EXAMPLES: dict[str, Any] = {
    "hello": Hello(1, BUNDLE),
    "welcome": Welcome(2, BUNDLE, 16),
    "error": ErrorAnswer(3, "session", "no such session of yours"),
    "open": Open(4, BUNDLE, 2),
    "opened": Opened(4, SESSION),
    "key": Key(2**40, BUNDLE, SESSION, 7, 2, 128, 1000, "bfloat16"),
    "keyed": Keyed(2**63 - 1, 2, 128),
    "restore": Restore(6, BUNDLE, NO_SESSION, 7, 4096, 2**30, "float32"),
    "restored": Restored(6, 1, 1),
    "close": Close(8, BUNDLE, SESSION),
    "closed": Closed(8),
    "seal": Seal(9, BUNDLE, SESSION, 7, "keys", 300, [1, 8, 16, 64], "bfloat16"),
    "sealed": Sealed(9, 3),
    "seal_end": SealEnd(10, BUNDLE, SESSION, 1000),
    "seal_ended": SealEnded(10, 3),
    "unseal": Unseal(11, BUNDLE, SESSION, 3, 7, "values", 300, [1, 8, 16, 64], "float32"),
    "unsealed": Unsealed(11, 2),
    "lane": AskLane(5, BUNDLE),
    "laned": Laned(5, "cloven-" + "0f" * 16),
    "step": Step(11, BUNDLE, SESSION, 1, 2, 40, "bfloat16"),
    "stepped": Stepped(11, 32),
}
VECTORS: dict[str, str] = json.loads((Path(__file__).parents[1] / "vectors" / "kv_messages.json").read_text(encoding="utf-8"))
WITH_PAYLOAD = (Key, Keyed, Restore, Restored, Step, Seal, Sealed, Unseal, Unsealed)


def frames_of(message: Any) -> list[bytes]:
    return [ENCLAVE.pack(message), b"payload"] if isinstance(message, WITH_PAYLOAD) else [ENCLAVE.pack(message)]


def refusal(*frames: bytes) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        ENCLAVE.unpack(list(frames))
    assert caught.value.code in ERROR_CODES
    return caught.value


@settings(max_examples=200)
@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    parsed, payload = ENCLAVE.unpack(frames_of(message))
    assert parsed == message
    assert (payload is not None) == isinstance(message, WITH_PAYLOAD)


@pytest.mark.parametrize("name", EXAMPLES)
def test_vectors(name: str) -> None:
    # the bytes of wire version 1: a change here is a change of version
    assert ENCLAVE.pack(EXAMPLES[name]).hex() == VECTORS[name]
    assert ENCLAVE.unpack([bytes.fromhex(VECTORS[name]), *frames_of(EXAMPLES[name])[1:]])[0] == EXAMPLES[name]


def test_every_type_has_a_vector() -> None:
    assert set(VECTORS) == set(EXAMPLES) == set(ENCLAVE._types)


@given(MESSAGES, st.data())
def test_truncated_or_changed_bytes(message: Any, data: st.DataObject) -> None:
    frames = frames_of(message)
    refusal(frames[0][: data.draw(st.integers(0, len(frames[0]) - 1))], *frames[1:])
    refusal(frames[0] + b"\x00", *frames[1:])
    changed = bytearray(frames[0])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        ENCLAVE.unpack([bytes(changed), *frames[1:]])
    except MalformedMessage as error:
        assert error.code in ERROR_CODES


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"hello", "welcome", "error"}))
def test_schema(name: str) -> None:
    """Every field left out, or of another type; one too many; a payload where none belongs, and the reverse."""
    message = EXAMPLES[name]
    frames = frames_of(message)
    fields = msgpack.unpackb(frames[0])
    for field in fields:
        rest = {key: value for key, value in fields.items() if key != field}
        assert refusal(msgpack.packb(rest), *frames[1:]).code in ("malformed", "version")
        for wrong in (None, -1, True, 1.5, [], {}, 2**63, "?", b"bytes"):
            refusal(msgpack.packb({**fields, field: wrong}), *frames[1:])
    refusal(msgpack.packb({**fields, "extra": 1}), *frames[1:])
    refusal(*([frames[0]] if len(frames) == 2 else [frames[0], b"payload"]))
    refusal(*frames, b"", b"")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("open", {"sequences": 0}),
        ("open", {"sequences": MAX_BATCH + 1}),
        ("key", {"batch": 0}),
        ("key", {"batch": MAX_BATCH + 1}),
        ("key", {"rows": 0}),
        ("key", {"rows": MAX_POSITION + 1}),
        ("key", {"first": -1}),
        ("key", {"first": MAX_POSITION + 1}),
        ("key", {"dtype": "float"}),
        ("key", {"dtype": "int4"}),
        ("key", {"session": SESSION[:15]}),
        ("key", {"session": SESSION + b"x"}),
        ("key", {"layer": -1}),
        ("restore", {"rows": 0}),
        ("restore", {"dtype": ""}),
        ("restore", {"session": "0123456789abcdef"}),
        ("close", {"session": b""}),
        ("seal", {"part": ""}),
        ("seal", {"part": "9"}),
        ("seal", {"part": "k" * 65}),
        ("seal", {"part": "keys\n"}),
        ("seal", {"shape": []}),
        ("seal", {"shape": [1] * 9}),
        ("seal", {"shape": [1, -1]}),
        ("seal", {"shape": [1, True]}),
        ("unseal", {"epoch": -1}),
        ("unseal", {"dtype": "object"}),
        ("opened", {"session": b""}),
        ("keyed", {"rows": 0}),
        ("restored", {"batch": 0}),
    ],
    ids=str,
)
def test_ranges(name: str, change: dict[str, Any]) -> None:
    frames = frames_of(EXAMPLES[name])
    error = refusal(msgpack.packb({**msgpack.unpackb(frames[0]), **change}), *frames[1:])
    assert (error.code, error.request) == ("malformed", EXAMPLES[name].id)


def test_the_workers_messages_are_unknown_here() -> None:
    refusal(msgpack.packb({"v": 5, "type": "multiply", "id": 1, "bundle": BUNDLE, "group": 0, "rows": 1}), b"x")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_frames_of_tensors(dtype: torch.dtype) -> None:
    x = torch.arange(24).view(2, 3, 4).to(dtype)
    positions = torch.tensor([[-1, 0, 1], [5, 6, 7]], dtype=torch.int32)
    both = frame_of(positions, x)
    assert bytes(both) == bytes(frame_of(positions)) + bytes(frame_of(x))
    assert torch.equal(tensor_of(both[:24], (2, 3), torch.int32), positions)
    assert torch.equal(tensor_of(both[24:], (2, 3, 4), dtype), x)
    strided = x.transpose(0, 2)  # row-major, whatever the strides
    assert bytes(frame_of(strided)) == bytes(frame_of(strided.contiguous()))


def test_bytes_of_float32() -> None:
    assert bytes(frame_of(torch.tensor([[1.0, -2.0]]))).hex() == "0000803f000000c0"
    assert bytes(frame_of(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))).hex() == "803f00c0"


@pytest.mark.parametrize("offset", range(5))
def test_a_frame_may_lie_anywhere(offset: int) -> None:
    """C++ gets aligned numbers whatever address a message has."""
    whole = bytearray(64 + offset)
    whole[offset : offset + 8] = torch.tensor([1.0, 2.0]).numpy().tobytes()
    tensor = tensor_of(memoryview(whole)[offset : offset + 8], (2,), torch.float32)
    assert tensor.tolist() == [1.0, 2.0] and tensor.data_ptr() % 4 == 0


def test_a_read_only_frame_is_copied() -> None:
    frame = memoryview(bytes(8))
    tensor_of(frame, (2,), torch.float32)[0] = 7
    assert bytes(frame) == bytes(8)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (0, 3), (2**62, 2**62), (7,)])
def test_frames_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage) as caught:
        tensor_of(memoryview(bytes(24)), shape, torch.float32, request=9)
    assert (caught.value.code, caught.value.request) == ("size", 9)


def test_frames_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_PAYLOAD_BYTES", 20)
    with pytest.raises(MalformedMessage):
        tensor_of(memoryview(bytes(24)), (6,), torch.float32)
