"""The fhe backend against Python integers, against `lwe`, and against whatever a client may send."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cloven
from cloven.audit.private_lora.ciphertexts import residues, with_residues
from cloven.errors import BadInput, WorkerRefused
from cloven.field.residues import H, P
from cloven.model import runtime
from cloven.private_lora.fhe import (
    CIPHERTEXT_BYTES,
    DEGREE,
    KEY_BYTES,
    FheClient,
    FheMatrix,
    answers,
    context,
    load_ciphertext,
    rows_per_polynomial,
)
from cloven.private_lora.messages import Encrypted, EncryptedAnswer
from cloven.private_lora.query import EncryptedMatrix, RemoteMatrix
from cloven.private_lora.session import LoraSession, remote_bounds
from cloven.wire.channel import Channel
from cloven.wire.schema import MalformedMessage
from tests.helpers import centred
from tests.lora_bundles import RecordingServer, adapter_server, base_model, charged, connect, copied, ids_of, lora_bundle, merged, tensors
from tests.split_models import logits, relative_error

seal = pytest.importorskip("seal")
CLIENT = FheClient()
FHE: dict[str, Any] = {"backend": "fhe", "insecure_fhe_semi_honest": True}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=generator(seed)).to(torch.int8)


def row(columns: int, seed: int = 1) -> Tensor:
    """Any residues: the product wraps."""
    return torch.randint(-H, H + 1, (columns,), dtype=torch.int32, generator=generator(seed))


def product(w: Tensor, x: Tensor) -> list[int]:
    """W x mod p by Python integers."""
    numbers = x.tolist()
    return [centred(sum(map(mul, line, numbers))) for line in w.tolist()]


def asked(server: FheMatrix, x: Tensor, client: FheClient = CLIENT) -> list[int]:
    answer = server.answer(memoryview(client.query(x)))
    result = client.result(memoryview(answer), server.rows, server.columns)
    assert result.dtype == torch.int32
    values: list[int] = result.tolist()
    return values


# --- exactness

SHAPES = [
    *[(1, 1), (4, 1), (3, 7), (16, 256), (8, 1000)],  # 1000 does not divide 4096: coefficients are left over
    *[(17, 1024), (5, 1365), (3, 2048), (3, 2049)],  # 17 rows: more than the 4 that one polynomial holds
    *[(2, DEGREE - 1), (2, DEGREE), (2, DEGREE + 1), (3, 2 * DEGREE), (2, 10_001)],  # several chunks of columns
    (4100, 1),  # one coefficient per row
]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_are_those_of_python_integers(rows: int, columns: int) -> None:
    w, x = codes(rows, columns), row(columns)
    server = FheMatrix(w)
    assert asked(server, x) == product(w, x)
    assert FheMatrix(w, sanitise=False).rows == server.rows == rows and server.columns == columns


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_small_shapes_with_and_without_sanitising(rows: int, columns: int, seed: int, sanitise: bool) -> None:
    w, x = codes(rows, columns, seed), row(columns, seed + 1)
    assert asked(FheMatrix(w, sanitise=sanitise), x) == product(w, x)


@pytest.mark.parametrize("value", [127, -127])
@pytest.mark.parametrize("columns", [64, DEGREE, DEGREE + 5])
def test_the_largest_numbers(value: int, columns: int) -> None:
    """Noise of the ciphertexts is largest here."""
    w, x = torch.full((2, columns), value, dtype=torch.int8), torch.full((columns,), H, dtype=torch.int32)
    x[::3] = -H
    assert asked(FheMatrix(w), x) == product(w, x)


@pytest.mark.parametrize("columns", [5, DEGREE, DEGREE + 5])
def test_zeros(columns: int) -> None:
    w, x = codes(3, columns), row(columns)
    w[1] = 0
    assert asked(FheMatrix(w), x) == product(w, x)
    w[:] = 0
    for sanitise in (True, False):
        assert asked(FheMatrix(w, sanitise=sanitise), x) == [0, 0, 0]
    assert asked(FheMatrix(codes(3, columns)), torch.zeros(columns, dtype=torch.int32)) == [0, 0, 0]
    one = torch.zeros(columns, dtype=torch.int32)
    one[columns - 1] = 1
    assert asked(FheMatrix(codes(3, columns)), one) == codes(3, columns)[:, -1].tolist()


def test_a_chunk_of_columns_without_weights() -> None:
    w = codes(3, DEGREE + 20)
    w[:, DEGREE:] = 0
    x = row(DEGREE + 20)
    assert asked(FheMatrix(w), x) == product(w, x)


@given(st.integers(1, 50), st.integers(1, 20_000))
def test_sizes(rows: int, columns: int) -> None:
    step = rows_per_polynomial(columns)
    assert step >= 1 and (step == 1 or step * columns <= DEGREE < (step + 1) * columns)
    assert (answers(rows, columns) - 1) * step < rows <= answers(rows, columns) * step


def test_clients_have_keys_of_their_own_and_queries_are_fresh() -> None:
    other, x = FheClient(), row(8)
    assert other.public_key != CLIENT.public_key and CLIENT.query(x)[KEY_BYTES:] != CLIENT.query(x)[KEY_BYTES:]
    server = FheMatrix(codes(2, 8))
    assert asked(server, x, other) == asked(server, x) == product(codes(2, 8), x)
    query = CLIENT.query(x)
    assert server.answer(memoryview(query)) != server.answer(memoryview(query))
    assert repr(CLIENT) == "FheClient(<secret>)"


def test_what_else_is_in_an_answer_is_random() -> None:
    """With sanitising, all coefficients but the answers are uniform: the decryption shows nothing of the other sums."""
    server, query = FheMatrix(codes(2, 64)), memoryview(CLIENT.query(row(64)))
    plain = [CLIENT._decryptor.decrypt(load_ciphertext(seal, CLIENT._context, server.answer(query))).to_string() for _ in range(2)]
    terms = [dict(reversed(term.split("x^")) for term in text.split(" + ") if "x^" in term) for text in plain]
    same = [power for power in terms[0] if terms[0][power] == terms[1].get(power)]
    assert sorted(map(int, same)) == [63, 127] and len(terms[0]) > DEGREE - 64 - 10  # rows that are not there stay zero


# --- what a client may send


def damaged(change: Callable[[bytes], bytes]) -> bytes:
    return change(CLIENT.query(row(64)))


def random_bytes(query: bytes) -> bytes:
    return secrets.token_bytes(len(query))


def random_ciphertext(query: bytes) -> bytes:
    return query[:KEY_BYTES] + secrets.token_bytes(CIPHERTEXT_BYTES)


def random_key(query: bytes) -> bytes:
    return secrets.token_bytes(KEY_BYTES) + query[KEY_BYTES:]


def numbers_beyond_the_primes(query: bytes) -> bytes:
    numbers = residues(query[KEY_BYTES:])
    numbers[0, 0, 0] = 2**63
    return query[:KEY_BYTES] + with_residues(query[KEY_BYTES:], numbers)


def ntt_form(query: bytes) -> bytes:
    return query[:KEY_BYTES] + with_residues(query[KEY_BYTES:], residues(query[KEY_BYTES:]), ntt=True)


def zeros(query: bytes) -> bytes:
    return bytes(len(query))


def transparent(query: bytes) -> bytes:
    """c₁ = 0: the plaintext lies open. A product of it with zero weights would make SEAL throw."""
    numbers = residues(query[KEY_BYTES:])
    numbers[:] = 0
    return query[:KEY_BYTES] + with_residues(query[KEY_BYTES:], numbers)


def halves_swapped(query: bytes) -> bytes:
    return query[CIPHERTEXT_BYTES:] + query[:CIPHERTEXT_BYTES]


def other_plain_modulus(degree: int = DEGREE) -> Any:
    parameters = seal.EncryptionParameters(seal.scheme_type.bfv)
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus(seal.CoeffModulus.BFVDefault(degree))
    parameters.set_plain_modulus(65_537)
    return seal.SEALContext(parameters)


def foreign_key(query: bytes) -> bytes:
    key = bytes(seal.KeyGenerator(other_plain_modulus()).create_public_key().to_string())
    assert len(key) == KEY_BYTES
    return key + query[KEY_BYTES:]


def foreign_ciphertext(query: bytes) -> bytes:
    within = other_plain_modulus()
    encryptor = seal.Encryptor(within, seal.KeyGenerator(within).create_public_key())
    ciphertext = bytes(encryptor.encrypt(seal.Plaintext("1x^1")).to_string())
    assert len(ciphertext) == CIPHERTEXT_BYTES
    return query[:KEY_BYTES] + ciphertext


def secret_key_as_ciphertext(query: bytes) -> bytes:
    secret = bytes(seal.KeyGenerator(CLIENT._context).secret_key().to_string())
    return query[:KEY_BYTES] + secret.ljust(CIPHERTEXT_BYTES, b"\0")[:CIPHERTEXT_BYTES]


def too_short(query: bytes) -> bytes:
    return query[:-1]


def empty(query: bytes) -> bytes:
    return query[:0]


MALICE = [
    *[random_bytes, random_ciphertext, random_key, zeros, halves_swapped, numbers_beyond_the_primes],
    *[ntt_form, foreign_key, foreign_ciphertext, secret_key_as_ciphertext],
]


@pytest.mark.parametrize("change", MALICE, ids=lambda change: change.__name__)
def test_what_is_no_query_is_malformed(change: Callable[[bytes], bytes]) -> None:
    server = FheMatrix(codes(3, 64))
    with pytest.raises(MalformedMessage) as caught:
        server.answer(memoryview(damaged(change)))
    assert caught.value.code == "malformed"
    assert asked(server, row(64)) == product(codes(3, 64), row(64))


@pytest.mark.parametrize("off", [-1, 1, -CIPHERTEXT_BYTES, CIPHERTEXT_BYTES, -KEY_BYTES])
def test_sizes_are_checked_first(off: int) -> None:
    query = CLIENT.query(row(64))
    wrong = query[:off] if off < 0 else query + bytes(off)
    with pytest.raises(MalformedMessage, match=f"a query of {len(wrong)} bytes") as caught:
        FheMatrix(codes(3, 64)).answer(memoryview(wrong))
    assert caught.value.code == "size"


def test_a_query_for_another_number_of_columns() -> None:
    with pytest.raises(MalformedMessage, match="a query of"):
        FheMatrix(codes(3, DEGREE + 1)).answer(memoryview(CLIENT.query(row(64))))
    with pytest.raises(MalformedMessage, match="a query of"):
        FheMatrix(codes(3, 64)).answer(memoryview(CLIENT.query(row(DEGREE + 1))))


@given(st.integers(0, KEY_BYTES + CIPHERTEXT_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_gives_an_answer_or_an_error_of_ours(place: int, by: int) -> None:
    server, query = SMALL, bytearray(CLIENT.query(row(4)))
    query[place] ^= by
    try:
        answer = server.answer(memoryview(bytes(query)))
    except MalformedMessage as error:
        assert error.code in ("malformed", "size")
    else:
        assert len(answer) == CIPHERTEXT_BYTES * answers(2, 4)


@given(st.integers(0, 200))  # header, parameters' id, flags and sizes
def test_any_changed_byte_of_a_header(place: int) -> None:
    for first in (0, KEY_BYTES):
        query = bytearray(CLIENT.query(row(4)))
        query[first + place] ^= 0xFF
        try:
            assert len(SMALL.answer(memoryview(bytes(query)))) == CIPHERTEXT_BYTES
        except MalformedMessage as error:
            assert error.code == "malformed"


SMALL = FheMatrix(codes(2, 4))


def test_only_fresh_ciphertexts_are_loaded() -> None:
    evaluator = seal.Evaluator(CLIENT._context)
    fresh = seal.Ciphertext()
    fresh.load_bytes(CLIENT._context, CLIENT.query(row(4))[KEY_BYTES:])
    larger, lower, ntt = evaluator.square(fresh), evaluator.mod_switch_to_next(fresh), evaluator.transform_to_ntt(fresh)
    assert load_ciphertext(seal, CLIENT._context, bytes(fresh.to_string())).size() == 2
    for other in (larger, lower, ntt):
        with pytest.raises(MalformedMessage, match="no fresh ciphertext"):
            load_ciphertext(seal, CLIENT._context, bytes(other.to_string()))
    for data in (b"", b"x", bytes(CIPHERTEXT_BYTES), bytes(fresh.to_string())[:-1]):
        with pytest.raises(MalformedMessage, match="no ciphertext"):
            load_ciphertext(seal, CLIENT._context, data)


def test_a_transparent_query_does_not_harm_the_server() -> None:
    server = FheMatrix(codes(3, 64))
    try:
        assert len(server.answer(memoryview(damaged(transparent)))) == CIPHERTEXT_BYTES
    except MalformedMessage as error:
        assert error.code == "malformed"
    assert asked(server, row(64)) == product(codes(3, 64), row(64))


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a + b"x", lambda a: b"", lambda a: secrets.token_bytes(len(a))])
def test_what_is_no_answer_is_malformed(change: Callable[[bytes], bytes]) -> None:
    answer = SMALL.answer(memoryview(CLIENT.query(row(4))))
    with pytest.raises(MalformedMessage):
        CLIENT.result(memoryview(change(answer)), 2, 4)


# --- over the wire


def encrypted_query(session: LoraSession, group: int, payload: bytes) -> memoryview:
    """Send anything as a query of the fhe backend; the answer's payload."""

    def parse(message: Any, answer: memoryview | None) -> memoryview | None:
        return answer if isinstance(message, EncryptedAnswer) else None

    request = Encrypted(session.channel.next_id(), session.channel.bundle, group)
    return session.channel.exchange("test", request, [payload], parse)


def test_the_model_with_fhe_and_with_lwe_is_pefts(tmp_path: Path, socket_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s", insecure_fhe_semi_honest=True) as server:
        ids = ids_of(1, 3)
        wanted = logits(merged(), ids)
        model, session = connect(out, server._address, **FHE)
        assert [record.message for record in caplog.records if "INSECURE: the fhe backend" in record.message] != []
        with session:
            fhe = logits(model, ids)
            assert relative_error(fhe, wanted) < 1e-3 and charged(server) >= 3
            exact = products(session)
        model, session = connect(out, server._address)
        with session:
            lwe = logits(model, ids)
            assert relative_error(lwe, fhe) < 1e-3
            compare_products(session, exact, out)


def inputs(session: LoraSession, index: int) -> Tensor:
    return torch.randn(2, session.remote[index].columns, dtype=torch.float64, generator=generator(index))


def products(session: LoraSession) -> list[Tensor]:
    assert all(isinstance(remote, EncryptedMatrix) for remote in session.remote)
    return [remote.product(inputs(session, index), lambda: None) for index, remote in enumerate(session.remote)]


def compare_products(session: LoraSession, exact: list[Tensor], out: Path) -> None:
    """lwe − fhe, within the bound on lwe's noise and on both roundings of x; fhe = W x within the rounding of x."""
    matrices = tensors(out / "server" / "adapter.safetensors")
    for index, (remote, fhe) in enumerate(zip(session.remote, exact, strict=True)):
        assert isinstance(remote, RemoteMatrix)
        x, w = inputs(session, index), matrices[str(index)][:, remote.pad :].double()
        room = H - 0.5 * remote.bounds.l1 - remote.noise
        unit = max(1.0, remote.bounds.l2) * x.norm(dim=1, keepdim=True) / room  # 1/α of lwe, the larger one
        rounding = 0.5 * w.abs().sum(1).max() + 1
        assert bool(((fhe - x @ w.t()).abs() <= rounding * unit).all())
        difference = (remote.product(x, lambda: None) - fhe).abs()
        assert bool((difference <= (2 * rounding + remote.noise) * unit).all()) and float(difference.max()) > 0


def test_no_rows() -> None:
    matrix = EncryptedMatrix("layer", 0, 4, 3, remote_bounds(BOUNDS), CLIENT, None)  # type: ignore[arg-type]
    assert matrix.product(torch.empty(0, 3, dtype=torch.float64), lambda: None).shape == (0, 4)


class BOUNDS:
    """As much of a `ClientGroup` as bounds need."""

    l2, columns = 200, 3


def test_off_by_default_at_the_server(tmp_path: Path, socket_folder: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s") as server:
        model, session = connect(out, server._address, **FHE)
        with session, pytest.raises(WorkerRefused, match="the fhe backend is off: it needs --insecure-fhe-semi-honest at the server"):
            logits(model, ids_of(1, 2))
        assert charged(server) == 0


def test_off_by_default_at_the_client(tmp_path: Path, socket_folder: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    for options in ({"backend": "fhe"}, {"backend": "fhe", "insecure_fhe_semi_honest": False}):
        with pytest.raises(BadInput, match="needs insecure_fhe_semi_honest on both sides"):
            cloven.adapt(base_model(), out / "client", f"ipc://{socket_folder}/s", **options)
    with pytest.raises(BadInput, match="choose lwe or fhe"):
        cloven.adapt(base_model(), out / "client", f"ipc://{socket_folder}/s", backend="ckks")


def test_the_server_lives_on_whatever_it_is_sent(tmp_path: Path, socket_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s", insecure_fhe_semi_honest=True) as server:
        _, session = connect(out, server._address, **FHE)
        columns = session.remote[0].columns
        query = CLIENT.query(row(columns))
        with session:
            for change in (*MALICE, too_short, empty):
                with pytest.raises(WorkerRefused, match=r"malformed|size"):
                    encrypted_query(session, 0, change(query))
            with pytest.raises(WorkerRefused, match="no group 99"):
                encrypted_query(session, 99, query)
            answer = encrypted_query(session, 0, query)
            w = tensors(out / "server" / "adapter.safetensors")["0"][:, 1280:]
            assert CLIENT.result(answer, len(w), columns).tolist() == product(w, row(columns))
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        assert isinstance(server, RecordingServer) and server.answered >= 2  # hello, perhaps once more, and the last


def test_an_answer_of_another_size_ends_in_an_error(tmp_path: Path, socket_folder: Path) -> None:
    class Short(RecordingServer):
        def answer(self, frames: list[Any], peer: str) -> list[Any]:
            header, *payload = super().answer(frames, peer)
            return [header, *(part[:-1] for part in payload)]

    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s", Short, insecure_fhe_semi_honest=True) as server:
        model, session = connect(out, server._address, **FHE)
        with session, pytest.raises(WorkerRefused, match="answer is malformed: an answer of"):
            logits(model, ids_of(1, 1))


# --- without SEAL


def test_without_seal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, socket_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "seal", None)
    for make in (context, FheClient, lambda: FheMatrix(codes(2, 4))):
        with pytest.raises(BadInput, match=r"the fhe backend needs SEAL: pip install 'cloven\[fhe\]'"):
            make()
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s") as server:
        model, session = connect(out, server._address)  # lwe does not need it
        with session:
            assert relative_error(logits(model, ids_of(1, 2)), logits(merged(), ids_of(1, 2))) < 1e-3


def test_a_client_without_seal_is_told_so_and_leaves_no_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, socket_folder: Path
) -> None:
    """An open socket would show as a ResourceWarning in another test."""
    channels: list[Channel] = []

    class Kept(Channel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            channels.append(self)

    monkeypatch.setitem(sys.modules, "seal", None)
    monkeypatch.setattr(runtime, "Channel", Kept)
    out = copied(lora_bundle(), tmp_path / "out")
    with adapter_server(out / "server", f"ipc://{socket_folder}/s") as server, pytest.raises(BadInput, match="needs SEAL"):
        connect(out, server._address, **FHE)
    (channel,) = channels
    closed = channel._socket.closed
    channel.close()
    assert closed


def test_a_server_that_is_to_answer_fhe_says_at_its_start_that_seal_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, socket_folder: Path
) -> None:
    """It would fail on every encrypted query otherwise."""
    monkeypatch.setitem(sys.modules, "seal", None)
    out = copied(lora_bundle(), tmp_path / "out")
    with (
        pytest.raises(BadInput, match="needs SEAL"),
        adapter_server(out / "server", f"ipc://{socket_folder}/s", insecure_fhe_semi_honest=True),
    ):
        pass


def test_the_plaintext_modulus_is_the_fields() -> None:
    assert context().first_context_data().parms().plain_modulus().value() == P
