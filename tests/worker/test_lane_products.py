"""Products over a lane without headers: a real worker in a thread, over ipc, and what it does with requests that are none."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cloven
from cloven.errors import RunError, SessionClosed, WorkerTimeout
from cloven.field.native.library import load_kernels
from cloven.field.products import MAX_INNER, PlacedMatrix
from cloven.field.selection import select_backend
from cloven.wire.channel import Channel
from cloven.wire.lane import CAPACITY, lanes_available
from cloven.worker.lane_products import LaneProducts, library
from cloven.worker.service import Worker
from cloven.worker.transcript import read_transcript
from tests.helpers import python_product, random_codes, random_residues, serving, write_exposed

pytestmark = pytest.mark.skipif(
    library() is None or load_kernels() is None or not lanes_available(), reason="no compiler built the kernels, or this is not Linux"
)
GROUPS = [random_codes(4, 16, 1), random_codes(9, 7, 2), random_codes(300, 64, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s").mkdir(mode=0o700)
    write_exposed(tmp_path / "exposed", GROUPS)
    return tmp_path


@pytest.fixture
def worker(folder: Path) -> Iterator[Worker]:
    with serving(folder / "exposed", f"ipc://{folder}/s/w") as worker:
        yield worker


@pytest.fixture
def channel(worker: Worker, folder: Path) -> Iterator[Channel]:
    channel = Channel(f"ipc://{folder}/s/w", worker.matrices.bundle, timeout=5)
    channel.hello()
    yield channel
    channel.close()


def headed(*_: Any, **__: Any) -> Any:
    raise AssertionError("this had a header")


def asked(channel: Channel, group: int, c: Tensor) -> Tensor:
    return channel.multiply("a layer", group, c, len(GROUPS[group]), lambda: None)


def test_products_are_served_without_headers_and_are_the_same(channel: Channel, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(channel, 0, random_residues(1, 16, 5))
    monkeypatch.setattr(channel, "exchange", headed)
    did: list[str] = []
    for group, codes in enumerate(GROUPS):
        for rows in (1, 3, 15):  # everywhere: 16 at most without a matrix unit
            c = random_residues(rows, codes.shape[1], 10 * group + rows)
            z = channel.multiply("a layer", group, c, len(codes), lambda: did.append("once"))
            assert torch.equal(z, python_product(c, codes))
    assert len(did) == 9
    total = channel.telemetry.total()
    assert total.exchanges == 3 + 10 and total.rows == 1 + 3 * 19  # hello, lane and serve have no rows
    counted = worker.counts.total()  # at once, though C++ is still serving
    assert worker.answered == total.exchanges and counted.rows == total.rows
    assert (counted.bytes_in, counted.bytes_out) == (total.bytes_up, total.bytes_down)
    native = worker.counts.ways()["native"]
    assert native.exchanges == 10 and native.rows == 1 + 3 * 19 and 0 < native.seconds < 60


def test_what_was_counted_stays_counted_when_the_lane_ends(channel: Channel, worker: Worker) -> None:
    for _ in range(3):
        asked(channel, 0, random_residues(2, 16, 5))
    channel.hello()  # ends what C++ serves; then it goes on with new counts
    asked(channel, 0, random_residues(2, 16, 5))
    expected = channel.telemetry.total()
    channel.close()
    deadline = time.monotonic() + 5
    while worker.counts._live and time.monotonic() < deadline:
        time.sleep(0.02)
    counted = worker.counts.total()
    assert not worker.counts._live and counted.hellos == 2
    assert (counted.exchanges, counted.rows, counted.bytes_in, counted.bytes_out) == (
        expected.exchanges,
        expected.rows,
        expected.bytes_up,
        expected.bytes_down,
    )


def test_a_message_ends_it_and_it_is_asked_for_again(channel: Channel) -> None:
    c = random_residues(2, 16, 5)
    first = asked(channel, 0, c)
    before = channel.lane_generation
    channel.hello()
    assert channel.lane_generation != before
    assert torch.equal(asked(channel, 0, c), first)


def test_what_does_not_fit_a_lane_has_a_header(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = CAPACITY // (4 * 300) + 1
    c = random_residues(rows, 64, 8)
    assert asked(channel, 2, c[:2]).shape == (2, 300)
    served = channel._lane.asked
    monkeypatch.setattr(channel._lane, "asked", headed)
    z = asked(channel, 2, c)
    assert torch.equal(z[-3:], python_product(c[-3:], GROUPS[2]))
    monkeypatch.setattr(channel._lane, "asked", served)
    assert torch.equal(asked(channel, 2, c[:2]), z[:2])  # a socket's message does not end it


def test_a_worker_that_serves_none(channel: Channel, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_products", None)
    channel.hello()  # says so
    monkeypatch.setattr(channel._lane, "asked", headed)
    c, questions = random_residues(2, 16, 5), list[str]()
    exchange = channel.exchange
    monkeypatch.setattr(channel, "exchange", lambda layer, *rest, **more: questions.append(layer) or exchange(layer, *rest, **more))
    for _ in range(3):
        assert torch.equal(asked(channel, 0, c), python_product(c, GROUPS[0]))
    assert questions == ["a layer"] * 3  # not asked again on this lane


@pytest.mark.parametrize(
    ("group", "rows", "size"),
    [(7, 1, 64), (0, 0, 0), (0, 2, 64), (0, 1, 60), (2**32 - 1, 2**32 - 1, 64), (0, 2**32 - 1, 64), (1, 1, CAPACITY - 8)],
    ids=["no such group", "no rows", "more rows", "cut", "all ones", "rows that overflow", "too long"],
)
def test_requests_that_are_none_end_the_lane_and_nothing_else(channel: Channel, worker: Worker, group: int, rows: int, size: int) -> None:
    c = random_residues(1, 16, 5)
    right = asked(channel, 0, c)
    lane, answered = channel._lane._lane, worker.answered
    assert lane is not None
    noise = torch.zeros(max(1, size // 4), dtype=torch.int32)
    lane.ask(group | rows << 32, noise.data_ptr(), size)
    out = torch.empty(1, 4, dtype=torch.int32)
    assert not lane.raw(0, 0, out.data_ptr(), out.nbytes, 0.5, 0.0, again=True)
    assert lane.other_is_gone() and worker.answered <= answered + 1
    assert torch.equal(asked(channel, 0, c), right)  # by the socket, and then by a new lane


def test_an_answer_of_another_size_is_not_taken(channel: Channel) -> None:
    c = random_residues(1, 16, 5)
    right = asked(channel, 0, c)
    with pytest.raises(Exception, match=r"answered something else|malformed|size"):
        channel.multiply("a layer", 0, c, 5, lambda: None)  # the matrix has four rows: the lane is left, and the socket says why
    assert torch.equal(asked(channel, 0, c), right)


def test_entries_that_are_no_residues(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(channel, 0, random_residues(1, 16, 5))
    asks = channel._lane.asked

    def altered(prefix: int, x: Tensor, out: Tensor, *rest: Any) -> bool:
        came = asks(prefix, x, out, *rest)
        out[0, 0] = -(2**31)
        return came

    monkeypatch.setattr(channel._lane, "asked", altered)
    with pytest.raises(Exception, match="no residue"):
        asked(channel, 0, random_residues(1, 16, 5))


def test_silence_ends_in_time(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(channel, 0, random_residues(1, 16, 5))
    monkeypatch.setattr(channel, "timeout", 0.3)
    assert channel._lane._lane is not None
    monkeypatch.setattr(channel._lane._lane, "raw", lambda *_, **__: False)
    did: list[int] = []
    with pytest.raises(WorkerTimeout, match="a layer"):
        channel.multiply("a layer", 0, random_residues(1, 16, 6), 4, lambda: did.append(1))
    assert did == [1] and channel.lane_generation < 0  # an answer that comes later finds nobody
    channel.close()
    with pytest.raises(SessionClosed):
        asked(channel, 0, random_residues(1, 16, 5))


def test_with_a_transcript_python_answers(folder: Path) -> None:
    record, c = folder / "rows", random_residues(3, 16, 5)
    with serving(folder / "exposed", f"ipc://{folder}/s/w", record=record) as worker:
        channel = Channel(f"ipc://{folder}/s/w", worker.matrices.bundle, timeout=5)
        channel.hello()
        z = asked(channel, 0, c)
        channel.close()
    assert torch.equal(z, python_product(c, GROUPS[0]))
    ((group, rows),) = read_transcript(record)
    assert group == 0 and torch.equal(rows, c)


def test_a_worker_stops_while_it_is_asked(folder: Path) -> None:
    """Whoever asks again and again must not keep it alive."""
    worker = Worker(folder / "exposed", f"ipc://{folder}/s/w")
    serves, stopping = threading.Thread(target=worker.serve), threading.Event()
    serves.start()
    channel, c = Channel(f"ipc://{folder}/s/w", worker.matrices.bundle, timeout=2), random_residues(1, 16, 5)
    channel.hello()
    answered: list[int] = []

    def ask() -> None:
        with contextlib.suppress(RunError):
            while not stopping.is_set():
                asked(channel, 0, c)
                answered.append(1)

    asks = threading.Thread(target=ask)
    asks.start()
    try:
        while len(answered) < 50 and asks.is_alive():
            time.sleep(0.01)
        assert worker.counts.ways()["native"].exchanges >= 50
        worker.stop()
        serves.join(10)
        assert not serves.is_alive()
    finally:
        stopping.set()
        worker.stop()
        serves.join(10)
        asks.join(10)
        channel.close()


def test_a_worker_reads_ahead_a_little_and_then_sleeps(tmp_path: Path) -> None:
    """Codes of 48 MiB, more than it may read: right answers whether it is interrupted or not, and no more work afterwards."""
    (tmp_path / "s").mkdir(mode=0o700)
    codes = [random_codes(4096, 4096, seed) for seed in range(3)]
    write_exposed(tmp_path / "exposed", codes)
    with serving(tmp_path / "exposed", f"ipc://{tmp_path}/s/w") as worker:
        channel = Channel(f"ipc://{tmp_path}/s/w", worker.matrices.bundle, timeout=20)
        channel.hello()
        for number in (0, 1, 2, 0, 2, 2):  # as foreseen, and not
            c = random_residues(1, 4096, number)
            z = channel.multiply("a layer", number, c, 4096, lambda: None)
            time.sleep(0.001 * (number % 2))
            assert torch.equal(z[:, :64], python_product(c, codes[number][:64]))
        time.sleep(0.05)
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.25  # reading on would take all of it
        channel.close()


def test_more_rows_than_are_served_have_a_header(channel: Channel, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another back end is faster for many."""
    assert worker._products is not None
    monkeypatch.setattr(worker._products, "most", 2)
    channel.hello()  # says so
    c, sent = random_residues(3, 16, 5), list[int]()
    asks = channel._lane.asked
    monkeypatch.setattr(channel._lane, "asked", lambda prefix, x, *rest: sent.append(len(x)) or asks(prefix, x, *rest))
    for rows in (2, 3, 1):
        assert torch.equal(asked(channel, 0, c[:rows]), python_product(c[:rows], GROUPS[0]))
    assert sent == [2, 1]


def test_which_matrices_are_served() -> None:
    wide = PlacedMatrix(torch.zeros(2, MAX_INNER + 1, dtype=torch.int8), 2, MAX_INNER + 1)
    backend = select_backend("cpu")
    products = LaneProducts.of(backend, (None, wide, backend.place(GROUPS[1])))
    assert products is not None
    assert [one.w is not None for one in products._matrices] == [False, False, True]
    assert LaneProducts.of(backend._many, (backend.place(GROUPS[1]),)) is None  # type: ignore[attr-defined]


def test_a_forked_child_does_not_ask(channel: Channel) -> None:
    asked(channel, 0, random_residues(1, 16, 5))
    child = os.fork()
    if not child:
        try:
            channel._lane._lane.ask(1 << 32, 0, 0)  # type: ignore[union-attr]
        except BaseException as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.long)])
def test_the_loop_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program, source = tmp_path / "check", Path(cloven.__file__).parent / "worker" / "native"
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{source}"]
    subprocess.run(["g++", *options, str(Path(__file__).with_name("check_serve.cpp")), "-o", str(program)], check=True, timeout=240)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok, ")
