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
from cloven.private_lora.messages import ADAPTER, Answer, Encrypted, EncryptedAnswer, Query, rounded, unrounded
from cloven.wire.schema import ERROR_CODES, AskLane, ErrorAnswer, Hello, Laned, MalformedMessage, Serve, Serving, Welcome
from tests.helpers import random_residues

BUNDLE = bytes(range(16))
NUMBER, ROWS = st.integers(0, 2**63 - 1), st.integers(1, 2**63 - 1)
BUNDLES = st.binary(min_size=16, max_size=16)
MESSAGES: st.SearchStrategy[Any] = st.one_of(
    st.builds(Hello, NUMBER, BUNDLES),
    st.builds(Welcome, NUMBER, BUNDLES, NUMBER),
    st.builds(Query, NUMBER, BUNDLES, NUMBER, ROWS),
    st.builds(Answer, NUMBER, ROWS),
    st.builds(Encrypted, NUMBER, BUNDLES, NUMBER),
    st.builds(EncryptedAnswer, NUMBER),
    st.builds(Serve, NUMBER, BUNDLES),
    st.builds(Serving, NUMBER, NUMBER),
    st.builds(ErrorAnswer, NUMBER, st.sampled_from(ERROR_CODES), st.text(max_size=20)),
)
EXAMPLES: dict[str, Any] = {
    "hello": Hello(1, BUNDLE),
    "welcome": Welcome(2, BUNDLE, 8),
    "query": Query(2**40, BUNDLE, 7, 128),
    "answer": Answer(2**63 - 1, 128),
    "encrypted": Encrypted(5, BUNDLE, 3),
    "encrypted_answer": EncryptedAnswer(5),
    "error": ErrorAnswer(9, "budget", "the budget of answers is used up"),
    "serve": Serve(6, BUNDLE),
    "serving": Serving(6, 16),
    "lane": AskLane(5, BUNDLE),
    "laned": Laned(5, "cloven-" + "0f" * 16),
}
WITH_PAYLOAD = (Query, Answer, Encrypted, EncryptedAnswer)
VECTORS: dict[str, str] = json.loads((Path(__file__).parents[1] / "vectors" / "adapter_messages.json").read_text(encoding="utf-8"))


def frames_of(message: Any) -> list[bytes]:
    return [ADAPTER.pack(message), b"payload"] if isinstance(message, WITH_PAYLOAD) else [ADAPTER.pack(message)]


@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    parsed, payload = ADAPTER.unpack(frames_of(message))
    assert parsed == message
    assert (payload is not None) == isinstance(message, WITH_PAYLOAD)


@pytest.mark.parametrize("name", EXAMPLES)
def test_vectors(name: str) -> None:
    # the bytes of wire version 1: a change here is a change of version
    assert ADAPTER.pack(EXAMPLES[name]).hex() == VECTORS[name]
    assert ADAPTER.unpack([bytes.fromhex(VECTORS[name]), *frames_of(EXAMPLES[name])[1:]])[0] == EXAMPLES[name]


def test_every_type_has_a_vector() -> None:
    assert set(VECTORS) - {"answer payload"} == set(EXAMPLES) == set(ADAPTER._types)


@pytest.mark.parametrize("change", [{"rows": 0}, {"rows": -1}, {"group": -1}, {"rows": 2**63}, {"rows": 1.0}, {"group": True}, {"x": 1}])
def test_malformed_queries(change: dict[str, Any]) -> None:
    fields = {"v": 5, "type": "query", "id": 5, "bundle": BUNDLE, "group": 0, "rows": 1, **change}
    with pytest.raises(MalformedMessage) as caught:
        ADAPTER.unpack([msgpack.packb(fields), b"x"])
    assert caught.value.request == 5


@given(MESSAGES)
def test_a_payload_that_is_missing_or_too_many(message: Any) -> None:
    frames = frames_of(message)
    with pytest.raises(MalformedMessage):
        ADAPTER.unpack(frames[:1] if len(frames) == 2 else [*frames, b"x"])


@settings(max_examples=150)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_arbitrary_bytes(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        ADAPTER.unpack(frames)


# --- rounded answers


def slow_rounded(z: int, bits: int) -> int:
    """⌊z / 2^(31−b)⌋ by Python integers."""
    return z // (1 << (31 - bits))


@given(st.lists(st.integers(-H, H) | st.sampled_from([H, -H, 0, -1]), min_size=1, max_size=20), st.integers(8, 16))
def test_rounding_is_the_highest_bits(values: list[int], bits: int) -> None:
    frame = rounded(torch.tensor([values], dtype=torch.int32), bits)
    q = np.frombuffer(frame, "i1" if bits == 8 else "<i2").tolist()
    assert q == [slow_rounded(z, bits) for z in values]
    assert all(-(2 ** (bits - 1)) <= value < 2 ** (bits - 1) for value in q)
    assert frame.nbytes == len(values) * (1 if bits == 8 else 2)


@given(st.lists(st.integers(-H, H) | st.sampled_from([H, -H, 0, -1]), min_size=1, max_size=20), st.integers(8, 16))
def test_the_middle_is_within_half_an_interval(values: list[int], bits: int) -> None:
    z = torch.tensor([values], dtype=torch.int32)
    middle = unrounded(rounded(z, bits), 1, len(values), bits)
    assert middle.dtype == torch.int32 and middle.shape == z.shape
    assert int((middle.to(torch.int64) - z).abs().max()) <= 2 ** (30 - bits)
    assert int(middle.abs().max()) <= H


@pytest.mark.parametrize("bits", range(8, 17))
def test_a_matrix_of_answers(bits: int) -> None:
    z = random_residues(5, 7)
    assert torch.equal(unrounded(rounded(z, bits), 5, 7, bits) >> (31 - bits), z >> (31 - bits))
    columns = z.t()  # not in the order of its memory
    assert torch.equal(unrounded(rounded(columns, bits), 7, 5, bits), unrounded(rounded(columns.contiguous(), bits), 7, 5, bits))


def test_the_same_residues_have_the_same_answer() -> None:
    """No noise of the server's own: it would average out."""
    z = random_residues(3, 50)
    assert bytes(rounded(z, 12)) == bytes(rounded(z.clone(), 12))
    assert np.unique(np.frombuffer(rounded(z, 12), "<i2")).size > 100


@pytest.mark.parametrize(("bits", "size"), [(16, 11), (16, 13), (16, 0), (8, 12), (8, 5)])
def test_an_answer_of_the_wrong_size(bits: int, size: int) -> None:
    with pytest.raises(MalformedMessage, match=f"an answer of {size} bytes"):
        unrounded(memoryview(bytes(size)), 2, 3, bits)


@pytest.mark.parametrize("bits", range(9, 16))
def test_numbers_of_more_bits_are_refused(bits: int) -> None:
    half = 2 ** (bits - 1)
    for value in (half, -half - 1, 2**15 - 1, -(2**15)):
        with pytest.raises(MalformedMessage, match="out of range"):
            unrounded(memoryview(np.array([0, value], "<i2").tobytes()), 1, 2, bits)
    for value in (half - 1, -half):
        unrounded(memoryview(np.array([0, value], "<i2").tobytes()), 1, 2, bits)


@given(st.binary(max_size=24), st.integers(0, 3), st.integers(0, 4), st.integers(8, 16))
def test_any_payload_is_residues_or_refused(payload: bytes, rows: int, width: int, bits: int) -> None:
    try:
        z = unrounded(memoryview(payload), rows, width, bits)
    except MalformedMessage:
        return
    assert z.shape == (rows, width) and (not z.numel() or int(z.abs().max()) <= H)


def test_a_vector_of_an_answer() -> None:
    z = torch.tensor([[H, -H, 0, -1, 2**15]], dtype=torch.int32)
    assert [bytes(rounded(z, bits)).hex() for bits in (16, 12, 8)] == VECTORS["answer payload"].split()
