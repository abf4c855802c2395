"""The command line. Happy paths run in processes of their own; most errors in this one, through the same `run`: it is quicker."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zmq

import cloven
from cloven.cluster.worker_process import WorkerProcess
from tests.end_to_end.commands import Command, Outcome, one_line
from tests.end_to_end.liar import Liar
from tests.helpers import FakeWorker, free_port
from tests.lora_bundles import adapter_folder
from tests.preparations import fine_tune
from tests.split_models import (
    copied,
    demo_bundle,
    demo_model,
    demo_tokenizer,
    greedy,
    run_cloven,
    tiny_bundle,
    tiny_folder,
)

PROMPT = "ROMEO:"


# --- help


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """That is what makes it quick: what these import takes seconds. The process says itself what it had imported at its end."""
    program = """
import atexit, sys
heavy = {"torch", "transformers", "numpy", "zmq", "ray", "uvicorn", "fastapi", "matplotlib", "scipy", "huggingface_hub"}
atexit.register(lambda: print("imported:", *sorted(heavy & set(sys.modules)), file=sys.stderr))
from cloven.cli.main import run
run()
"""
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == (0 if arguments else 2)
    assert ("worker" in result.stdout + result.stderr) or result.stdout.startswith(f"cloven {cloven.__version__}")
    assert result.stderr.splitlines()[-1].split() == ["imported:"]


@pytest.mark.parametrize(
    "command",
    ["worker", "generate", "inspect", "keygen", "doctor", "demo", "prepare", "bench"]
    + [f"{group} slip" for group in ("prepare", "bench")]
    + ["bench memory", "bench rounds"],
)
def test_every_command_explains_itself(command: str, cloven_here: Command) -> None:
    outcome = cloven_here(*command.split(), "--help")
    assert outcome.code == 0 and "Usage" in outcome.out and len(outcome.out) > 200


def test_unknown_commands_and_options(cloven_here: Command) -> None:
    assert cloven_here("frobnicate").code == 2
    assert cloven_here("doctor", "--frobnicate").code == 2
    assert cloven_here("generate").code == 2


# --- the whole way, as a user goes it: prepare, inspect, keygen, worker, generate, over tcp with keys


@pytest.mark.long  # the README's commands go the same way in the short form
def test_the_whole_way_over_tcp(folder: Path, cloven_here: Command) -> None:
    out, keys, port = folder / "out", folder / "keys", free_port()
    made = cloven_here("prepare", "slip", str(cloven.demo_model_path()), str(out), "--precision", "int8x2", "--no-public-relative")
    assert made.code == 0 and made.err == ""  # no bars where there is no terminal
    assert "kept secret" in made.out and str(out / "trusted") in made.out and cloven.open_bundle(out).id in made.out

    generated = cloven_here("keygen", str(keys))
    assert generated.code == 0 and str(keys / "worker") in generated.out
    assert "secret" not in generated.out and (keys / "trusted" / "key.json").stat().st_mode & 0o777 == 0o600

    address = f"tcp://127.0.0.1:{port}"
    worker = subprocess.Popen(
        [sys.executable, "-m", "cloven", "worker", str(out / "exposed"), "--listen", address, "--keys", str(keys / "worker")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        result = run_cloven(
            *("generate", str(out / "trusted"), "--worker", address, "--keys", str(keys / "trusted"), "--prompt", PROMPT),
            *("--max-new-tokens", "8", "--dtype", "float32", "--json"),
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["tokens"] == greedy(demo_model(), PROMPT, 8)
        assert "INSECURE" not in result.stderr
    finally:
        worker.send_signal(signal.SIGTERM)
        listening, errors = worker.communicate(timeout=20)
    assert worker.returncode == 0 and errors == ""
    assert re.fullmatch(rf"bundle {cloven.open_bundle(out).id}: 21 matrices on cpu \(.+\), listening at {address}\n", listening)


def test_plain_tcp_only_with_a_banner_on_both_sides(folder: Path, cloven_here: Command) -> None:
    bundle, address = tiny_bundle("llama"), f"tcp://127.0.0.1:{free_port()}"
    one_line(cloven_here("worker", str(bundle.exposed), "--listen", address), 2, "tcp needs keys.*cloven keygen")
    one_line(cloven_here("generate", str(demo_bundle().trusted), "--worker", address, "--prompt", PROMPT), 2, "tcp needs keys")
    with WorkerProcess(demo_bundle().exposed, address, "--insecure-plain-tcp") as worker:
        outcome = cloven_here(
            *(
                "generate",
                str(demo_bundle().trusted),
                "--worker",
                address,
                "--prompt",
                PROMPT,
                "--max-new-tokens",
                "2",
                "--insecure-plain-tcp",
            )
        )
        assert outcome.code == 0 and "INSECURE: plain tcp" in outcome.err
        assert "INSECURE: this worker listens on plain tcp" in worker.log()


@pytest.mark.long
def test_keys_of_somebody_else(folder: Path, cloven_here: Command) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    for name in ("mine", "theirs"):
        assert cloven_here("keygen", str(folder / name)).code == 0
    with WorkerProcess(tiny_bundle("llama").exposed, address, "--keys", str(folder / "theirs" / "worker")):
        # Their worker's key pinned, but my own key, which their worker has never seen.
        (folder / "mine" / "trusted" / "worker.json").write_bytes((folder / "theirs" / "trusted" / "worker.json").read_bytes())
        trusted = demo_bundle().trusted
        one_line(
            cloven_here(
                "generate", str(trusted), "--worker", address, "--keys", str(folder / "mine"), "--prompt", PROMPT, "--timeout", "20"
            ),
            3,
            "the worker refuses this key",
        )


# --- generate


def generate(command: Command, worker: WorkerProcess, *arguments: str) -> Outcome:
    trusted = demo_bundle("int8x2").trusted
    return command("generate", str(trusted), "--worker", worker.address, "--dtype", "float32", "--max-new-tokens", "6", *arguments)


def test_generate_streams_the_text(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    outcome = generate(cloven_here, demo_worker, "--prompt", PROMPT)
    text = demo_tokenizer().decode(greedy(demo_model(), PROMPT, 6), skip_special_tokens=True)
    assert outcome.code == 0 and outcome.out.rstrip("\n") == text.rstrip("\n") and outcome.err == ""


def test_generate_as_json(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    report = json.loads(generate(cloven_here, demo_worker, "--prompt", PROMPT, "--json").out)
    assert set(report) == {
        "text", "tokens", "prompt_tokens", "seconds", "tokens_per_s", "exchanges", "exchanges_per_token", "bytes_up", "bytes_down",
        "seconds_waiting",
    }  # fmt: skip
    assert report["tokens"] == greedy(demo_model(), PROMPT, 6)
    assert report["text"] == demo_tokenizer().decode(report["tokens"], skip_special_tokens=True)
    assert report["prompt_tokens"] == len(demo_tokenizer()(PROMPT)["input_ids"])
    assert (
        report["exchanges"] == 6 * 21
        and report["exchanges_per_token"] == 21
        and report["bytes_up"] > 0
        and report["bytes_down"] > report["bytes_up"]
    )
    assert 0 < report["seconds_waiting"] < report["seconds"] and report["tokens_per_s"] == pytest.approx(6 / report["seconds"])


def test_the_prompt_from_standard_input(cloven_here: Command, demo_worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are visible to every user of the machine; a pipe is not. The address may come from the environment."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    monkeypatch.setenv("CLOVEN_WORKER", demo_worker.address)
    trusted = str(demo_bundle("int8x2").trusted)
    outcome = cloven_here("generate", trusted, "--prompt", "-", "--max-new-tokens", "6", "--dtype", "float32", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == greedy(demo_model(), PROMPT, 6)


def test_sampling_repeats_with_its_seed(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    first, second, other = (
        generate(cloven_here, demo_worker, "--prompt", PROMPT, "--temperature", "1", "--seed", seed).out for seed in ("1", "1", "2")
    )
    assert first == second != other


def test_too_long_a_prompt(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    one_line(generate(cloven_here, demo_worker, "--prompt", "word " * 600), 2, r"the prompt has \d+ tokens; .* more than the model's 512")
    one_line(generate(cloven_here, demo_worker, "--prompt", PROMPT, "--max-new-tokens", "512"), 2, "more than the model's 512")


def test_an_empty_prompt(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    one_line(generate(cloven_here, demo_worker, "--prompt", ""), 2, "the prompt is empty")


def test_bad_values(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    one_line(generate(cloven_here, demo_worker, "--prompt", PROMPT, "--dtype", "int4"), 2, "choose auto, float32 or bfloat16")
    one_line(generate(cloven_here, demo_worker, "--prompt", PROMPT, "--timeout", "0"), 2, "timeout")
    for arguments in (("--max-new-tokens", "0"), ("--temperature", "-1"), ("--max-new-tokens", "many")):
        assert generate(cloven_here, demo_worker, "--prompt", PROMPT, *arguments).code == 2


def test_no_worker(folder: Path, cloven_here: Command) -> None:
    outcome = cloven_here("generate", str(demo_bundle().trusted), "--worker", f"ipc://{folder}/w", "--prompt", PROMPT, "--timeout", "0.5")
    one_line(outcome, 1, "is `cloven worker` running there")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_nothing_of_a_lie_is_printed(
    arguments: list[str], folder: Path, cloven_here: Command, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    bundle, address = demo_bundle(), f"ipc://{folder}/w"
    with FakeWorker(context, address, Liar(bundle.exposed, lie_at=2)):
        outcome = cloven_here("generate", str(bundle.trusted), "--worker", address, "--prompt", PROMPT, "--max-new-tokens", "4", *arguments)
    one_line(outcome, 3, r"model\.layers\.0\.self_attn\.o_proj: the worker's answer is wrong in 1 of")


def test_bad_addresses(cloven_here: Command) -> None:
    for address in ("here", "http://x", "ipc://relative"):
        one_line(cloven_here("generate", str(demo_bundle().trusted), "--worker", address, "--prompt", PROMPT), 2, "address")


def test_a_socket_folder_open_to_others(folder: Path, cloven_here: Command) -> None:
    folder.chmod(0o755)
    outcome = cloven_here("generate", str(demo_bundle().trusted), "--worker", f"ipc://{folder}/w", "--prompt", PROMPT, "--timeout", "0.5")
    one_line(outcome, 3, "mode 0700")
    one_line(cloven_here("worker", str(demo_bundle().exposed), "--listen", f"ipc://{folder}/w"), 3, "mode 0700")


def test_the_wrong_half_and_no_half(tmp_path: Path, cloven_here: Command, folder: Path) -> None:
    bundle, somewhere = demo_bundle(), f"ipc://{folder}/w"
    no_half = "give OUT/trusted|is no bundle half"
    for path, match in ((bundle.exposed, "is this the exposed half"), (bundle.path, no_half), (tmp_path / "nowhere", no_half)):
        one_line(cloven_here("generate", str(path), "--worker", somewhere, "--prompt", PROMPT), 2, match)
    one_line(cloven_here("worker", str(bundle.trusted), "--listen", somewhere), 2, "is this the trusted half")
    one_line(cloven_here("worker", str(tmp_path / "nowhere"), "--listen", somewhere), 2, "is no bundle half")


def test_a_model_that_is_not_split(cloven_here: Command, folder: Path) -> None:
    outcome = cloven_here("generate", str(cloven.demo_model_path()), "--worker", f"ipc://{folder}/w", "--prompt", PROMPT)
    one_line(outcome, 2, "is no bundle half.*cloven prepare")


def damaged(tmp_path: Path, name: str, content: bytes | None) -> Path:
    bundle = copied(demo_bundle(), tmp_path / "out")
    if content is None:
        (bundle.trusted / name).unlink()
    else:
        (bundle.trusted / name).write_bytes(content)
    return bundle.trusted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", (cloven.demo_model_path() / "config.json").read_bytes()),  # of the unsplit model: nothing calls cloven
        ("model.safetensors.index.json", b"{"),
        ("model-00001.safetensors", None),
        ("manifest.json", None),
        ("manifest.json", b"[]"),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_damaged_trusted_half(name: str, content: bytes | None, tmp_path: Path, folder: Path, cloven_here: Command) -> None:
    trusted = damaged(tmp_path, name, content)
    outcome = cloven_here("generate", str(trusted), "--worker", f"ipc://{folder}/w", "--prompt", PROMPT, "--timeout", "0.5")
    assert outcome.code in (2, 3)
    one_line(outcome, outcome.code, "")


def test_a_tampered_trusted_half(tmp_path: Path, folder: Path, cloven_here: Command) -> None:
    trusted = copied(demo_bundle(), tmp_path / "out").trusted
    shard = trusted / "model-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    outcome = cloven_here("generate", str(trusted), "--worker", f"ipc://{folder}/w", "--prompt", PROMPT)
    one_line(outcome, 3, r"model-00001\.safetensors: the file's bytes differ")


# --- worker


def test_the_worker_refuses_a_tampered_half(tmp_path: Path, folder: Path, cloven_here: Command) -> None:
    exposed = copied(tiny_bundle("llama"), tmp_path / "out").exposed
    shard = exposed / "exposed-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    one_line(cloven_here("worker", str(exposed), "--listen", f"ipc://{folder}/w"), 3, "the file's bytes differ")


def test_worker_errors(tmp_path: Path, folder: Path, cloven_here: Command) -> None:
    exposed = str(tiny_bundle("llama").exposed)
    one_line(cloven_here("worker", exposed, "--listen", f"ipc://{folder}/w", "--device", "tpu"), 2, "choose cpu, cuda")
    one_line(cloven_here("worker", exposed, "--listen", "ipc://relative"), 2, "absolute path")
    (folder / "file").write_text("precious")
    one_line(cloven_here("worker", exposed, "--listen", f"ipc://{folder}/file"), 2, "it is no socket")
    assert (folder / "file").read_text() == "precious"
    one_line(cloven_here("worker", exposed, "--listen", f"tcp://127.0.0.1:{free_port()}", "--keys", str(folder)), 2, "no such key file")
    assert cloven_here("worker", exposed, "--listen", f"ipc://{folder}/w", "--threads", "-1").code == 2


def test_no_such_device(folder: Path, cloven_here: Command) -> None:
    outcome = cloven_here("worker", str(tiny_bundle("llama").exposed), "--listen", f"ipc://{folder}/w", "--device", "cuda:99")
    one_line(outcome, 1, "device cuda:99 cannot be used")


def test_an_address_in_use(folder: Path, cloven_here: Command) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert cloven_here("keygen", str(folder / "keys")).code == 0
        outcome = cloven_here("worker", str(tiny_bundle("llama").exposed), "--listen", address, "--keys", str(folder / "keys"))
        one_line(outcome, 1, "cannot listen at tcp:")


# --- prepare


def test_prepare_errors(tmp_path: Path, cloven_here: Command) -> None:
    def prepare(*arguments: str) -> Outcome:
        return cloven_here("prepare", "slip", *arguments, "--no-public-relative")

    model, out = str(tiny_folder("llama")), str(tmp_path / "out")
    one_line(prepare(str(tmp_path / "nowhere"), out), 2, "no such model directory")
    one_line(prepare(model, out, "--secret-fraction", "3"), 2, "0.03 is 3 %")
    one_line(prepare(model, out, "--precision", "int4"), 2, "int8, int8x2")
    one_line(prepare(model, out, "--rank", "-2"), 2, "rank -2")
    one_line(prepare(str(tiny_bundle("llama").trusted), out), 2, "already quantised or split")
    one_line(prepare(model, str(tiny_bundle("llama").path)), 2, "exists already")
    assert not (tmp_path / "out").exists()


def test_prepare_with_options(tmp_path: Path, cloven_here: Command) -> None:
    outcome = cloven_here(
        "prepare",
        "slip",
        str(tiny_folder("llama")),
        str(tmp_path / "out"),
        "--rank",
        "2",
        "--insecure-scramble",
        "none",
        "--no-public-relative",
    )
    assert outcome.code == 0 and "scramble none" in outcome.out and "INSECURE: scramble none" in outcome.err
    assert cloven.open_bundle(tmp_path / "out").manifest.parameters == {
        "secret_fraction": 0.03, "rank": 2, "precision": "int8", "scramble": "none", "origin": "private",
    }  # fmt: skip


def test_prepare_asks_where_the_model_comes_from(tmp_path: Path, cloven_here: Command) -> None:
    model, out = str(tiny_folder("llama")), str(tmp_path / "out")
    adapter, base = ("--adapter", str(adapter_folder())), ("--public-base", model)
    for options in ((), ("--rank", "3"), ("--secret-fraction", "0.01"), ("--secret-fraction", "0", "--rank", "3")):
        one_line(cloven_here("prepare", "slip", model, out, *options), 2, "--adapter PEFT_DIR .*--public-base BASE .*--no-public-relative")
    for options in ((*adapter, *base), (*adapter, "--no-public-relative"), ("--secret-fraction", "0", *base, "--no-public-relative")):
        one_line(cloven_here("prepare", "slip", model, out, *options), 2, "say where the model comes from: give one")
    both = ("--no-public-relative", "--rank", "3", "--secret-fraction", "0.01")
    one_line(cloven_here("prepare", "slip", model, out, *both), 2, "both say how much to keep secret: give one")
    assert not (tmp_path / "out").exists()
    nothing_secret = cloven_here("prepare", "slip", model, out, "--secret-fraction", "0")
    assert nothing_secret.code == 0 and cloven.open_bundle(tmp_path / "out").manifest.summary["secret_fraction"] == 0


def test_prepare_with_a_public_relative_takes_no_scramble(tmp_path: Path, cloven_here: Command) -> None:
    model, out = str(tiny_folder("llama")), str(tmp_path / "out")
    adapter, base = ("--adapter", str(adapter_folder())), ("--public-base", model)
    one_line(cloven_here("prepare", "slip", model, out, *adapter, "--insecure-scramble", "mixing"), 2, "choose permutation or none")
    one_line(
        cloven_here("prepare", "slip", model, out, *base, "--insecure-scramble", "permutation"), 2, "scramble: a public relative undoes it"
    )
    one_line(cloven_here("prepare", "slip", model, out, *adapter, "--rank", "4"), 2, "rank: the secret part is exactly the adapter")
    for fraction in ("0", "0.02"):
        said = "--secret-fraction: with --adapter the secret part is exactly the adapter"
        one_line(cloven_here("prepare", "slip", model, out, *adapter, "--secret-fraction", fraction), 2, said)
    assert not (tmp_path / "out").exists()


def test_prepare_with_an_adapter(tmp_path: Path, cloven_here: Command) -> None:
    outcome = cloven_here("prepare", "slip", str(tiny_folder("llama")), str(tmp_path / "out"), "--adapter", str(adapter_folder()))
    assert outcome.code == 0 and outcome.err == "" and "a function of the public base alone" in " ".join(outcome.out.split())
    assert cloven.open_bundle(tmp_path / "out").manifest.parameters["origin"] == "adapter"


def test_prepare_with_a_public_base(tmp_path: Path, cloven_here: Command) -> None:
    tuned = fine_tune(tmp_path / "tuned", rank=6)
    base = ("--public-base", str(tiny_folder("llama")), "--rank", "2")
    outcome = cloven_here("prepare", "slip", str(tuned), str(tmp_path / "out"), *base)
    exposed = 1 - cloven.open_bundle(tmp_path / "out").manifest.summary["secret_energy"]
    assert outcome.code == 0 and 0.1 < exposed < 0.9
    assert f"{exposed:.1%} of the fine-tune" in " ".join(outcome.out.split())


def test_prepare_again_with_the_key(tmp_path: Path, cloven_here: Command) -> None:
    model, key = str(tiny_folder("llama")), str(tiny_bundle("llama").trusted / "split.key")
    options = ("--no-public-relative", "--key", key)
    assert cloven_here("prepare", "slip", model, str(tmp_path / "out"), *options, "--engine", "inline").code == 0
    assert cloven.open_bundle(tmp_path / "out").id == tiny_bundle("llama").id
    one_line(cloven_here("prepare", "slip", model, str(tmp_path / "other"), *options, "--rank", "2"), 2, "this key belongs to a split with")
    one_line(cloven_here("prepare", "slip", model, str(tmp_path / "other"), *options, "--device", "tpu"), 2, "choose cpu, or cuda")
    one_line(cloven_here("prepare", "slip", model, str(tmp_path / "other"), *options, "--engine", "dask"), 2, "auto, inline, pool, ray")


@pytest.mark.long
def test_a_model_of_the_hub_without_a_network(tmp_path: Path) -> None:
    result = run_cloven(
        *("prepare", "slip", "no-such-org/no-such-model", str(tmp_path / "out"), "--no-public-relative"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    one_line(result, 2, "no such directory, and the Hub gives no such model")


# --- inspect


def test_inspect(cloven_here: Command) -> None:
    bundle = demo_bundle("int8x2")
    outcome = cloven_here("inspect", str(bundle.path))
    assert outcome.code == 0 and bundle.id in outcome.out and "not hashed" in outcome.out
    assert "all hashes match" in cloven_here("inspect", str(bundle.path), "--verify").out


def test_inspect_as_json(cloven_here: Command) -> None:
    bundle = demo_bundle("int8x2")
    report: dict[str, Any] = json.loads(cloven_here("inspect", str(bundle.path), "--json", "--verify").out)
    assert set(report) == {"bundle", "scheme", "parameters", "summary", "groups", "exposed_bytes", "trusted_bytes", "verified"}
    assert report["bundle"] == bundle.id and report["scheme"] == "slip" and report["verified"] is True
    assert report["parameters"]["precision"] == "int8x2" and len(report["groups"]) == 21
    assert report["exposed_bytes"] == sum(rows * columns for rows, columns in report["groups"])
    assert 0 < report["trusted_bytes"] < report["exposed_bytes"]


def test_inspect_errors(tmp_path: Path, cloven_here: Command) -> None:
    one_line(cloven_here("inspect", str(tmp_path)), 2, "is no bundle half")
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    (bundle.exposed / "README.md").write_text("not hashed: a README may be edited")
    (bundle.trusted / "README.md").write_text("tampered")
    assert cloven_here("inspect", str(bundle.path)).code == 0
    one_line(cloven_here("inspect", str(bundle.path), "--verify"), 3, r"trusted/README\.md: the file's bytes differ")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "trusted").symlink_to(tiny_bundle("llama").trusted)
    (mixed / "exposed").symlink_to(tiny_bundle("qwen2").exposed)
    one_line(cloven_here("inspect", str(mixed)), 3, f"{tiny_bundle('qwen2').id}.*{tiny_bundle('llama').id}")


# --- keygen, doctor


def test_keygen_does_not_overwrite(folder: Path, cloven_here: Command) -> None:
    assert run_cloven("keygen", str(folder / "keys")).returncode == 0
    before = (folder / "keys" / "trusted" / "key.json").read_bytes()
    one_line(run_cloven("keygen", str(folder / "keys")), 2, "holds keys already")
    assert (folder / "keys" / "trusted" / "key.json").read_bytes() == before
    (folder / "file").write_text("")
    one_line(cloven_here("keygen", str(folder / "file")), 2, "cannot write keys there")


def test_doctor(cloven_here: Command) -> None:
    outcome = cloven_here("doctor")
    assert outcome.code == 0 and "FAIL" not in outcome.out and "exact product on cpu" in outcome.out
    checks = json.loads(cloven_here("doctor", "--json").out)
    assert all(check["ok"] for check in checks) and {check["name"] for check in checks} >= {"versions", "platform", "encryption", "sockets"}


def test_doctor_finds_what_does_not_work(tmp_path: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)  # too long a path for a socket
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    outcome = cloven_here("doctor")
    assert outcome.code == 1 and "FAIL  sockets" in outcome.out and "->" in outcome.out


# --- demo, bench

DEMO_KEYS = {
    "tokens_identical", "tokens_identical_int8", "bit_exact", "trusted_pid", "worker_pid", "exchanges_per_token", "bytes_up_per_token",
    "bytes_down_per_token", "tokens_per_s_plain", "tokens_per_s_protected", "pad_seconds_per_token", "secret_fraction",
    "perplexity_original", "perplexity_protected", "perplexity_protected_int8x2", "perplexity_exposed_only",
    "perplexity_exposed_unscrambled", "worker_saw",
}  # fmt: skip


def check_demo(report: dict[str, Any], prompts: int) -> None:
    """The values make sense, whatever the size of the run."""
    assert set(report) >= DEMO_KEYS
    assert report["tokens_identical"] == prompts and report["tokens_identical_int8"] <= prompts and report["bit_exact"] is True
    assert report["trusted_pid"] != report["worker_pid"]
    assert report["exchanges_per_token"] == pytest.approx(21, abs=0.5)
    assert 0 < report["bytes_up_per_token"] < report["bytes_down_per_token"]
    assert report["tokens_per_s_plain"] > 0 and report["tokens_per_s_protected"] > 0 and report["pad_seconds_per_token"] > 0
    assert 0.029 < report["secret_fraction"] <= 0.03
    original = report["perplexity_original"]
    assert 5 < original < 60
    assert report["perplexity_protected_int8x2"] == pytest.approx(original, rel=1e-4)
    assert report["perplexity_protected"] == pytest.approx(original, rel=1e-2)
    assert report["perplexity_exposed_unscrambled"] > 3 * original
    assert report["perplexity_exposed_only"] > 20 * original
    saw = report["worker_saw"]
    assert saw["vectors"] > 100 and saw["chi_square_p"] > 1e-6 and len(saw["example"]) == 8
    assert all(abs(residue) < 2**30 for residue in saw["example"])


@pytest.mark.long
def test_demo(tmp_path: Path) -> None:
    result = run_cloven("demo", "--prompts", "2", "--tokens", "8", "--json", timeout=600)
    assert result.returncode == 0, result.stderr
    check_demo(json.loads(result.stdout), 2)


def test_a_short_demo(cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with less text for the perplexities, which take most of the time, and splits that are there already."""
    from cloven.demo import slip

    monkeypatch.setattr(slip, "prepare_slip", lambda _path, _out, config: demo_bundle(config.precision))
    full = slip.run_slip_demo
    monkeypatch.setattr(slip, "run_slip_demo", lambda progress, prompts, tokens: full(progress, prompts, tokens, sequences=2, length=64))
    outcome = cloven_here("demo", "slip", "--prompts", "1", "--tokens", "6", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    check_demo(report, 1)
    assert report["trusted_pid"] == os.getpid()


def test_demo_prints_tables(cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.demo import slip

    numbers = dict.fromkeys(slip.SlipDemo.__dataclass_fields__, 1)
    saw = slip.WorkerSaw(vectors=1, bytes_tested=1, chi_square_p=0.5, example=[1] * 8)
    values: dict[str, Any] = {**numbers, "worker_saw": saw, "example_prompt": "[bold]", "example_text": "[/nonsense] text"}
    result = slip.SlipDemo(**values)
    monkeypatch.setattr(slip, "run_slip_demo", lambda *_: result)
    outcome = cloven_here("demo", "--prompts", "1")
    assert outcome.code == 0 and "[bold][/nonsense] text" in outcome.out  # a model's text is no markup
    monkeypatch.setattr(slip, "run_slip_demo", lambda *_: slip.SlipDemo(**{**values, "tokens_identical": 0}))
    assert cloven_here("demo", "--prompts", "1").code == 1


def test_demo_errors(cloven_here: Command) -> None:
    one_line(cloven_here("demo", "kv_shield"), 2, "choose slip")
    assert cloven_here("demo", "--prompts", "21").code == 2


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_bench_prints_what_was_measured(arguments: list[str], cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.bench import slip
    from cloven.bench.decoding import BatchFigures, RttFigures
    from cloven.bench.matrix_rates import RateFigures
    from cloven.bench.memory import MemoryFigures
    from cloven.bench.other_runtimes import AgainstFigures

    def threes(kind: Any, **others: Any) -> Any:
        return kind(**(dict.fromkeys(kind.__dataclass_fields__, 3) | others))

    def measured(*_: object, rtts_ms: list[float], batches: list[int], against: list[str], **__: object) -> slip.SlipBench:
        parts: dict[str, Any] = {"rates": threes(RateFigures), "memory": threes(MemoryFigures)}
        parts["simulated_rtts"] = [threes(RttFigures) for _ in rtts_ms]
        parts["batches"] = [threes(BatchFigures) for _ in batches]
        texts = {"version": "it 1", "details": "fast"}
        parts["against"] = [threes(AgainstFigures, name=name, ways={"fast": 3.0, "slow": 1.0}, **texts) for name in against]
        report: slip.SlipBench = threes(slip.SlipBench, shape="tiny", precision="int8", layers_of_shape=4 if against else 3, **parts)
        return report

    monkeypatch.setattr(slip, "bench_slip", measured)
    every = ("--simulate-rtt", "1", "--simulate-rtt", "10", "--batch", "4", "--against", "torchao", "--against", "llama.cpp")
    for options in ((), every):
        outcome = cloven_here("bench", "slip", *arguments, *options)
        assert outcome.code == 0 and outcome.err == ""
        if arguments:
            report = json.loads(outcome.out)
            assert report["decode_ratio"] == report["prefill_share_of_floor"] == report["memory"]["private_share"] == 3
            assert (len(report["simulated_rtts"]), len(report["batches"])) == ((2, 1) if options else (0, 0))
            assert all({"rtt_seconds_expected", "rtt_seconds_measured", "rtt_ratio"} <= set(link) for link in report["simulated_rtts"])
            assert [(one["name"], one["version"], one["decode_ratio"]) for one in report["against"]] == (
                [("torchao", "it 1", 3), ("llama.cpp", "it 1", 3)] if options else []
            )
        else:
            assert "SLIP, int8, tiny" in outcome.out and "private memory, pads on disk" in outcome.out
            seen = [
                text in outcome.out for text in ("over a simulated link", "of a batch", "without protection", "extrapolated to 4 layers")
            ]
            assert seen == [bool(options)] * 4


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_bench_memory_prints_what_was_measured(arguments: list[str], cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.bench import memory

    numbers = dict.fromkeys(memory.MemoryFigures.__dataclass_fields__, 7_000_000)
    result = memory.MemoryFigures(**{**numbers, "shape": "tiny", "layers": 2, "layers_of_shape": 2, "private_share": 0.1234})  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "bench_memory", lambda *_, **__: result)
    outcome = cloven_here("bench", "memory", *arguments)
    assert outcome.code == 0 and outcome.err == ""
    if arguments:
        assert json.loads(outcome.out)["private_share"] == 0.1234
    else:
        assert (
            all(text in outcome.out for text in ("tiny, 2 of 2 layers", "12.3 %", "KV cache", "14.0")) and "extrapolated" not in outcome.out
        )


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_bench_rounds_prints_what_was_measured(arguments: list[str], cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloven.bench import rounds

    asked: list[dict[str, Any]] = []

    def measured(_progress: object, model: str | None, **options: Any) -> rounds.RoundsBench:
        asked.append({"model": model, **options})
        figures = [rounds.DraftFigures("ordinary", "plain", 2, same, 21.0, 1.0, {"0": 20.0, "5": 2.5}) for same in (True, False)]
        return rounds.RoundsBench("it", "int8x2", "float32", 1, 3, "helper", True, figures)

    monkeypatch.setattr(rounds, "bench_rounds", measured)
    outcome = cloven_here("bench", "rounds", "--simulate-rtt", "5", "--prompt-lookup", "3", *arguments)
    assert outcome.code == 0 and outcome.err == ""
    assert asked[0]["model"] is None and asked[0]["rtts_ms"] == [5] and asked[0]["prompt_lookup"] == 3
    if arguments:
        assert json.loads(outcome.out)["results"][0]["tokens_per_s"] == {"0": 20.0, "5": 2.5}
    else:
        assert all(text in outcome.out for text in ("same", "OTHER", "5 ms", "2.50", "assistant helper", "upper bound"))


@pytest.mark.long
def test_bench(cloven_here: Command) -> None:
    outcome = cloven_here("bench", "slip", "--shape", "tiny", "--layers", "1", "--rounds", "1", "--tokens", "2", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert set(report) >= {"decode_ratio", "decode_ratio_pads_inline", "prefill_ratio", "pad_ratio", "trusted_memory_share"}
    assert report["shape"] == "tiny" and report["layers"] == 1 and report["rounds"] == 1 and report["exchanges_per_token"] == 5
    assert all(report[name] > 0 for name in ("decode_ratio", "decode_ratio_pads_inline", "prefill_ratio", "pad_ratio"))
    assert 0 < report["trusted_memory_share"] < 1


def test_bench_errors(cloven_here: Command) -> None:
    one_line(cloven_here("bench", "slip", "--shape", "gpt-5"), 2, "choose one of tiny")
    one_line(cloven_here("bench", "slip", "--layers", "9"), 2, "tiny has 5")
    one_line(cloven_here("bench", "slip", "--precision", "int4"), 2, "int8, int8x2")
    one_line(cloven_here("bench", "slip", "--simulate-rtt", "-1"), 2, "simulated round trip")
    one_line(cloven_here("bench", "slip", "--batch", "4", "--batch", "33"), 2, "a batch of 33: give 1 to 32")
    one_line(cloven_here("bench", "slip", "--against", "vllm"), 2, "--against vllm: choose one of llama.cpp, torchao")
    one_line(cloven_here("bench", "memory", "--shape", "gpt-5"), 2, "choose one of tiny")
    one_line(cloven_here("bench", "rounds", "--simulate-rtt", "nan"), 2, "simulated round trip")
    one_line(cloven_here("bench", "rounds", "/nowhere"), 2, "no such model directory")
    one_line(cloven_here("bench", "rounds", str(tiny_folder("llama"))), 2, "its tokenizer cannot be loaded")
    one_line(cloven_here("bench", "rounds", "--assistant", str(tiny_folder("llama"))), 2, "its vocabulary has 97 tokens")
