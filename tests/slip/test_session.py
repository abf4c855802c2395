from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

import cloven
from cloven.demo.slip import all_products_exact
from cloven.errors import (
    BadBundle,
    BadInput,
    ForeignBundle,
    NotAttached,
    PeerRefused,
    RunError,
    SessionClosed,
    TamperedBundle,
    VerificationFailed,
    WorkerUnreachable,
)
from cloven.model.runtime import MOST_PADS_AHEAD, session_of
from cloven.slip.session import SlipSession
from tests.split_models import attached, copied, load, logits, open_session, random_ids, relative_error, tiny, tiny_bundle, worker_thread

IDS = random_ids(97, 2, 6)


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_every_group_is_exact_through_the_worker(precision: str) -> None:
    with attached(tiny_bundle("llama", precision)) as (_, session):
        assert all_products_exact(session, tiny_bundle("llama", precision))


def test_one_exchange_per_group_and_forward_pass() -> None:
    with attached(tiny_bundle("llama")) as (model, session):
        logits(model, IDS)
        statistics = session.statistics()
        assert list(statistics) == [
            "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.{gate_proj,up_proj}",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.{q_proj,k_proj,v_proj}",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.{gate_proj,up_proj}",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        ]
        assert {(one.exchanges, one.rows) for one in statistics.values()} == {(1, 12)}
        down = statistics["model.layers.0.mlp.down_proj"]
        assert 12 * 80 * 4 < down.bytes_up < 12 * 80 * 4 + 200 and 12 * 48 * 4 <= down.bytes_down < 12 * 48 * 4 + 200
        assert session.telemetry.total().exchanges == 9


def test_pads_in_advance_serve_the_next_tokens() -> None:
    with attached(tiny_bundle("llama"), look_ahead=0) as (model, session):
        session.make_pads(12)
        assert {source.ready for source in session.pads} == {12}
        made = [source.made for source in session.pads]
        logits(model, IDS)
        assert [source.made for source in session.pads] == made and {source.ready for source in session.pads} == {0}
        assert session.pad_seconds_per_row() > 0


def test_as_many_pads_as_the_memory_given_to_them_holds() -> None:
    bundle = tiny_bundle("llama")
    row = 4 * sum(group.rows + group.columns for group in bundle.manifest.exposed.groups)
    for pad_bytes, rows in ((7 * row, 7), (1, 1), (10**9, MOST_PADS_AHEAD)):
        with attached(bundle, look_ahead=None, pad_bytes=pad_bytes) as (_, session):
            assert session.look_ahead._rows == rows


def test_a_second_session_ends_the_first() -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address) as first:
        expected = logits(model, IDS)
        with open_session(model, address) as second:
            assert first.closed and not second.closed and session_of(model) is second
            assert relative_error(logits(model, IDS), expected) < 1e-6


def test_a_closed_session_says_so_and_the_model_can_be_attached_again() -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with worker_thread(bundle) as address:
        with open_session(model, address) as session:
            expected = logits(model, IDS)
        assert session.closed and "closed" in repr(session)
        with pytest.raises(SessionClosed, match="has ended: it was closed"):
            logits(model, IDS)
        session.close()  # twice is harmless
        with open_session(model, address):
            assert relative_error(logits(model, IDS), expected) < 1e-6


def test_pads_are_dropped_with_the_session() -> None:
    with attached(tiny_bundle("llama"), look_ahead=0) as (_, session):
        session.make_pads(3)
        key, source = session.pads[0]._key, session.pads[0]
    assert not any(key._key) and source.ready == 0
    assert not session.look_ahead._thread.is_alive()


def test_the_verification_secrets_are_dropped_with_the_session() -> None:
    """S must not outlive the first reject: whoever learns it can answer what it likes."""
    with attached(tiny_bundle("llama"), look_ahead=0) as (_, session):
        check = weakref.ref(session.offloaded[0].shares[0].holder.freivalds(0))
    gc.collect()
    assert session.closed and check() is None


def test_two_models_of_one_bundle() -> None:
    bundle = tiny_bundle("llama")
    with attached(bundle) as (first, _), attached(bundle) as (second, _):
        assert relative_error(logits(first, IDS), logits(second, IDS)) < 1e-6


def test_the_worker_of_another_bundle() -> None:
    bundle, other = tiny_bundle("llama"), tiny_bundle("qwen2")
    model = load(bundle.trusted)
    with worker_thread(other) as address, pytest.raises(ForeignBundle) as caught:
        cloven.attach(model, address, timeout=10)
    assert other.id in str(caught.value)
    with pytest.raises(NotAttached):
        logits(model, IDS)


def test_nobody_there(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    model = load(tiny_bundle("llama").trusted)
    with pytest.raises(WorkerUnreachable, match="is `cloven worker` running there"):
        cloven.attach(model, f"ipc://{tmp_path}/w"[:107], timeout=0.5)


def test_a_socket_folder_that_others_can_reach(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(PeerRefused, match="mode 0700"):
        cloven.attach(load(tiny_bundle("llama").trusted), f"ipc://{tmp_path}/w", timeout=0.5)


@pytest.mark.parametrize("address", ["worker", "http://host:1", "ipc://relative", "tcp://127.0.0.1:1"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(BadInput):
        cloven.attach(load(tiny_bundle("llama").trusted), address)


def test_the_copy_of_the_exposed_half_is_missing(tmp_path: Path) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    model = load(bundle.trusted)
    with worker_thread(tiny_bundle("llama")) as address:
        (bundle.path / "exposed").rename(tmp_path / "elsewhere")
        with pytest.raises(BadBundle, match="--exposed PATH"):
            cloven.attach(model, address)
        with open_session(model, address, exposed=tmp_path / "elsewhere"):
            logits(model, IDS)


def test_a_foreign_copy_of_the_exposed_half() -> None:
    bundle, other = tiny_bundle("llama"), tiny_bundle("qwen2")
    with worker_thread(bundle) as address, pytest.raises(ForeignBundle) as caught:
        cloven.attach(load(bundle.trusted), address, exposed=other.exposed)
    assert bundle.id in str(caught.value) and other.id in str(caught.value)


HEAD = "exposed-00009.safetensors"  # lm_head is the last group


def damage(path: Path, offset: int = -1) -> None:
    """Change one byte of a file, by 1: a code stays a code."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_in_the_copy(tmp_path: Path) -> None:
    """The worker's half is intact: only the trusted side's own copy is not what the trusted manifest promises."""
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    model = load(bundle.trusted)
    damage(bundle.exposed / "exposed-00001.safetensors")
    with worker_thread(tiny_bundle("llama")) as address, pytest.raises(TamperedBundle, match=r"exposed-00001\.safetensors"):
        cloven.attach(model, address)


def test_a_byte_that_changes_after_the_session_was_opened(tmp_path: Path) -> None:
    """Pads are made from the file and checked against S·W of the verified bytes: a wrong u would give wrong tokens silently."""
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    model = load(bundle.trusted)
    with worker_thread(tiny_bundle("llama")) as address, open_session(model, address, look_ahead=0) as session:
        damage(bundle.exposed / HEAD)
        with pytest.raises(VerificationFailed, match="a pad made for lm_head"):
            session.make_pads(4)
        assert session.closed
        with pytest.raises(SessionClosed, match="a pad made for lm_head"):
            logits(model, IDS)


def test_a_bad_pad_found_in_the_background_ends_the_session(tmp_path: Path) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    model = load(bundle.trusted)
    damage(bundle.exposed / HEAD)
    ended = threading.Event()
    with worker_thread(tiny_bundle("llama")) as address:
        # The bytes are right while they are hashed, wrong when the first pads are made.
        damage(bundle.exposed / HEAD)
        with open_session(model, address, look_ahead=0) as session:
            session.on_close(ended.set)
            damage(bundle.exposed / HEAD)
            assert isinstance(session, SlipSession)
            restarted = type(session.look_ahead)(session.pads, 4, lambda error: session.close(str(error)))
            assert ended.wait(10)
            restarted.stop()
        with pytest.raises(SessionClosed, match="a pad made for lm_head"):
            logits(model, IDS)


def test_activations_that_are_no_numbers_are_not_sent() -> None:
    with attached(tiny_bundle("llama")) as (model, session):
        embedding = torch.full((1, 2, 48), float("nan"))
        with torch.no_grad(), pytest.raises(RunError, match="NaN or infinity: nothing was sent"):
            model(inputs_embeds=embedding)
        assert session.telemetry.total().exchanges == 0 and not session.closed
        logits(model, IDS)


def test_the_unsplit_logits() -> None:
    with attached(tiny_bundle("llama", "int8x2")) as (model, _):
        assert relative_error(logits(model, IDS), logits(tiny("llama"), IDS)) < 1e-3


def test_a_model_that_is_not_split() -> None:
    with pytest.raises(BadInput, match="this is no split model"):
        cloven.attach(tiny("llama"), "ipc:///nowhere/w")


def test_unknown_options() -> None:
    with pytest.raises(BadInput, match="unknown option among lookahead"):
        cloven.attach(load(tiny_bundle("llama").trusted), "ipc:///nowhere/w", lookahead=3)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_bad_timeouts(timeout: float) -> None:
    with pytest.raises(BadInput, match="timeout"):
        cloven.attach(load(tiny_bundle("llama").trusted), "ipc:///nowhere/w", timeout=timeout)


@pytest.mark.parametrize("options", [{"look_ahead": -1}, {"pad_bytes": -1}])
def test_bad_numbers_of_pads(options: dict[str, int]) -> None:
    with worker_thread(tiny_bundle("llama")) as address, pytest.raises(BadInput):
        cloven.attach(load(tiny_bundle("llama").trusted), address, timeout=10, **options).close()
