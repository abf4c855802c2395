"""Filling stores, and sessions that use them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor

import cloven
from cloven.bundle.bundle import Bundle
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.engine.engine import Engine, Inline
from cloven.engine.pool import ProcessPool
from cloven.errors import (
    BadBundle,
    BadInput,
    ForeignBundle,
    RunError,
    SessionClosed,
    StoreEmpty,
    StoreUnusable,
    TamperedBundle,
    VerificationFailed,
)
from cloven.field.products import multiply
from cloven.field.residues import H, P
from cloven.masks.pad_store import AHEAD, BLOCK, PadStore
from cloven.masks.store_files import record_bytes
from cloven.slip import pads as module
from cloven.slip.pads import FillJob, default_store, estimate, fill, fill_job, fill_rounds, open_store
from cloven.zoo.shapes import shape_config
from tests.end_to_end.liar import Liar
from tests.helpers import FakeWorker
from tests.split_models import copied, load, logits, open_session, random_ids, relative_error, tiny_bundle, worker_thread

IDS = random_ids(97, 1, 5)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def job_of(folder: Path, tokens: int = 40, bundle: Bundle | None = None) -> FillJob:
    return fill_job((bundle or tiny_bundle("llama")).trusted, tokens, folder / "pads")


def left(job: FillJob) -> list[int]:
    with contextlib.closing(open_store(job)) as store:
        return [one.left for one in store.status()]


def matrices(bundle: Bundle) -> list[Tensor]:
    from cloven.bundle.exposed_copy import ExposedCopy

    copy = ExposedCopy(bundle.exposed, bundle.manifest)
    return [copy.verified(group) for group in range(len(bundle.manifest.exposed.groups))]


# --- filling


def test_every_image_is_exact(tmp_path: Path) -> None:
    bundle, job = tiny_bundle("llama", "int8x2"), job_of(tmp_path, 3, tiny_bundle("llama", "int8x2"))
    fill(job)
    with contextlib.closing(open_store(job)) as store:
        for group, w in enumerate(matrices(bundle)):
            _, masks, images = store.take(group, 3)
            for mask, image in zip(masks.tolist(), images.tolist(), strict=True):
                assert image == [(sum(a * b for a, b in zip(row, mask, strict=True)) + H) % P - H for row in w.tolist()]
                assert all(abs(value) <= H for value in mask)


def test_the_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fill_job(Path("out/trusted"), 5) == FillJob(f"{tmp_path}/out/trusted", f"{tmp_path}/out/pads", f"{tmp_path}/out/exposed", 5)
    job = fill_job(Path("out/trusted"), 5, Path("p"), Path("e"))
    assert (job.store, job.exposed) == (f"{tmp_path}/p", f"{tmp_path}/e")  # another process may be somewhere else
    assert default_store(Path("out/trusted")) == tmp_path / "out" / "pads"
    for tokens in (0, -3):
        with pytest.raises(BadInput, match="give 1 or more"):
            fill_job(Path("out/trusted"), tokens)


def test_filling_again_makes_what_is_missing(tmp_path: Path) -> None:
    job = job_of(tmp_path, 30)
    assert list(fill_rounds(job))[-1] == (9 * 30, 9 * 30)
    assert left(job) == [30] * 9 and list(fill_rounds(job)) == [] and estimate(job).tokens == 0
    with contextlib.closing(open_store(job)) as store:
        store.take(2, 7)
        store.give_back()
    assert estimate(job).tokens == 7
    assert list(fill_rounds(job)) == [(7, 7)] and left(job) == [30] * 9
    fill(job_of(tmp_path, 10))  # fewer than there are
    assert left(job) == [30] * 9


def test_an_interrupted_fill_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUND", 8)
    job = job_of(tmp_path, 30)
    for stop in (0, 5, 11, 14):
        for number, _ in enumerate(fill_rounds(job)):
            if number == stop:
                break
        assert max(left(job)) - min(left(job)) <= 8  # as full for every group, however often it was interrupted
    fill(job)
    assert left(job) == [30] * 9
    with contextlib.closing(open_store(job)) as store:
        assert store.take(0, 30)[0] == 0


def test_a_wrong_product_is_caught_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad kernel, or memory: one bit, once."""
    job, calls = job_of(tmp_path, 20), 0

    def wrong(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        product = multiply(*arguments)
        if calls == 3:
            product[4, 5] ^= 1
        return product

    with monkeypatch.context() as patch:
        patch.setattr(module, "multiply", wrong)
        with pytest.raises(VerificationFailed, match="a pad made for group 2 is wrong in 1 of 20 rows"):
            fill(job)
    assert left(job) == [20, 20, 0, 0, 0, 0, 0, 0, 0]
    fill(job)
    assert left(job) == [20] * 9


def test_an_altered_copy_of_the_exposed_half(tmp_path: Path) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    path = bundle.exposed / "exposed-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TamperedBundle, match=r"exposed-00001\.safetensors"):
        fill(fill_job(bundle.trusted, 5))
    assert not any((tmp_path / "out" / "pads").glob("*.pads"))
    shutil.rmtree(bundle.exposed)
    with pytest.raises(BadBundle, match="--exposed PATH"):
        estimate(fill_job(bundle.trusted, 5))


def test_a_byte_that_changes_between_two_fills(tmp_path: Path) -> None:
    """The second one does not hash the matrices again: it checks every pad."""
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    job = fill_job(bundle.trusted, 5)
    fill(job)
    path = bundle.exposed / "exposed-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationFailed, match="a pad made for group"):
        fill(fill_job(bundle.trusted, 10))
    assert min(left(job)) == 5


def test_the_store_of_another_bundle(tmp_path: Path) -> None:
    fill(job_of(tmp_path, 2))
    for act in (estimate, fill):
        with pytest.raises(ForeignBundle, match=f"not for bundle {tiny_bundle('qwen2').id}"):
            act(job_of(tmp_path, 2, tiny_bundle("qwen2")))


# --- size and time


def on_disk(folder: Path) -> int:
    """As `du` counts."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_the_size_is_what_it_takes(tmp_path: Path) -> None:
    job = job_of(tmp_path, 700)
    first = estimate(job)
    assert first.tokens == 700 and first.seconds > 0 and not Path(job.store).exists()
    fill(job)
    files = list(Path(job.store).iterdir())
    assert first.bytes <= on_disk(Path(job.store)) <= first.bytes + 4096 * len(files)
    more = estimate(job_of(tmp_path, 900))
    before = on_disk(Path(job.store))
    fill(job_of(tmp_path, 900))
    assert more.tokens == 200 and abs(on_disk(Path(job.store)) - before - more.bytes) <= 4096 * len(files)
    assert first.bytes_per_token == more.bytes_per_token == more.bytes / 200


def bytes_per_token(d: int, f: int, layers: int, kv: int, vocabulary: int) -> int:
    """By hand: q, k, v; o; gate, up; down; of every layer, and the head."""
    return layers * sum(map(record_bytes, (d + 2 * kv, d, 2 * f, d))) + record_bytes(vocabulary)


@pytest.mark.parametrize(("shape", "megabytes"), [("llama-3.2-1b", 2.0), ("llama-2-7b", 5.6), ("70b", 27.0)])
def test_the_sizes_that_are_promised(shape: str, megabytes: float) -> None:
    if shape == "70b":
        size = bytes_per_token(8192, 28_672, 80, 1024, 32_000)
    else:
        config = shape_config(shape)
        head = config.hidden_size // config.num_attention_heads
        size = bytes_per_token(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, head * config.num_key_value_heads, config.vocab_size
        )
    assert size / 1e6 == pytest.approx(megabytes, rel=0.03)


def test_the_estimate_counts_as_by_hand(tmp_path: Path) -> None:
    assert estimate(job_of(tmp_path)).bytes_per_token == bytes_per_token(48, 80, 2, 24, 97)


def test_a_disk_that_lacks_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, 1000)
    needs = estimate(job).bytes
    for free, refused in ((needs + module._SPARE_BYTES - 1, True), (needs + module._SPARE_BYTES, False)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(
                RunError, match=r"1,000 tokens need [\d.]+ MB, 67 MB of them to stay free; [\d.]+ MB are free: nothing was written"
            ):
                estimate(job)
        else:
            estimate(job)
    assert not Path(job.store).exists()


def test_the_disk_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUND", 8)
    job, real = job_of(tmp_path, 30), os.posix_fallocate
    reached = []
    for at in (0, 1, 5, 10, 15):
        calls = 0

        def full(*arguments: int, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(RunError, match="cannot be written: No space left on device"):
                fill(job)
        reached.append(sum(left(job)))
    assert reached == sorted(reached) and reached[-1] > reached[0]
    usable = min(left(job))
    with contextlib.closing(open_store(job)) as store:
        for group in range(9):
            store.take(group, usable)
        store.give_back()
    fill(job)
    assert left(job) == [30] * 9


# --- engines (on Ray: see end_to_end/test_pads.py)


@pytest.mark.parametrize(
    "engine", [Inline(), pytest.param(ProcessPool(2**20, processes=2), marks=pytest.mark.long)], ids=["inline", "pool"]
)
def test_several_stores_at_once(engine: Engine, tmp_path: Path) -> None:
    jobs = [fill_job(tiny_bundle(name).trusted, 12, tmp_path / name) for name in ("llama", "qwen2")]
    assert sorted(job.store for job in engine.run(fill, jobs)) == sorted(job.store for job in jobs)
    for job in jobs:
        assert set(left(job)) == {12}


# --- sessions


@pytest.fixture
def alone(tmp_path: Path) -> Bundle:
    """A trusted half without any exposed copy beside it, and a store with 60 pads in `tmp_path / "pads"`."""
    fill(job_of(tmp_path, 60))
    folder = tmp_path / "alone" / "trusted"
    shutil.copytree(tiny_bundle("llama").trusted, folder)
    return SimpleNamespace(trusted=folder, store=tmp_path / "pads")  # type: ignore[return-value]


@contextlib.contextmanager
def session_with(alone: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    model = load(alone.trusted)
    with (
        worker_thread(tiny_bundle("llama")) as address,
        open_session(model, address, **{"look_ahead": None, "pads": alone.store, **options}) as one,
    ):
        yield model, one


def counts(store: Path) -> list[Any]:
    with contextlib.closing(PadStore(store, tiny_bundle("llama").id)) as one:
        return one.status()


def expected(ids: Tensor = IDS) -> Tensor:
    model = load(tiny_bundle("llama").trusted)
    with worker_thread(tiny_bundle("llama")) as address, open_session(model, address):
        return logits(model, ids)


def test_the_same_answers_without_any_exposed_copy(alone: Any) -> None:
    with session_with(alone) as (model, session):
        assert relative_error(logits(model, IDS), expected()) < 1e-6
        assert session.look_ahead._rows == AHEAD
        for source in session.pads:
            assert source.ready <= AHEAD
    with pytest.raises(BadBundle, match="--exposed PATH"), session_with(alone, pads=None):
        pass
    for one in counts(alone.store):
        assert one.reused == one.burnt == 0 and 5 <= one.used <= 5 + 2 * AHEAD  # what was not read was given back


def test_the_store_is_closed_with_the_session(alone: Any) -> None:
    with session_with(alone) as (model, session):
        store = session.pads[0]._store
        assert any(store._key)
    assert not any(store._key) and not session.look_ahead._thread.is_alive()
    with pytest.raises(SessionClosed):
        logits(model, IDS)


def test_a_worker_that_does_not_answer_costs_no_pad(alone: Any, socket_folder: Path) -> None:
    with pytest.raises(RunError):
        cloven.attach(load(alone.trusted), f"ipc://{socket_folder}/w", pads=str(alone.store), timeout=0.3)
    assert all(one.left == 60 for one in counts(alone.store))


def use_up(store: Path, keep: int) -> None:
    with contextlib.closing(PadStore(store, tiny_bundle("llama").id)) as one:
        for group, status in enumerate(one.status()):
            one.take(group, status.left - keep)
        one.give_back()


def test_dry_and_fail(alone: Any, tmp_path: Path) -> None:
    use_up(alone.store, 7)
    with session_with(alone) as (model, session):
        logits(model, IDS)
        with pytest.raises(StoreEmpty, match=r"pads are left of group 0, [1-5] are needed: run `cloven pads fill`"):
            logits(model, IDS)
        assert not session.closed
        fill(job_of(tmp_path, 20))  # by hand, meanwhile
        assert relative_error(logits(model, IDS), expected()) < 1e-6
    assert all(one.reused == 0 for one in counts(alone.store))


def test_dry_and_wait(alone: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use_up(alone.store, 3)
    results: list[Tensor] = []
    with caplog.at_level(logging.WARNING), session_with(alone, on_empty="wait") as (model, _):
        thread = threading.Thread(target=lambda: results.append(logits(model, IDS)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        fill(job_of(tmp_path, 20))
        thread.join(30)
        assert relative_error(results[0], expected()) < 1e-6
    assert "waiting until somebody fills the pad store" in caplog.text


def test_the_session_is_closed_while_it_waits(alone: Any) -> None:
    use_up(alone.store, 0)
    caught: list[BaseException] = []
    with session_with(alone, on_empty="wait") as (model, session):

        def ask() -> None:
            try:
                logits(model, IDS)
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        started = time.monotonic()
        session.close()
        thread.join(10)
        assert time.monotonic() - started < 5 and not thread.is_alive()
    assert type(caught[0]) is SessionClosed and "while it waited for pads" in str(caught[0])


def test_dry_and_compute(alone: Any) -> None:
    use_up(alone.store, 7)
    with session_with(alone, on_empty="compute", exposed=tiny_bundle("llama").exposed) as (model, _):
        for _ in range(3):
            assert relative_error(logits(model, IDS), expected()) < 1e-6
    with pytest.raises(BadBundle, match="--exposed PATH"), session_with(alone, on_empty="compute"):
        pass
    with pytest.raises(BadInput, match="choose one of fail, wait, compute"), session_with(alone, on_empty="shrug"):
        pass


def test_a_store_that_is_not_there_or_of_another_bundle(alone: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(StoreUnusable, match="no pad store there; make one with `cloven pads fill`"),
        session_with(alone, pads=tmp_path / "x"),
    ):
        pass
    fill(fill_job(tiny_bundle("qwen2").trusted, 2, tmp_path / "other"))
    with pytest.raises(ForeignBundle), session_with(alone, pads=tmp_path / "other"):
        pass


# --- workers' secrets


def checks(store: Path) -> list[str]:
    record: list[str] = json.loads((store / "state.json").read_bytes())["checks"]
    return record


def test_a_worker_that_was_rejected_once_meets_another_secret(
    alone: Any, socket_folder: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    address = f"ipc://{socket_folder}/w"
    with FakeWorker(context, address, Liar(tiny_bundle("llama").exposed, lie_at=3)):
        model = load(alone.trusted)
        with open_session(model, address, pads=alone.store) as session:
            before = session.offloaded[0].shares[0].holder.freivalds(0)._test.clone()
            assert checks(alone.store) == [address]
            dropped: list[list[str]] = []
            session.on_close(lambda: dropped.append(checks(alone.store)))
            with pytest.raises(VerificationFailed, match="the worker's answer is wrong"):
                logits(model, IDS)
            assert session.closed and checks(alone.store) == [""] == dropped[0]  # durable before the session was ended
        with open_session(load(alone.trusted), address, pads=alone.store) as session:
            assert not (session.offloaded[0].shares[0].holder.freivalds(0)._test == before).all()
            assert checks(alone.store) == ["", address]


def test_a_secret_that_cannot_be_dropped_still_ends_the_session(
    alone: Any, socket_folder: Path, context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"ipc://{socket_folder}/w"

    def full(self: PadStore, worker: str) -> None:
        raise StoreUnusable("the disk is full")

    with FakeWorker(context, address, Liar(tiny_bundle("llama").exposed, lie_at=1)):
        model = load(alone.trusted)
        with open_session(model, address, pads=alone.store) as session:
            monkeypatch.setattr(PadStore, "drop_check", full)
            with pytest.raises(VerificationFailed, match=r"answer is wrong.*cannot be dropped: the disk is full"):
                logits(model, IDS)
            assert session.closed


def test_every_worker_has_its_own_secret(alone: Any, tmp_path: Path) -> None:
    seen = []
    with worker_thread(tiny_bundle("llama")) as first, worker_thread(tiny_bundle("llama")) as second:
        for address in (first, second, first):
            with open_session(load(alone.trusted), address, pads=alone.store) as session:
                seen.append(session.offloaded[0].shares[0].holder.freivalds(0)._test.numpy().tobytes())
    assert seen[0] == seen[2] != seen[1] and checks(alone.store) == [first, second]


def test_what_goes_wrong_and_what_is_logged_shows_nothing(alone: Any, caplog: pytest.LogCaptureFixture) -> None:
    use_up(alone.store, 6)
    with caplog.at_level(logging.DEBUG), session_with(alone) as (model, session):
        logits(model, IDS)
        with pytest.raises(StoreEmpty) as caught:
            logits(model, IDS)
        store = session.pads[0]._store
        numbers = [str(value) for value in store.masks(0, 50, 10).flatten().tolist() if abs(value) > 10**6]
        text = caplog.text + str(caught.value) + repr(session) + repr(session.pads[0]) + repr(store)
        assert not any(number in text for number in numbers) and (alone.store / "key").read_bytes().hex() not in text


def test_the_manifest_is_enough_to_open_it(tmp_path: Path) -> None:
    job = job_of(tmp_path, 2)
    fill(job)
    with contextlib.closing(PadStore(Path(job.store), TrustedManifest.read(Path(job.trusted)).bundle)) as store:
        assert store.groups == tuple((group.rows, group.columns) for group in tiny_bundle("llama").manifest.exposed.groups)
    assert BLOCK == 50 and torch.is_grad_enabled()
