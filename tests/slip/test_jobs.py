"""The two passes: idempotent jobs, the same bits whoever runs them, interrupted or not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cloven.engine import pool
from cloven.engine.engine import Inline
from cloven.engine.pool import ProcessPool
from cloven.errors import BadInput, RunError
from cloven.slip.config import SlipConfig
from cloven.slip.jobs import GroupJob, find_spectra, read_record, read_spectra, record_path, spectra_path, split_group
from cloven.slip.plan import PLAN, RANKS, WORK
from cloven.slip.prepare import prepare_slip
from cloven.zoo.demo import demo_model_path
from tests.preparations import Stop, again, edit_weights, hashes, key_of, own_folder, record, reference, steps_of, stop_at
from tests.split_models import run_cloven, scratch, tiny, tiny_folder

GROUPS = 9
STEPS = 2 * (GROUPS + 1) + 1  # calls of `progress`: each pass says 0 and then every group, and "write" comes once
ALL = (1, 4, 9, 10, 11, 15, 19, 20)


def interrupted(out: Path, step: int, **options: Any) -> Path:
    """An unfinished preparation, at a job's boundary: its folder."""
    with pytest.raises(Stop):
        again(out, progress=stop_at(step), **options)
    return out.with_name(f".{out.name}.partial")


def same(path: Path) -> None:
    assert hashes(path) == hashes(reference().path)


def test_progress_comes_at_every_job(tmp_path: Path) -> None:
    assert steps_of(tmp_path / "out") == STEPS


# --- the same bits


@pytest.mark.parametrize("engine", ["auto", "inline"])
def test_in_this_process(tmp_path: Path, engine: str) -> None:
    same(again(tmp_path / "out", engine=engine).path)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_in_a_pool(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(Ray: see tests/engine/test_ray.py. Each process takes seconds to start, in each pass.)"""
    monkeypatch.setattr(pool, "_cores", lambda: processes)
    same(again(tmp_path / "out", engine="pool").path)


@pytest.mark.parametrize("threads", [2, 5])
def test_however_many_threads_this_process_uses(tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same(again(tmp_path / "out").path)
    finally:
        torch.set_num_threads(before)


def test_in_whatever_order(tmp_path: Path) -> None:
    """The jobs of a pass know nothing of each other."""
    partial = interrupted(tmp_path / "out", 11)  # ranks are there
    jobs = [GroupJob(str(partial), group) for group in range(GROUPS)]
    random.Random(0).shuffle(jobs)
    list(Inline().run(split_group, jobs))
    list(Inline().run(split_group, jobs[:3]))  # again
    same(again(tmp_path / "out").path)


@pytest.mark.parametrize("step", range(STEPS))
def test_interrupted_at_every_job(tmp_path: Path, step: int) -> None:
    partial = interrupted(tmp_path / "out", step)
    assert not (tmp_path / "out").exists() and (partial / WORK / PLAN).exists()
    done = {number for number in range(GROUPS) if record_path(partial, number).exists()}
    assert len(done) == max(0, min(step - GROUPS - 1, GROUPS))
    same(again(tmp_path / "out").path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    """Every attempt gets one job further."""
    for _ in range(2 * GROUPS):
        interrupted(tmp_path / "out", 1 if not (tmp_path / ".out.partial").exists() else 2 if second_pass(tmp_path) else 1)
    same(again(tmp_path / "out").path)


def second_pass(tmp_path: Path) -> bool:
    return all(spectra_path(tmp_path / ".out.partial", group).exists() for group in range(GROUPS))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 16)
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*-*.safetensors")}
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(Stop):
        again(
            tmp_path / "out", progress=lambda *step: steps.append(step) or stop_at(0)(*step) if step[0] == "write" else steps.append(step)
        )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert steps[0][0] == "spectra" and steps[0][1] == steps[0][2] > 0  # the bar begins where it was left
    assert 0 < steps[1][1] < steps[1][2]


@pytest.mark.long  # Ray's test of the same kind is quicker
def test_another_engine_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 5, engine="pool")
    interrupted(tmp_path / "out", 10, engine="inline")
    same(again(tmp_path / "out", engine="pool").path)


def test_without_a_key_the_first_attempts_key_is_used(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 12, key=None)
    key = key_file(partial).read_bytes()
    bundle = again(tmp_path / "out", key=None)
    assert json.loads(key_of(bundle).read_bytes())["key"] == json.loads(key)["key"]
    assert hashes(again(tmp_path / "other", key=key_of(bundle)).path) == hashes(bundle.path)


def key_file(partial: Path) -> Path:
    return partial / "trusted" / "split.key"


# --- killed, really

KILLED = """
import sys
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip

if __name__ == "__main__":
    folder, out, key, engine = sys.argv[1:]
    print("ready", flush=True)
    prepare_slip(folder, out, SlipConfig(precision="int8x2"), lambda *step: print(*step, flush=True), key=key, engine=engine)
"""


def start(out: Path, engine: str) -> subprocess.Popen[str]:
    script = scratch() / "killed.py"
    script.write_text(KILLED)
    arguments = [str(tiny_folder("llama")), str(out), str(key_of(reference())), engine]
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def killed(out: Path, engine: str, moment: Callable[[subprocess.Popen[str]], None]) -> int:
    with start(out, engine) as process:
        moment(process)
        process.kill()
    return process.returncode


def after_lines(count: int, seconds: float) -> Callable[[subprocess.Popen[str]], None]:
    def moment(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for _ in range(count):
            process.stdout.readline()
        time.sleep(seconds)

    return moment


@pytest.mark.parametrize(
    ("engine", "lines", "milliseconds"),
    [pytest.param("inline", 2, 3, marks=pytest.mark.long), ("inline", 13, 7), pytest.param("pool", 14, 1, marks=pytest.mark.long)],
)
def test_sigkill(tmp_path: Path, engine: str, lines: int, milliseconds: int) -> None:
    """In the middle of a job: half a file may be left."""
    code = killed(tmp_path / "out", engine, after_lines(lines, milliseconds / 1000))
    assert code == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / WORK).is_dir()
    same(again(tmp_path / "out").path)


@pytest.mark.long
@pytest.mark.parametrize(("engine", "step"), [("inline", 0.02), ("pool", 1.0)])  # a pool's processes take seconds to start
def test_sigkill_at_random_moments(tmp_path: Path, engine: str, step: float) -> None:
    """Until it is done; every attempt is killed a little later than the one before, at no boundary."""
    moments = random.Random(1)
    for attempt in range(40):
        delay = moments.random() * step * (1 + attempt)
        if killed(tmp_path / "out", engine, after_lines(1, delay)) == 0 or (tmp_path / "out").exists():
            break
    assert attempt >= 2
    if not (tmp_path / "out").exists():
        again(tmp_path / "out")
    same(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_files_that_were_half_written(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 14)
    missing = next(number for number in range(GROUPS) if not record_path(partial, number).exists())
    halves = [
        partial / "exposed" / f"exposed-{missing + 1:05d}.safetensors.partial",
        partial / "trusted" / f"model-{missing + 1:05d}.safetensors.partial",
        partial / "trusted" / f"model-{missing + 1:05d}.safetensors",  # whole, or so it looks: its record is not there
        partial / "trusted" / "other-00001.safetensors.partial",
        partial / "trusted" / "other-00001.safetensors",
        partial / "trusted" / "other-00007.safetensors",
        partial / "trusted" / "split.key.partial",
        partial / "exposed" / ".tmpvHQVA2",
        partial / "trusted" / ".tmpaB3xYz",
        partial / "trusted" / "config.json",
        partial / "trusted" / "manifest.json",
        partial / "exposed" / "manifest.json",
        partial / WORK / f"split-{missing:05d}.json.partial",
        partial / WORK / "ranks.json.partial",
        partial / WORK / "ranks.json",
    ]
    for path in halves:
        path.write_bytes(b"hal")
    same(again(tmp_path / "out").path)


def test_interrupted_while_files_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes for a large model: what was done must still be there."""
    from cloven.slip import prepare

    def stops(path: Path) -> str:
        raise Stop

    monkeypatch.setattr(prepare, "sha256_file", stops)
    with pytest.raises(Stop):
        again(tmp_path / "out")
    monkeypatch.undo()
    assert steps_of(tmp_path / "out") == 3  # no job is left
    same(tmp_path / "out")


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.bundle import shards

    calls, write = iter(range(100)), shards.save_file

    def full(*args: Any, **options: Any) -> None:
        if next(calls) == 13:
            raise OSError(28, "No space left on device")
        write(*args, **options)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(
        RunError, match=r"No space left on device.*; run the same command again to go on, or remove .*\.out\.partial"
    ) as caught:
        again(tmp_path / "out")
    assert caught.value.exit_code == 1
    same(again(tmp_path / "out").path)


# --- what changed in between is refused, and what is there is not lost


def refused_and_kept(tmp_path: Path, match: str, **options: Any) -> None:
    before = hashes(tmp_path / ".out.partial")
    work = sorted(path.name for path in (tmp_path / ".out.partial" / WORK).iterdir())
    with pytest.raises(BadInput, match=match) as caught:
        again(tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert before.items() <= hashes(tmp_path / ".out.partial").items()
    assert set(work) <= {path.name for path in (tmp_path / ".out.partial" / WORK).iterdir()}


@pytest.mark.parametrize("step", [0, 5, 15])
def test_another_configuration(tmp_path: Path, step: int) -> None:
    interrupted(tmp_path / "out", step, key=None)
    for config in (SlipConfig(), SlipConfig(precision="int8x2", rank=3), SlipConfig(precision="int8x2", scramble="none")):
        with pytest.raises(BadInput, match="an unfinished preparation of another model or with other settings; remove it to start afresh"):
            prepare_slip(tiny_folder("llama"), tmp_path / "out", config)
    assert key_file(tmp_path / ".out.partial").exists()
    again(tmp_path / "out", key=None).verify()


def test_another_model(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 15, key=None)
    refused_and_kept(tmp_path, "of another model or with other settings", key=None, model=tiny_folder("qwen2"))
    refused_and_kept(tmp_path, "of another model or with other settings", key=None, model=own_folder(tmp_path / "copy"))


@pytest.mark.parametrize("change", ["time", "content"])
def test_another_checkpoint_in_the_same_place(tmp_path: Path, change: str) -> None:
    folder = own_folder(tmp_path / "model")
    interrupted(tmp_path / "out", 15, key=None, model=folder)
    if change == "time":
        os.utime(folder / "model.safetensors", ns=(1, 1))
    else:
        edit_weights(folder, lambda held: held["lm_head.weight"].mul_(2))
    refused_and_kept(tmp_path, "of another model or with other settings", key=None, model=folder)


def test_a_checkpoint_that_changes_while_jobs_run(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "model")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "split" and 0 < done < total:
            os.utime(folder / "model.safetensors", ns=(1, 1))

    with pytest.raises(BadInput, match="the checkpoint has changed since the preparation began"):
        again(tmp_path / "out", key=None, model=folder, progress=progress)


@pytest.mark.parametrize("origin", ["private", "public-base"])
def test_a_weight_that_changes_in_place_between_the_passes(tmp_path: Path, origin: str) -> None:
    """Same size, same time: the ranks and the key belong to other numbers."""

    def change(held: dict[str, Tensor]) -> None:
        for name in held:
            if "proj" in name or "lm_head" in name:
                held[name].add_(1e-3)

    folder = own_folder(tmp_path / "model")
    public = {"public_base": folder} if origin == "public-base" else {}
    if public:
        edit_weights(folder, change)  # the base is not the model itself
    model = tiny_folder("llama") if public else folder
    config = SlipConfig(scramble="none" if public else "mixing", origin=origin)
    with pytest.raises(Stop):
        prepare_slip(model, tmp_path / "out", config, stop_at(12), **public)
    edit_weights(folder, change, keep_time=True)
    with pytest.raises(BadInput, match="the weight has changed since the first pass"):
        prepare_slip(model, tmp_path / "out", config, **public)


def test_another_adapter_in_the_same_place(tmp_path: Path) -> None:
    from tests.lora_bundles import peft_adapter

    peft_adapter(tmp_path / "adapter")
    with pytest.raises(Stop):
        prepare_slip(tiny_folder("llama"), tmp_path / "out", progress=stop_at(4), adapter=tmp_path / "adapter")
    peft_adapter(tmp_path / "adapter", seed=1)
    with pytest.raises(BadInput, match="of another model or with other settings"):
        prepare_slip(tiny_folder("llama"), tmp_path / "out", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("step", [0, 5, 15])
def test_another_key(tmp_path: Path, step: int) -> None:
    interrupted(tmp_path / "out", step, key=None)
    refused_and_kept(tmp_path, "an unfinished preparation with another key; remove it to start afresh")
    again(tmp_path / "out", key=None).verify()


def test_a_key_that_was_given_need_not_be_given_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 15)
    same(again(tmp_path / "out", key=None).path)


# --- what is damaged


@pytest.mark.parametrize("content", [b"", b"hal", b"[]", b"{}", b"\0" * 100])
@pytest.mark.parametrize("what", ["plan", "spectra", "record", "key"])
def test_what_is_damaged_is_named(tmp_path: Path, what: str, content: bytes) -> None:
    partial = interrupted(tmp_path / "out", 15, key=None)
    done = next(number for number in range(GROUPS) if record_path(partial, number).exists())
    place = {
        "plan": partial / WORK / PLAN,
        "spectra": spectra_path(partial, 3),
        "record": record_path(partial, done),
        "key": key_file(partial),
    }
    good = place[what].read_bytes()
    place[what].write_bytes(content)
    refused_and_kept(tmp_path, rf"{place[what].name}: |cannot be continued: remove it to start afresh", key=None)
    place[what].write_bytes(good)
    again(tmp_path / "out", key=None).verify()


@pytest.mark.parametrize("what", ["spectra", "record"])
def test_what_is_damaged_can_be_removed_and_is_made_again(tmp_path: Path, what: str) -> None:
    partial = interrupted(tmp_path / "out", 15)
    done = next(number for number in range(GROUPS) if record_path(partial, number).exists())
    (spectra_path(partial, done) if what == "spectra" else record_path(partial, done)).unlink()
    same(again(tmp_path / "out").path)


# --- one job


def test_spectra(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 10)
    values, digests = read_spectra(partial, 0)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    for name, found in zip(names, values, strict=True):
        assert torch.allclose(found, torch.linalg.svdvals(tiny("llama").get_submodule(name).weight.double()), atol=1e-8)
    assert len(set(digests)) == 3 and all(len(digest) == 64 for digest in digests)
    assert spectra_path(partial, 0).stat().st_mode & 0o777 == 0o600


def test_records(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 20)
    found = read_record(partial, 0)
    assert [shape["name"].rpartition(".")[2] for shape in found["shapes"]] == ["q_proj", "k_proj", "v_proj"]
    assert [shape["rank"] for shape in found["shapes"]] == record(partial / WORK / RANKS)[0]
    held = load_file(partial / "trusted" / found["kept"]["file"])
    assert sorted(held) == sorted(found["kept"]["tensors"]) and sum(t.nbytes for t in held.values()) == found["kept"]["bytes"]
    assert found["exposed"]["rows"] == 2 * 96 and found["exposed"]["columns"] == 48
    assert all(0 <= secret <= whole for secret, whole in found["energies"])
    assert 0 < found["quantisation"][0] < 1e-6 * found["quantisation"][1]


@pytest.mark.parametrize("job", [find_spectra, split_group])
def test_a_job_in_a_folder_without_a_plan(tmp_path: Path, job: Callable[[GroupJob], None]) -> None:
    with pytest.raises(BadInput):
        job(GroupJob(str(tmp_path), 0))


def test_jobs_hold_paths_and_numbers_only() -> None:
    assert {field: type(value) for field, value in vars(GroupJob("a", 1)).items()} == {"folder": str, "group": int}


@pytest.mark.parametrize("engine", ["inline", pytest.param("pool", marks=pytest.mark.long)])  # tests/engine has both pool and Ray
def test_a_job_that_fails(tmp_path: Path, engine: str) -> None:
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["model.layers.1.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan")))
    with pytest.raises(BadInput, match=r"^model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinity$"):
        prepare_slip(folder, tmp_path / "out", engine=engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_job_that_fails_in_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug leaves what was done."""
    from cloven.slip import prepare

    def broken(job: GroupJob) -> None:
        if job.group == 4:
            raise ZeroDivisionError
        split_group(job)

    monkeypatch.setattr(prepare, "split_group", broken)
    with pytest.raises(ZeroDivisionError):
        again(tmp_path / "out")
    monkeypatch.undo()
    same(again(tmp_path / "out").path)


def test_the_pool_is_given_the_memory_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.slip import prepare

    asked = []

    def select(name: str, parameters: int, bytes_per_job: int) -> Inline:
        asked.append((name, parameters, bytes_per_job))
        return Inline()

    monkeypatch.setattr(prepare, "select_engine", select)
    again(tmp_path / "out", engine="pool")
    linears = [module.weight.numel() for module in tiny("llama").modules() if isinstance(module, torch.nn.Linear)]
    assert asked == [("pool", sum(linears), 2**30 + 5 * 4 * 2 * 80 * 48)]  # gate and up are the largest group
    assert ProcessPool(2**60).processes == 1


# --- on the command line


@pytest.mark.parametrize("engine", ["inline", pytest.param("pool", marks=pytest.mark.long)])
def test_the_same_command_goes_on(tmp_path: Path, engine: str) -> None:
    """SIGINT in the middle: exit code 130, no traceback; the same command again finishes."""
    model = demo_model_path() if engine == "inline" else tiny_folder("llama")  # jobs that last a while, or processes that take theirs
    shutil.copytree(model, tmp_path / "model")
    arguments = ["prepare", "slip", str(tmp_path / "model"), str(tmp_path / "out"), "--no-public-relative", "--engine", engine]
    for _ in range(5):  # on a busy machine it may have finished before it is interrupted: then once more
        process = subprocess.Popen([sys.executable, "-m", "cloven", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not list((tmp_path / ".out.partial" / WORK).glob("spectra-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130 and out == "" and "Traceback" not in errors and len(errors.splitlines()) <= 1
    key = record(key_file(tmp_path / ".out.partial"))["key"]
    result = run_cloven(*arguments)
    assert result.returncode == 0, result.stderr
    assert record(tmp_path / "out" / "trusted" / "split.key")["key"] == key
