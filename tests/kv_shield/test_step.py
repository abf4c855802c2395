"""A pass over a few rows in one go: C++ against PyTorch, what is counted, and what may go wrong on the way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cloven
from cloven.errors import WorkerRefused, WorkerUnreachable
from cloven.kv_shield import enclave as enclave_module
from cloven.kv_shield import enclave_step
from cloven.kv_shield.enclave import Enclave
from cloven.kv_shield.enclave_step import EnclaveStep, library
from cloven.kv_shield.messages import NO_SESSION, Close, Closed, Step, Stepped, frame_of
from cloven.kv_shield.session import KvSession
from cloven.model.cache_argument import cache_of, with_cache
from cloven.wire.channel import Channel
from cloven.wire.lane import CAPACITY, lanes_available
from cloven.wire.schema import MalformedMessage
from tests.kv_bundles import (
    FAMILIES,
    FLOAT32_TOLERANCE,
    MODES,
    RecordingServer,
    attached,
    by_sequence,
    deviation,
    enclave,
    ids_of,
    kv_bundle,
    load,
    positions_of,
    random_rows,
    small_enclave,
    stored_keys,
)
from tests.kv_shield.sealing import sealing_bundle
from tests.kv_shield.test_service import needles
from tests.split_models import tiny

pytestmark = pytest.mark.skipif(library() is None or not lanes_available(), reason="no compiler built the libraries")
ME, YOU = "a" * 64, "b" * 64
LAYERS = 2


def begun(enclave: Enclave, name: bytes, first: int = 0, batch: int = 1, rows: int = 2, dtype: torch.dtype = torch.float32) -> EnclaveStep:
    step = enclave.begin(name, first, positions_of(batch, rows, first), dtype, ME)
    assert step is not None
    return step


def counts(enclave: Enclave, name: bytes) -> tuple[list[int], list[int], int]:
    session = enclave._sessions[name]
    return session.keyed, session.restored, len(session.steps)


# --- arithmetic


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Calls an enclave's method as if nobody had compiled anything."""

    def called(method: Callable[..., Tensor], *arguments: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(enclave_module, "library", lambda: None)
            return method(*arguments)

    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_permute_as_pytorch_computes_it(family: str, dtype: torch.dtype, in_pytorch: Callable[..., Tensor]) -> None:
    enclave = small_enclave("permute", family)
    step = begun(enclave, NO_SESSION, first=3, batch=2, rows=4, dtype=dtype)
    positions = positions_of(2, 4, 3)
    for layer in range(LAYERS):
        x, a = (random_rows(2, 4, width(layer), dtype=dtype) for width in (enclave.widths_in, enclave.width_keyed))
        if (layer, True) in step.calls:
            expected = in_pytorch(enclave.key, layer, x, positions, NO_SESSION, 3, ME)
            tolerance = 0.0 if family != "qwen3" else (1e-6 if dtype == torch.float32 else 0.02)  # the norm's sum runs in another order
            assert deviation(step.compute(layer, True, x, x.shape[-1]), expected) <= tolerance
        assert torch.equal(step.compute(layer, False, a, a.shape[-1]), in_pytorch(enclave.restore, layer, a, NO_SESSION, ME))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_session_under_the_same_keys(family: str, dtype: torch.dtype, in_pytorch: Callable[..., Tensor]) -> None:
    """q' is PyTorch's; k' and v' differ by their noise: undone, they are the k and v that PyTorch keyed."""
    enclave = small_enclave("session", family)
    name = enclave.open(2, ME)
    tolerance = 2e-5 if dtype == torch.float32 else 0.06
    shape = enclave.manifest.layers[0]
    size = shape.head_dim + enclave.noise
    step = begun(enclave, name, batch=2, rows=3, dtype=dtype)
    enclave.end(step)  # the calls below do not come through a lane
    for layer in range(LAYERS):
        x = random_rows(2, 3, enclave.widths_in(layer), dtype=dtype)
        expected = in_pytorch(enclave.key, layer, x, positions_of(2, 3), name, 0, ME).unflatten(2, (-1, size)).double()
        ours = step.compute(layer, True, x, expected.shape[2] * size).unflatten(2, (-1, size)).double()
        keys = enclave._sessions[name].keys[layer]
        assert keys is not None
        assert deviation(ours[:, :, : shape.heads], expected[:, :, : shape.heads]) < tolerance
        for row, key in enumerate(by_sequence(keys)):
            for part, inverse in enumerate((key.k_inverse, key.v_inverse)):
                heads = slice(shape.heads + part * shape.kv_heads, shape.heads + (part + 1) * shape.kv_heads)
                undone = [torch.einsum("sgd,gde->sge", rows[row, :, heads], inverse.double()) for rows in (ours, expected)]
                plain = [rows[..., : shape.head_dim] for rows in undone]
                assert deviation(plain[0], plain[1]) < tolerance
                noise = [rows[..., shape.head_dim :] for rows in undone]
                assert not torch.allclose(noise[0], noise[1], rtol=0.1)
                assert 0.5 < float(noise[0].std() / noise[1].std()) < 2
        a = random_rows(2, 3, enclave.width_keyed(layer), dtype=dtype)
        assert deviation(step.compute(layer, False, a, shape.widths()[0]), in_pytorch(enclave.restore, layer, a, name, ME)) < tolerance


def test_not_a_number_and_infinity() -> None:
    enclave = small_enclave("permute")
    step = begun(enclave, NO_SESSION, rows=1, dtype=torch.bfloat16)
    a = random_rows(1, 1, enclave.width_keyed(0), dtype=torch.bfloat16)
    a[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert torch.equal(step.compute(0, False, a, a.shape[-1]).isfinite(), enclave.restore(0, a, NO_SESSION, ME).isfinite())


# --- what is counted


def test_all_rows_are_counted_before_the_first_one() -> None:
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    step = begun(enclave, name)
    assert counts(enclave, name) == ([2, 2], [2, 2], 1)
    for attempt in (
        lambda: begun(enclave, name),
        lambda: enclave.key(0, random_rows(1, 2, enclave.widths_in(0)), positions_of(1, 2), name, 0, ME),
    ):
        with pytest.raises(MalformedMessage, match="each is keyed once"):
            attempt()
    with pytest.raises(MalformedMessage, match="than were keyed"):
        enclave.restore(0, random_rows(1, 1, enclave.width_keyed(0)), name, ME)
    enclave.end(step)
    assert counts(enclave, name) == ([0, 0], [0, 0], 0)


@pytest.mark.parametrize(
    ("calls", "keyed", "restored"), [(1, [2, 0], [0, 0]), (2, [2, 0], [2, 0]), (3, [2, 2], [2, 0]), (4, [2, 2], [2, 2])]
)
def test_only_calls_that_were_made_stay_counted(calls: int, keyed: list[int], restored: list[int]) -> None:
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    step = begun(enclave, name)
    step.state.call = calls
    enclave.end(step)
    assert counts(enclave, name) == (keyed, restored, 0)


def test_nothing_is_given_back_behind_another_pass() -> None:
    """Or a place could be keyed twice."""
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    first = begun(enclave, name)
    second = begun(enclave, name, first=2)
    enclave.end(first)
    assert counts(enclave, name)[0] == [4, 4]
    enclave.end(second)
    assert counts(enclave, name)[0] == [2, 2]


def test_the_noise_of_two_passes_differs() -> None:
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    x = random_rows(1, 1, enclave.widths_in(0))
    width = sum(enclave.manifest.layers[0].widths(enclave.noise))
    rows = []
    for _ in range(2):
        step = begun(enclave, name, rows=1)
        rows.append(step.compute(0, True, x, width))
        enclave.end(step)
    q = enclave.manifest.layers[0].widths(enclave.noise)[0]
    assert torch.equal(rows[0][..., :q], rows[1][..., :q]) and not torch.allclose(rows[0][..., q:], rows[1][..., q:], rtol=0.01)


def test_no_sealing_during_a_pass() -> None:
    enclave = Enclave(sealing_bundle("llama", "session") / "trusted")
    name = enclave.open(1, ME)
    step = begun(enclave, name)
    with pytest.raises(MalformedMessage, match="under way"):
        enclave.vault(name, ME)
    enclave.end(step)
    assert enclave.vault(name, ME).state == "open"


def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    pads = torch.tensor([[-1, 0]], dtype=torch.int32)
    assert enclave.begin(name, 0, pads, torch.float32, ME) is None
    widest = sum(enclave.manifest.layers[0].widths(enclave.noise))
    assert enclave.begin(name, 0, positions_of(1, CAPACITY // (4 * widest) + 1), torch.float32, ME) is None
    with monkeypatch.context() as patch:
        patch.setattr("cloven.kv_shield.shapes.STEP_NOISE", 10)
        assert enclave.begin(name, 0, positions_of(1, 1), torch.float32, ME) is None
    assert enclave.begin(name, 0, positions_of(1, 1), torch.float16, ME) is None
    assert counts(enclave, name) == ([0, 0], [0, 0], 0)
    monkeypatch.setattr("cloven.kv_shield.enclave.library", lambda: None)
    assert enclave.begin(name, 0, positions_of(1, 1), torch.float32, ME) is None


def test_what_is_refused() -> None:
    enclave = small_enclave("session")
    name = enclave.open(1, ME)
    for match, arguments in (
        ("no such session", (name, 0, positions_of(1, 1), torch.float32, YOU)),
        ("no such session", (bytes(16), 0, positions_of(1, 1), torch.float32, ME)),
        ("place 1", (name, 1, positions_of(1, 1), torch.float32, ME)),
        ("2 sequences", (name, 0, positions_of(2, 1), torch.float32, ME)),
        ("a position outside", (name, 0, positions_of(1, 1, 10**6), torch.float32, ME)),
    ):
        with pytest.raises(MalformedMessage, match=match):
            enclave.begin(*arguments)
    assert counts(enclave, name) == ([0, 0], [0, 0], 0)


def test_keys_drawn_ahead_are_handed_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = small_enclave("session")
    monkeypatch.setattr(enclave_module, "AHEAD_BYTES", 2 * enclave._sequence_bytes)
    assert [enclave.draw_ahead() for _ in range(6)] == [True] * 2 * LAYERS + [False] * 2
    ahead = [list(keys) for keys in enclave._ahead]
    first, pair, second, third = (enclave._sessions[enclave.open(sequences, ME)] for sequences in (1, 2, 1, 1))
    for session, keys in ((first, ahead[0]), (second, ahead[1])):
        assert all(a is b for a, b in zip(session.keys, keys, strict=True))
    assert third.keys == pair.keys == [None, None] and enclave._ahead == []
    enclave.draw_ahead()
    fourth = enclave._sessions[enclave.open(1, ME)]  # half drawn
    assert fourth.keys[0] is not None and fourth.keys[1] is None
    drawn = [keys.kv for session in (first, second, fourth) for keys in session.keys if keys is not None]
    assert len({float(kv.flatten()[0]) for kv in drawn}) == 5


def test_nothing_is_drawn_ahead_in_permute_mode() -> None:
    assert not small_enclave("permute").draw_ahead()


def test_an_idle_enclave_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloven.wire.server._IDLE_SECONDS", 0.05)
    with attached("llama", "session") as a:
        deadline = time.monotonic() + 10
        while len(a.enclave._ahead) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(a.enclave._ahead) >= 3
        ours, _ = decoded(a.model, ids_of(1, 3), 3)
        assert deviation(ours, whole(a.plain, ids_of(1, 3))) < FLOAT32_TOLERANCE


# --- through a lane


@torch.no_grad()
def decoded(model: Any, ids: Tensor, steps: int, cache: Any = None) -> tuple[Tensor, Any]:
    rows = []
    for start in range(steps):
        output = model(input_ids=ids[:, start : start + 1], **with_cache(cache), use_cache=True)
        cache = cache_of(output)
        rows.append(output.logits)
    return torch.cat(rows, 1), cache


@torch.no_grad()
def whole(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("mode", MODES)
def test_a_token_is_one_request_and_its_calls(mode: str) -> None:
    with attached("llama", mode) as a:
        ours, _ = decoded(a.model, ids_of(2, 6), 6)
        assert deviation(ours, whole(a.plain, ids_of(2, 6))) < FLOAT32_TOLERANCE
        statistics = a.session.statistics()
        assert statistics["step"].exchanges == 6
        assert all(statistics[name].exchanges == 6 for name in statistics if name not in ("step", "open"))


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_than_a_step_takes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill goes call by call, and the tokens after it are steps again."""
    with attached("llama", mode) as a, torch.no_grad():
        enclave = a.enclave
        widest = sum(enclave.manifest.layers[0].widths(enclave.noise))
        monkeypatch.setattr("cloven.kv_shield.shapes.CAPACITY", 4 * widest * 4)  # of 4 rows in float32
        ids = ids_of(1, 9)
        output = a.model(input_ids=ids[:, :7], use_cache=True)
        assert "step" not in a.session.statistics()
        _, _ = decoded(a.model, ids[:, 7:], 2, cache_of(output))
        assert a.session.statistics()["step"].exchanges == 2


@pytest.mark.parametrize("mode", MODES)
def test_the_calls_do_not_use_the_socket(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: Any) -> None:
        raise AssertionError("this went through the socket")

    with attached("llama", mode) as a:
        _, cache = decoded(a.model, ids_of(1, 2), 2)
        monkeypatch.setattr(a.session.channel, "_send", no_socket)
        decoded(a.model, ids_of(1, 3), 3, cache)
        monkeypatch.undo()


@pytest.mark.parametrize("mode", MODES)
def test_an_enclave_without_the_library(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloven.kv_shield.enclave.library", lambda: None)
    with attached("llama", mode) as a:
        ours, _ = decoded(a.model, ids_of(1, 4), 4)
        assert deviation(ours, whole(a.plain, ids_of(1, 4))) < FLOAT32_TOLERANCE
        assert a.session.statistics()["step"].exchanges == 1  # and never again


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_pass(mode: str) -> None:
    """It ends with the next message; other caches go on, and rows of the interrupted one are keyed once."""
    with attached("llama", mode) as a:
        _, other = decoded(a.model, ids_of(1, 2), 2)
        _, cache = decoded(a.model, ids_of(1, 2), 2)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = a.model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoded(a.model, ids_of(1, 1), 1, cache)
        hook.remove()
        ours, _ = decoded(a.model, ids_of(1, 5)[:, 2:], 3, other)
        assert deviation(ours, whole(a.plain, torch.cat([ids_of(1, 2), ids_of(1, 5)[:, 2:]], 1))[:, 2:]) < FLOAT32_TOLERANCE
        if mode == "session":
            sessions = list(a.enclave._sessions.values())
            assert not any(session.steps for session in sessions)
            assert sorted(session.keyed for session in sessions) == [[3, 2], [5, 5]]


@pytest.mark.parametrize("mode", MODES)
def test_threads_share_a_lane(mode: str) -> None:
    wrong: list[float] = []
    with attached("llama", mode, timeout=30) as a:

        def work(seed: int) -> None:
            ids = ids_of(1, 12, seed)
            ours, _ = decoded(a.model, ids, 12)
            wrong.append(deviation(ours, whole(a.plain, ids)))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(wrong) == 3 and max(wrong) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_no_answer_of_a_step_holds_a_key(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes] = []
    raw = Channel.raw

    def recording(self: Channel, layer: str, generation: int, x: Tensor, out: Tensor) -> bool:
        came = raw(self, layer, generation, x, out)
        answers.append(bytes(out.view(torch.uint8).numpy()))
        return came

    monkeypatch.setattr(Channel, "raw", recording)
    with attached("llama", mode) as a:
        _, cache = decoded(a.model, ids_of(2, 6), 6)
        keys = needles(a.server, kv_bundle("llama", mode) / "trusted")
        sent = b"|".join(answers)
        assert len(answers) == 6 * 4 and len(keys) > 20
        assert not any(key in sent for key in keys)
        assert cache is not None and len(stored_keys("llama")) > 0


@pytest.mark.parametrize("size", [4, 4096])
def test_a_call_of_another_size_ends_the_lane(size: int) -> None:
    """Whoever writes it gets no row of anything, and the enclave lives on."""
    with attached("llama", "session") as a:
        _, cache = decoded(a.model, ids_of(1, 2), 2)
        channel = a.session.channel
        name = next(iter(a.enclave._sessions))
        request = Step(channel.next_id(), channel.bundle, name, 1, 1, 2, "float32")
        calls = channel.exchange(
            "step", request, [frame_of(positions_of(1, 1, 2))], lambda m, _: m.calls if isinstance(m, Stepped) else None, expected=0
        )
        assert calls == 4
        x = torch.zeros(1, 1, size)
        assert channel.raw("nonsense", channel.lane_generation, x, torch.zeros(1, 1, 8)) is False
        ours, _ = decoded(a.model, ids_of(1, 3)[:, 2:], 1, cache)  # through the socket, then a new lane
        assert deviation(ours, whole(a.plain, torch.cat([ids_of(1, 2), ids_of(1, 3)[:, 2:]], 1))[:, 2:]) < FLOAT32_TOLERANCE


def test_an_enclave_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Permute: the text goes on. The process is real; it is killed between two calls of one pass."""
    (tmp_path / "s").mkdir(mode=0o700)
    address = f"ipc://{tmp_path}/s/e"
    trusted = kv_bundle("llama", "permute") / "trusted"
    code = "import sys; from cloven.kv_shield.service import EnclaveServer; EnclaveServer(sys.argv[1], sys.argv[2]).serve()"

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code, str(trusted), address])
        while not (tmp_path / "s" / "e").exists():
            time.sleep(0.02)
        return process

    process = start()
    model = load(kv_bundle("llama", "permute"))
    with cloven.attach(model, address, timeout=30) as session:
        assert isinstance(session, KvSession)
        _, cache = decoded(model, ids_of(1, 2), 2)
        killed: list[subprocess.Popen[bytes]] = []

        def kill(*_: Any) -> None:
            if not killed:
                killed.append(process)
                process.kill()
                process.wait()
                (tmp_path / "s" / "e").unlink()
                killed.append(start())

        hook = model.model.layers[1].register_forward_pre_hook(kill)
        ours, _ = decoded(model, ids_of(1, 6)[:, 2:], 4, cache)
        hook.remove()
        assert deviation(ours, whole(tiny("llama"), torch.cat([ids_of(1, 2), ids_of(1, 6)[:, 2:]], 1))[:, 2:]) < FLOAT32_TOLERANCE
        killed[1].kill()
        killed[1].wait()
        session.channel.timeout = 1
        with pytest.raises(WorkerUnreachable, match="is `cloven enclave` running there"):
            decoded(model, ids_of(1, 1), 1)


def test_a_lane_that_the_server_gives_up_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """An enclave that stops in the middle of a pass: the client notices by the lock, not by the timeout."""
    with attached("llama", "permute") as a:
        _, cache = decoded(a.model, ids_of(1, 2), 2)
        assert a.server._lanes is not None
        monkeypatch.setattr(enclave_step, "_LOOK_SECONDS", 0.02)

        def give_up(*_: Any) -> None:
            a.server._lanes.close()

        hook = a.model.model.layers[1].register_forward_pre_hook(give_up)
        ours, _ = decoded(a.model, ids_of(1, 3)[:, 2:], 1, cache)
        hook.remove()
        assert deviation(ours, whole(a.plain, torch.cat([ids_of(1, 2), ids_of(1, 3)[:, 2:]], 1))[:, 2:]) < FLOAT32_TOLERANCE


def test_a_step_through_the_socket_ends_before_it_began() -> None:
    with attached("llama", "session") as a:
        decoded(a.model, ids_of(1, 2), 2)
        (name,) = a.enclave._sessions
        channel = a.session.channel
        request = Step(channel.next_id(), channel.bundle, name, 1, 1, 2, "float32")
        calls = channel.exchange(
            "step", request, [frame_of(positions_of(1, 1, 2))], lambda m, _: m.calls if isinstance(m, Stepped) else None
        )
        assert calls == 0 and counts(a.enclave, name) == ([2, 2], [2, 2], 0)


def test_a_session_that_was_closed_in_the_middle_of_a_step() -> None:
    """Its keys are of no use any more, not even for the calls that were authorised already."""
    with attached("llama", "session") as a:
        _, cache = decoded(a.model, ids_of(1, 2), 2)
        (name,) = a.enclave._sessions
        closer = cloven.attach(load(kv_bundle("llama", "session")), str(a.session.channel.address), timeout=10)
        closed: list[int] = []

        def close(*_: Any) -> None:
            channel = closer.channel
            request = Close(channel.next_id(), channel.bundle, name)
            channel.exchange("close", request, [], lambda m, _: True if isinstance(m, Closed) else None)
            closed.append(1)

        hook = a.model.model.layers[1].register_forward_pre_hook(close)
        with pytest.raises(WorkerRefused, match="no such session"):
            decoded(a.model, ids_of(1, 1), 1, cache)
        hook.remove()
        closer.close()
        assert closed == [1]


def test_nothing_is_drawn_in_the_middle_of_a_step() -> None:
    enclave = small_enclave("session")
    step = begun(enclave, enclave.open(1, ME))
    assert not enclave.draw_ahead()
    enclave.end(step)
    assert enclave.draw_ahead()


# --- counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_what_is_counted_is_what_was_asked(mode: str, dtype: torch.dtype, batch: int) -> None:
    """Exchanges and bytes are those of the client's telemetry, whichever way they went; tokens are the places of the sequences."""
    with enclave(kv_bundle("llama", mode) / "trusted") as (address, server):
        model = load(kv_bundle("llama", mode), dtype)
        with cloven.attach(model, address, timeout=10) as session:
            before = server.counts.total()
            with torch.no_grad():
                first = model(ids_of(batch, 5))
                model(ids_of(batch, 1), **with_cache(cache_of(first)))
            total, after, ways = session.telemetry.total(), server.counts.total(), server.counts.ways()
            assert after.exchanges - before.exchanges == total.exchanges
            assert (after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out) == (total.bytes_up, total.bytes_down)
            assert after.tokens == batch * 6
            assert (ways["native"].tokens, ways["native"].seconds > 0) == (batch * 6, True)
            names = {sample.name: sample.value for sample in server.samples()}
            assert names["cloven_tokens_total"] == batch * 6
            assert names["cloven_enclave_sessions_opened_total"] == names["cloven_enclave_sessions"] == (mode == "session")


@pytest.mark.parametrize("mode", MODES)
def test_call_by_call_the_same_tokens_are_counted(mode: str) -> None:
    with attached("llama", mode, RecordingServer) as a, torch.no_grad():
        a.model(ids_of(1, 5))
        ways = a.server.counts.ways()
        assert ways["native"].tokens == 0 and ways["native"].exchanges == 0
        assert a.server.counts.total().tokens == 5 and ways["lane"].rows == 5 * len(a.session._steps._calls)
