"""Pad stores with real processes: killed at any moment, several at once, and on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloven.bundle.bundle import Bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.cluster.worker_process import WorkerProcess
from cloven.field.prg import pad_residues
from cloven.field.products import Float64, multiply
from cloven.field.residues import H, centre
from cloven.masks.pad_store import BLOCK, KEY, PadStore
from cloven.masks.store_files import derived_key
from cloven.slip.pads import fill, fill_job
from cloven.worker.transcript import read_transcript
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.pads_forker import PROMPT
from tests.helpers import CPU, free_port
from tests.pad_stores import witness_of
from tests.split_models import copied, demo_bundle, demo_model, greedy, run_cloven, tiny_bundle

TEXT = "ROMEO:"
KILLS = [pytest.param(10, id="10"), pytest.param(100, id="100", marks=pytest.mark.long)]


# --- killed processes


class Forker:
    """Starts processes of `pads_forker` and kills them."""

    def __init__(self, trusted: Path) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "CLOVEN_KERNELS": "torch", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.pads_forker", str(trusted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, job: dict[str, Any], seconds: float | None) -> list[int]:
        """Start a job's processes, kill them after so many seconds, or let them end; their exit codes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job | {"state": os.environ["CLOVEN_STATE"]}) + "\n")
        self._process.stdin.flush()
        children = [int(word) for word in self._line().split()]
        assert self._process.stdout is not None
        if seconds is not None and not select.select([self._process.stdout], [], [], seconds)[0]:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        return [int(word) for word in self._line().split()]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with contextlib.closing(Forker(tiny_bundle("llama").trusted)) as one:
        yield one


class Watcher:
    """What a worker got, and which pad of a store was under each row of it: for the store's owner to know, and nobody else."""

    def __init__(self, bundle: Bundle, store: Path, record: Path) -> None:
        self._bundle, self._store, self._record, self._read = bundle, store, record, 0
        self._key = derived_key((store / KEY).read_bytes(), "masks")
        self.seen: dict[tuple[int, int], bytes] = {}

    def new(self) -> list[set[int]]:
        """The indices that have arrived since the last call, by group; none of them may have come before with another row."""
        size = -1
        while size != (size := self._record.stat().st_size):
            time.sleep(0.1)  # the worker may still be at the last question of somebody who is dead
        records = list(read_transcript(self._record))[self._read :]
        with contextlib.closing(PadStore(self._store, self._bundle.id)) as store:
            filled = [store.filled(group) for group in range(len(store.groups))]
        self._read += len(records)
        found: list[set[int]] = [set() for _ in self._bundle.manifest.exposed.groups]
        for group in range(len(found)):
            rows = [c for number, c in records if number == group]
            if not rows:
                continue
            all_rows = torch.cat(rows)
            for index, row in zip(self._indices(group, all_rows, filled[group]), all_rows, strict=True):
                assert self.seen.setdefault((group, index), row.numpy().tobytes()) == row.numpy().tobytes(), f"pad {index} of group {group}"
                found[group].add(index)
        return found

    def _indices(self, group: int, c: Tensor, filled: int) -> list[int]:
        """x_int = c − m is small, at most H/‖W‖, under the right mask, and uniform under all others."""
        masks, bound = self._masks(group, filled, c.shape[1]).to(torch.int64), H / self._bundle.manifest.bounds[group].l2
        indices = []
        for row in c.to(torch.int64):
            few = (centre(row[:4] - masks[:, :4]).abs() <= bound).all(1).nonzero()[:, 0]  # nobody else survives four coordinates, nearly
            right = [int(index) for index in few if bool((centre(row - masks[index]).abs() <= bound).all())]
            assert len(right) == 1, f"{len(right)} masks fit"
            indices.append(right[0])
        others = masks[torch.randint(filled, (200,))]
        near = (centre(c[-1].to(torch.int64) - others).abs() <= bound).double().mean()
        assert near < 2 * bound / H + 0.02  # under a wrong mask a coordinate is small by chance alone
        return indices

    def _masks(self, group: int, count: int, columns: int) -> Tensor:
        known: dict[int, Tensor] = self.__dict__.setdefault("_known", {})
        if group not in known or len(known[group]) < count:
            known[group] = pad_residues(self._key, group, 0, count, columns)
        return known[group]


def cursors(store: Path, bundle: Bundle) -> tuple[int, ...]:
    with contextlib.closing(PadStore(store, bundle.id)) as one:
        assert all(status.reused == 0 for status in one.status())
        return one._state.read().cursor


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_process_reuses_nothing_and_loses_at_most_a_block(
    kills: int, forker: Forker, tmp_path: Path, folder: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or two processes generate; they are killed while they open the store, reserve, and generate."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of this process, which is not killed
    bundle, store, record = tiny_bundle("llama"), tmp_path / "pads", tmp_path / "record"
    address, chance = f"ipc://{folder}/w", random.Random(os.urandom(8))
    fill(fill_job(bundle.trusted, 400, store))
    codes, sent = [], 0
    with WorkerProcess(bundle.exposed, address, "--record", str(record)):
        watcher = Watcher(bundle, store, record)
        before = cursors(store, bundle)
        for number in range(kills):
            if number % 3 == 2:
                fill(fill_job(bundle.trusted, 400, store))
            count = 1 + (number % 4 == 3)
            die_at = chance.randrange(24) if number % 2 else None  # on its own, at an operation of the store on the disk
            job = {"task": "generate", "count": count, "address": address, "store": str(store), "die_at": die_at, "seed": chance.random()}
            codes += forker.run(job, chance.uniform(0, 1.0) if die_at is None else 1.5)
            found, now = watcher.new(), cursors(store, bundle)
            for group, indices in enumerate(found):
                assert all(index < now[group] for index in indices)
                lost = now[group] - before[group] - len(indices)
                assert lost <= count * (BLOCK + PROMPT), (number, group, lost)  # a block, and what was just being sent
            before, sent = now, sent + sum(map(len, found))
    assert sent > 20 * kills and codes.count(-signal.SIGKILL) >= 0.8 * len(codes) and 99 not in codes, (sent, codes)
    status = cloven_here("pads", "status", str(bundle.trusted), "--store", str(store), "--json")
    assert status.code == 0 and json.loads(status.out)["reused"] == 0


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_fill_leaves_a_usable_store(kills: int, forker: Forker, tmp_path: Path) -> None:
    """From the creation of the store on; what is filled at last is right, and there once. Then another store."""
    bundle, chance = tiny_bundle("llama"), random.Random(os.urandom(8))
    codes: list[int] = []
    store, job = tmp_path / "pads-0", {"task": "fill", "count": 1, "tokens": 60}
    for number in range(kills):
        die_at = number if len(codes) < 20 and number % 2 == 0 else chance.randrange(160)
        job |= {"store": str(store), "die_at": None if number % 4 == 3 else die_at}
        codes += forker.run(job, chance.uniform(0, 0.4) if number % 4 == 3 else None)
        if (store / "store.json").exists():
            cursors(store, bundle)  # it opens
        if codes[-1] == 0:
            require_filled(store, bundle)
            store = tmp_path / f"pads-{number + 1}"
    assert codes.count(-signal.SIGKILL) >= kills // 2 and set(codes) <= {-signal.SIGKILL, 0}, codes
    assert forker.run(job | {"store": str(store), "die_at": None}, None) == [0]
    require_filled(store, bundle)


def require_filled(store: Path, bundle: Bundle) -> None:
    """60 pads of every group, all right."""
    backend, copy = Float64(CPU), ExposedCopy(bundle.exposed, bundle.manifest)
    with contextlib.closing(PadStore(store, bundle.id)) as one:
        for group, status in enumerate(one.status()):
            assert (status.left, status.used, status.reused) == (60, 0, 0)
            first, masks, images = one.take(group, 60)
            assert first == 0 and torch.equal(images, multiply(backend, masks, backend.place(copy.verified(group))))


def test_two_fills_at_once(forker: Forker, tmp_path: Path) -> None:
    """One of them is refused, or finds that all is done; the store is filled once."""
    store = tmp_path / "pads"
    codes = forker.run({"task": "fill", "count": 2, "store": str(store), "tokens": 40, "die_at": None}, None)
    assert sorted(codes) in ([0, 0], [0, 1])
    with contextlib.closing(PadStore(store, tiny_bundle("llama").id)) as one:
        assert {status.left for status in one.status()} <= {40, 80}


@pytest.mark.long
def test_the_command_itself_is_killed(tmp_path: Path, folder: Path) -> None:
    bundle, store, record = demo_bundle(), tmp_path / "pads", tmp_path / "record"
    address, chance = f"ipc://{folder}/w", random.Random(os.urandom(8))
    fill(fill_job(bundle.trusted, 800, store))
    command = [*(sys.executable, "-m", "cloven", "generate", str(bundle.trusted), "--worker", address, "--pads", str(store))]
    command += ["--prompt", TEXT, "--max-new-tokens", "100"]
    with WorkerProcess(bundle.exposed, address, "--record", str(record)):
        watcher, before = Watcher(bundle, store, record), cursors(store, bundle)
        for _ in range(6):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert process.stdout is not None
            process.stdout.read(1)  # it has begun to write
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
            process.communicate()
            found, now = watcher.new(), cursors(store, bundle)
            assert all(found) and all(now[g] - before[g] - len(indices) <= BLOCK + PROMPT for g, indices in enumerate(found))
            before = now


# --- the command line


def filled(command: Command, tmp_path: Path, tokens: int = 40, bundle: Bundle | None = None) -> Path:
    store = tmp_path / "pads"
    outcome = command("pads", "fill", str((bundle or tiny_bundle("llama")).trusted), "--store", str(store), "--tokens", str(tokens))
    assert outcome.code == 0 and outcome.err == "", outcome
    return store


def test_fill_and_status(tmp_path: Path, cloven_here: Command) -> None:
    trusted, store = str(tiny_bundle("llama").trusted), tmp_path / "pads"
    outcome = cloven_here("pads", "fill", trusted, "--store", str(store), "--tokens", "1500")
    assert outcome.code == 0 and outcome.err == ""
    first, last = outcome.out.splitlines()
    size = re.fullmatch(rf"{store}: 1,500 tokens, (\d+\.\d) MB \(0\.00 MB per token\), about (\d+ s|\d+ minutes)", first)
    assert size and last == f"{store}: lasts for 1,500 tokens"
    taken = sum(path.stat().st_blocks * 512 for path in store.iterdir()) / 1e6
    assert abs(float(size[1]) - taken) < 0.05 + 0.0041 * len(list(store.iterdir()))
    again = cloven_here("pads", "fill", trusted, "--store", str(store), "--tokens", "1500")
    assert again.out == f"{store}: lasts for 1,500 tokens already\n"

    status = cloven_here("pads", "status", trusted, "--store", str(store), "--json")
    record = json.loads(status.out)
    assert {name: record[name] for name in ("filled", "used", "burnt", "reused", "tokens_left")} == {
        "filled": 13_500, "used": 0, "burnt": 0, "reused": 0, "tokens_left": 1500,
    }  # fmt: skip
    assert record["groups"] == [{"filled": 1500, "used": 0, "burnt": 0, "reused": 0, "left": 1500}] * 9
    table = cloven_here("pads", "status", trusted, "--store", str(store)).out
    assert "1,500 tokens left" in table and "13,500" in table and "must be 0" in table


def test_the_default_place_is_beside_the_bundle(tmp_path: Path, cloven_here: Command) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    assert cloven_here("pads", "fill", str(bundle.trusted), "--tokens", "3").code == 0
    assert (tmp_path / "out" / "pads" / "store.json").is_file()
    assert json.loads(cloven_here("pads", "status", str(bundle.trusted), "--json").out)["tokens_left"] == 3


def test_generate_with_a_store_and_no_exposed_copy(tmp_path: Path, cloven_here: Command, demo_worker: WorkerProcess) -> None:
    bundle = demo_bundle("int8x2")
    store = filled(cloven_here, tmp_path, 40, bundle)
    trusted = tmp_path / "alone" / "trusted"
    shutil.copytree(bundle.trusted, trusted)
    arguments = (
        "generate",
        str(trusted),
        "--worker",
        demo_worker.address,
        "--prompt",
        TEXT,
        "--max-new-tokens",
        "10",
        "--dtype",
        "float32",
    )
    outcome = cloven_here(*arguments, "--pads", str(store), "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == greedy(demo_model(), TEXT, 10), outcome.err
    one_line(cloven_here(*arguments, "--json"), 2, "--exposed PATH")
    status = json.loads(cloven_here("pads", "status", str(trusted), "--store", str(store), "--json").out)
    assert status["reused"] == status["burnt"] == 0 and status["used"] >= 21 * 10
    assert status["groups"][-1]["used"] < status["groups"][0]["used"] + 16  # lm_head: once per token

    dry = cloven_here(*arguments[:-4], "--max-new-tokens", "60", "--dtype", "float32", "--pads", str(store), "--json")
    one_line(dry, 1, r"pads are left of group \d+, \d+ are needed: run `cloven pads fill`")
    one_line(cloven_here(*arguments, "--pads", str(store), "--on-empty", "shrug"), 2, "choose one of fail, wait, compute")
    computed = cloven_here(*arguments, "--pads", str(store), "--on-empty", "compute", "--exposed", str(bundle.exposed), "--json")
    assert json.loads(computed.out)["tokens"] == greedy(demo_model(), TEXT, 10), computed.err
    assert json.loads(cloven_here("pads", "status", str(trusted), "--store", str(store), "--json").out)["reused"] == 0


def test_wait_while_another_process_fills(tmp_path: Path, cloven_here: Command, demo_worker: WorkerProcess) -> None:
    bundle = demo_bundle("int8x2")
    store = filled(cloven_here, tmp_path, 3, bundle)
    filling = subprocess.Popen(
        [sys.executable, "-m", "cloven", "pads", "fill", str(bundle.trusted), "--store", str(store), "--tokens", "40"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    outcome = cloven_here(
        *("generate", str(bundle.trusted), "--worker", demo_worker.address, "--prompt", TEXT, "--max-new-tokens", "8"),
        *("--dtype", "float32", "--pads", str(store), "--on-empty", "wait", "--json"),
    )
    _, errors = filling.communicate(timeout=60)
    assert filling.returncode == 0, errors
    assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == greedy(demo_model(), TEXT, 8), outcome.err


def test_what_fill_refuses(tmp_path: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = str(tiny_bundle("llama").trusted), str(tiny_bundle("qwen2").trusted)
    store = str(tmp_path / "pads")
    assert cloven_here("pads", "fill", first, "--tokens", "0").code == 2
    assert cloven_here("pads", "fill", first).code == 2
    one_line(cloven_here("pads", "fill", first, second, "--tokens", "1", "--store", store), 2, "give one bundle with them")
    one_line(cloven_here("pads", "fill", first, first, "--tokens", "1"), 2, "a bundle is given twice")
    one_line(cloven_here("pads", "fill", first, "--tokens", "1", "--engine", "abacus"), 2, "choose one of auto, inline, pool, ray")
    one_line(cloven_here("pads", "fill", str(tmp_path / "nowhere"), "--tokens", "1"), 2, "is no bundle half")
    one_line(cloven_here("pads", "fill", str(tiny_bundle("llama").exposed), "--tokens", "1"), 2, "is this the exposed half")
    one_line(
        cloven_here("pads", "fill", first, "--tokens", str(10**11), "--store", store), 1, r"100,000,000,000 tokens need .* MB are free"
    )
    one_line(cloven_here("pads", "fill", first, "--tokens", "1", "--store", store, "--exposed", str(tmp_path)), 2, "--exposed PATH")
    one_line(cloven_here("pads", "status", first, "--store", store), 1, "no pad store there; make one with `cloven pads fill`")
    assert not Path(store).exists()
    (tmp_path / "pads").mkdir()
    (tmp_path / "pads" / "mine").touch()
    outcome = cloven_here("pads", "fill", first, "--tokens", "1", "--store", store)
    assert outcome.code == 2 and "holds other files" in outcome.err and "Traceback" not in outcome.err


DAMAGED: dict[str, tuple[int, str]] = {
    "copied": (1, "was made elsewhere"),
    "restored": (1, "restored from a backup"),
    "witness": (1, "missing, so nobody knows which pads"),
    "state.json": (1, "malformed"),
    "store.json": (1, "malformed"),
    "key": (1, "not a key"),
    "group-00000.checks": (1, "checks cannot be read or were altered"),
    "group-00000-000000.pads": (1, "cannot be read|is not what was written"),
    "readable": (1, "others can read the key"),
    "foreign": (3, "these pads were made for bundle"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_generate_refuses(damage: str, tmp_path: Path, cloven_here: Command, demo_worker: WorkerProcess) -> None:
    """One line, an exit code, no pad used."""
    bundle = demo_bundle("int8x2")
    store = filled(cloven_here, tmp_path, 4, tiny_bundle("llama") if damage == "foreign" else bundle)
    code, match = DAMAGED[damage]
    if damage == "copied":
        shutil.copytree(store, tmp_path / "copy")
        store = tmp_path / "copy"
    elif damage == "restored":
        backup = (store / "state.json").read_bytes()
        with contextlib.closing(PadStore(store, bundle.id)) as one:
            one.take(0, 1)
            one.take(1, 1)
        (store / "state.json").write_bytes(backup)
    elif damage == "witness":
        witness_of(store).unlink()
    elif damage == "readable":
        (store / "key").chmod(0o644)
    elif damage != "foreign":
        os.truncate(store / damage, 5)
    outcome = cloven_here(
        *("generate", str(bundle.trusted), "--worker", demo_worker.address, "--prompt", TEXT, "--max-new-tokens", "1"),
        *("--pads", str(store), "--json"),
    )
    if damage.endswith(".pads"):  # who meets it first, the thread that reads ahead or this one, is chance
        assert outcome.code == 1 and outcome.out == "" and "Traceback" not in outcome.err and "\ncloven: " in "\n" + outcome.err
        return
    one_line(outcome, code, match)
    if damage in ("copied", "restored", "witness", "readable", "foreign", "store.json", "state.json"):
        one_line(cloven_here("pads", "status", str(bundle.trusted), "--store", str(store)), code, match)
        one_line(cloven_here("pads", "fill", str(bundle.trusted), "--store", str(store), "--tokens", "5"), code, match)


# --- several stores, on Ray


@pytest.mark.long  # a Ray of its own takes 20 s to start and end
def test_ray_fills_several_stores(tmp_path: Path) -> None:
    bundles = [copied(tiny_bundle(name), tmp_path / name) for name in ("llama", "qwen2")]
    environment = {"RAY_ADDRESS": "local"}
    result = run_cloven(
        "pads", "fill", *(str(bundle.trusted) for bundle in bundles), "--tokens", "20", "--engine", "ray", timeout=180, **environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("lasts for 20 tokens") == 2
    for bundle in bundles:
        with contextlib.closing(PadStore(bundle.path / "pads", bundle.id)) as store:
            assert {status.left for status in store.status()} == {20}


@pytest.mark.long  # in the short form tests/cluster/test_ray_workers.py has the worker's
def test_a_ray_that_is_not_there(tmp_path: Path) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    result = run_cloven(
        "pads", "fill", str(bundle.trusted), "--tokens", "20", "--engine", "ray", timeout=120, RAY_ADDRESS=f"127.0.0.1:{free_port()}"
    )
    one_line(result, 1, r"the Ray cluster at RAY_ADDRESS=127\.0\.0\.1:\d+ cannot be reached")
    assert not (tmp_path / "out" / "pads").exists()
