"""KV-Shield by its command line. Happy paths run in processes of their own; most errors in this one, through the same `run`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cloven
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.demo import kv_shield as kv_demo
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from tests.end_to_end.commands import Command, Outcome, one_line
from tests.helpers import free_port
from tests.kv_bundles import enclave as enclave_thread
from tests.kv_bundles import ids_of, kv_bundle, load
from tests.split_models import (
    demo_bundle,
    demo_model,
    demo_tokenizer,
    greedy,
    logits,
    run_cloven,
    scratch,
    tiny_bundle,
    tiny_folder,
    worker_thread,
)

PROMPT = "ROMEO:"
ONE_TOKEN = ("--prompt", PROMPT, "--max-new-tokens", "1", "--timeout", "2")

KEYS = {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict"}


def check_prepared(mode: str, out: Path, printed: str) -> None:
    assert re.match(rf"Bundle [0-9a-f]{{32}}: KV-Shield, {mode}, [25] attention layers\n", printed)
    assert str(out / "trusted") in printed and str(out / "exposed") in printed
    assert ("finds the permutations" in printed) == (mode == "permute")


@pytest.fixture(scope="module")
def bundles() -> dict[str, Path]:
    """The demo model in both modes."""
    made = {mode: scratch() / f"cli-{mode}" for mode in ("permute", "session")}
    prepare_kv_shield(cloven.demo_model_path(), made["session"], KvShieldConfig("session", seal_idle=True, noise_dims=8))
    prepare_kv_shield(cloven.demo_model_path(), made["permute"], KvShieldConfig("permute", seal_idle=True))
    return made


@pytest.fixture(scope="module")
def permute(bundles: dict[str, Path]) -> Path:
    return bundles["permute"]


def manifest(half: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((half / "manifest.json").read_text(encoding="utf-8"))
    return record


@pytest.mark.long
def test_prepare_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = run_cloven(
        *("prepare", "kv-shield", str(cloven.demo_model_path()), str(tmp_path / "out")),
        *("--mode", "session", "--seal-idle", "--noise-dims", "8"),
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr  # no bars where there is no terminal
    check_prepared("session", tmp_path / "out", result.stdout)


def test_what_prepare_wrote(tmp_path: Path, cloven_here: Command) -> None:
    for mode, options in (("permute", ()), ("session", ("--mode", "session", "--noise-dims", "8"))):
        out = tmp_path / mode
        outcome = cloven_here("prepare", "kv-shield", str(tiny_folder("llama")), str(out), "--seal-idle", *options)
        assert outcome.code == 0 and outcome.err == ""
        check_prepared(mode, out, re.sub(r"\n(?=/)", "", outcome.out))
        for half in ("exposed", "trusted"):
            record = manifest(out / half)
            assert (record["mode"], record["seal_idle"], record["noise_dims"]) == (mode, True, 8 if mode == "session" else 16)
        assert (out / "trusted").stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in (out / "trusted").iterdir())


def test_generate_over_ipc(bundles: dict[str, Path], cloven_here: Command) -> None:
    out = bundles["session"]
    with enclave_thread(out / "trusted") as (address, _):
        outcome = cloven_here(
            *("generate", str(out / "exposed"), "--enclave", address, "--prompt", PROMPT),
            *("--max-new-tokens", "12", "--dtype", "float32", "--json"),
        )
        assert outcome.code == 0 and outcome.err == "", outcome.err
        report = json.loads(outcome.out)
        assert report["tokens"] == greedy(demo_model(), PROMPT, 12)
        assert report["exchanges"] >= 2 * 5 * 12  # two calls per layer and token


def test_the_enclaves_address_from_the_environment(permute: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with enclave_thread(permute / "trusted") as (address, _):
        monkeypatch.setenv("CLOVEN_ENCLAVE", address)
        arguments = ("--prompt", PROMPT, "--max-new-tokens", "12", "--dtype", "float32")
        outcome = cloven_here("generate", str(permute / "exposed"), *arguments)  # streamed
    assert outcome.code == 0 and outcome.err == "", outcome.err
    assert outcome.out.strip() == demo_tokenizer().decode(greedy(demo_model(), PROMPT, 12), skip_special_tokens=True).strip()


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_whole_way_over_tcp(apart: bool, bundles: dict[str, Path], folder: Path, cloven_here: Command) -> None:
    """The enclave in a process of its own, and the model as well in the long form."""
    keys, address, out = folder / "keys", f"tcp://127.0.0.1:{free_port()}", bundles["session"]
    assert cloven_here("keygen", str(keys)).code == 0
    command = [sys.executable, "-m", "cloven", "enclave", str(out / "trusted"), "--listen", address, "--keys"]
    enclave = subprocess.Popen([*command, str(keys / "worker")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        arguments = (
            *("generate", str(out / "exposed"), "--enclave", address, "--keys", str(keys / "trusted"), "--prompt", PROMPT),
            *("--max-new-tokens", "8", "--dtype", "float32", "--json"),
        )
        if apart:
            done = run_cloven(*arguments)
            outcome = Outcome(done.returncode, done.stdout, done.stderr)
        else:
            outcome = cloven_here(*arguments)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["tokens"] == greedy(demo_model(), PROMPT, 8)
        assert "INSECURE" not in outcome.err
    finally:
        enclave.send_signal(signal.SIGTERM)
        listening, errors = enclave.communicate(timeout=20)
    assert enclave.returncode == 0 and errors == ""
    bundle = manifest(out / "trusted")["bundle"]
    assert listening == f"bundle {bundle}: keys of 5 layers (session), listening at {address}\n"


@pytest.mark.long
def test_plain_tcp_only_with_a_banner_on_both_sides(permute: Path, cloven_here: Command) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    one_line(cloven_here("enclave", str(permute / "trusted"), "--listen", address), 2, "tcp needs keys.*cloven keygen")
    one_line(cloven_here("generate", str(permute / "exposed"), "--enclave", address, *ONE_TOKEN), 2, "tcp needs keys")
    with EnclaveProcess(permute / "trusted", address, "--insecure-plain-tcp") as enclave:
        outcome = cloven_here("generate", str(permute / "exposed"), "--enclave", address, *ONE_TOKEN, "--insecure-plain-tcp")
        assert outcome.code == 0 and "INSECURE: plain tcp" in outcome.err
        assert "INSECURE: this enclave listens on plain tcp" in enclave.log()


# --- the audit and the demo


def test_audit(bundles: dict[str, Path], cloven_here: Command) -> None:
    outcome = cloven_here("audit", str(bundles["session"]), "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    attacks, page = answer["attacks"], Path(answer["report"])
    assert page == bundles["session"] / "audit.html" and "Cache thief" in page.read_text() and page.stat().st_mode & 0o777 == 0o600
    assert set(attacks[0]) == {*KEYS, "interval", "details"}
    value = {(attack["name"], attack["scheme"]): attack for attack in attacks}
    assert value["sorting", "kv-shield/permute"]["verdict"] == "broken" and value["sorting", "kv-shield/session"]["verdict"] == "holds"
    assert "(d + ρ = 40)" in value["known_plaintext", "kv-shield/session"]["metric"]  # the bundle's ρ, not the default one


def test_an_audit_without_figures_needs_no_matplotlib(permute: Path, tmp_path: Path, cloven_here: Command) -> None:
    page = tmp_path / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert cloven_here("audit", str(permute), "--report", str(page)).code == 0 and "Cache thief" in page.read_text()
        one_line(cloven_here("audit", str(tiny_bundle("llama").path), "--report", str(page)), 2, "need Matplotlib")


def test_audit_of_a_text_of_ones_own(permute: Path, tmp_path: Path, cloven_here: Command) -> None:
    text = tmp_path / "text"
    text.write_text("The king is dead. " * 60, encoding="utf-8")
    outcome = cloven_here("audit", str(permute), "--text", str(text), "--no-report")
    assert outcome.code == 0, outcome.err
    assert "What a thief of the cache recovers" in outcome.out and "sorting" in outcome.out and "session" in outcome.out
    text.write_text("The king is dead.", encoding="utf-8")
    one_line(cloven_here("audit", str(permute), "--text", str(text)), 2, r"the text has \d+ tokens: give at least 112")
    text.write_bytes(b"\xff\xfe\xff")
    one_line(cloven_here("audit", str(permute), "--text", str(text)), 2, "cannot be read as text")
    one_line(cloven_here("audit", str(permute), "--text", str(tmp_path / "none")), 2, "cannot be read as text")


def test_audit_errors(permute: Path, tmp_path: Path, cloven_here: Command) -> None:
    one_line(cloven_here("audit", str(permute), "--report", "x.html", "--no-report"), 2, "give one of them")
    one_line(cloven_here("audit", str(permute), "--relative", str(tiny_folder("llama"))), 2, "for the audit of a SLIP bundle")
    one_line(cloven_here("audit", str(permute), "--report", str(tmp_path / "no" / "audit.html")), 2, "no such folder")
    for folder in (tmp_path, tmp_path / "nowhere", permute / "exposed"):
        one_line(cloven_here("audit", str(folder)), 2, "bundle")
    out = tmp_path / "mixed"
    shutil.copytree(permute, out)
    shutil.rmtree(out / "trusted")
    shutil.copytree(kv_bundle("llama", "permute") / "trusted", out / "trusted")
    one_line(cloven_here("audit", str(out)), 3, "halves are of two")
    shutil.copytree(permute, tmp_path / "altered")
    with (tmp_path / "altered" / "trusted" / "keys.safetensors").open("ab") as file:
        file.write(b"x")
    one_line(cloven_here("audit", str(tmp_path / "altered")), 3, "keys.safetensors")


@pytest.mark.long
def test_demo() -> None:
    result = run_cloven("demo", "kv-shield", "--json", "--prompts", "1", "--tokens", "4")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) >= {"text_identical", "recovered", "equal_pairs_found", "recovered_known_plaintext", "attacks"}
    assert report["text_identical"] == {"permute": 1, "session": 1, "sealed": 1}
    assert report["recovered"]["permute"]["sorting"] >= 0.95 and report["recovered"]["session"]["sorting"] < 0.1


@pytest.mark.parametrize(("identical", "code"), [(1, 0), (0, 1)])
def test_demo_prints_tables_and_fails_where_texts_differ(
    identical: int, code: int, cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = dict.fromkeys(("permute", "session", "sealed"), 3.0)
    result = kv_demo.KvDemo(1, 4, {"permute": 1, "session": identical, "sealed": 1}, 5.0, figures, {}, {}, {}, [], "ROMEO:", " [bold]")
    monkeypatch.setattr(kv_demo, "run_kv_demo", lambda *_: result)
    outcome = cloven_here("demo", "kv-shield")
    assert outcome.code == code and f"{identical} of 1" in outcome.out and "ROMEO: [bold]" in outcome.out
    assert cloven_here("demo", "kv-shield", "--json").code == code


# --- bad input


def test_prepare_errors(tmp_path: Path, cloven_here: Command) -> None:
    model, out = str(cloven.demo_model_path()), tmp_path / "out"

    def refused(match: str, *arguments: str, of: str = model) -> None:
        one_line(cloven_here("prepare", "kv-shield", of, str(out), *arguments), 2, match)
        assert not out.exists()

    refused("mode 'sealed': choose one of permute, session", "--mode", "sealed")
    refused("noise dimensions 7: give an even number from 2 to 256", "--mode", "session", "--noise-dims", "7")
    refused("noise dimensions 0", "--noise-dims", "0")
    refused("noise dimensions 258", "--noise-dims", "258")
    refused("gpt_neox: KV-Shield supports llama, qwen2", of=str(tiny_folder("gpt-neox")))
    refused("already quantised or split", of=str(kv_bundle("llama", "permute") / "exposed"))
    refused("nowhere", of=str(tmp_path / "nowhere"))
    out.mkdir()
    (out / "mine").touch()
    one_line(cloven_here("prepare", "kv-shield", model, str(out)), 2, "not empty|exists")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_no_enclave(permute: Path, folder: Path, cloven_here: Command) -> None:
    started = time.monotonic()
    one_line(cloven_here("generate", str(permute / "exposed"), "--enclave", f"ipc://{folder}/none", *ONE_TOKEN), 1, "none")
    assert time.monotonic() - started < 10
    one_line(cloven_here("generate", str(permute / "exposed"), *ONE_TOKEN), 2, r"give --enclave ADDRESS \(or CLOVEN_ENCLAVE\)")
    one_line(cloven_here("generate", str(permute / "exposed"), "--worker", f"ipc://{folder}/w", *ONE_TOKEN), 2, "give --enclave")


def test_an_enclave_of_another_bundle(bundles: dict[str, Path], cloven_here: Command) -> None:
    with enclave_thread(bundles["session"] / "trusted") as (address, _):
        outcome = cloven_here("generate", str(bundles["permute"] / "exposed"), "--enclave", address, *ONE_TOKEN)
    one_line(outcome, 3, "bundle")
    assert PROMPT not in outcome.err


def test_a_worker_where_an_enclave_should_be(permute: Path, cloven_here: Command) -> None:
    with worker_thread(tiny_bundle("llama")) as address:
        outcome = cloven_here("generate", str(permute / "exposed"), "--enclave", address, *ONE_TOKEN)
    assert outcome.code in (1, 3) and outcome.out == "" and "Traceback" not in outcome.err


def test_the_wrong_half(permute: Path, folder: Path, cloven_here: Command) -> None:
    address = f"ipc://{folder}/e"
    one_line(cloven_here("generate", str(permute / "trusted"), "--enclave", address, *ONE_TOKEN), 2, "the enclave's half")
    one_line(cloven_here("enclave", str(permute / "exposed"), "--listen", address), 2, "exposed")
    one_line(cloven_here("worker", str(permute / "exposed"), "--listen", address), 2, "manifest|bundle|half")
    one_line(cloven_here("enclave", str(demo_bundle().trusted), "--listen", address), 2, "manifest|bundle|half")
    one_line(cloven_here("enclave", str(permute), "--listen", address), 2, "bundle|half")
    one_line(cloven_here("enclave", str(permute / "trusted"), "--listen", "nowhere"), 2, "ipc://")
    assert list(folder.iterdir()) == []


def test_tampered_halves(permute: Path, folder: Path, tmp_path: Path, cloven_here: Command) -> None:
    out = tmp_path / "out"
    shutil.copytree(permute, out)
    for name in ("exposed/config.json", "exposed/tokenizer.json", "trusted/keys.safetensors"):
        with (out / name).open("ab") as file:
            file.write(b" ")
    one_line(cloven_here("enclave", str(out / "trusted"), "--listen", f"ipc://{folder}/e"), 3, "keys.safetensors")
    one_line(cloven_here("generate", str(out / "exposed"), "--enclave", f"ipc://{folder}/e", *ONE_TOKEN), 3, "config.json|tokenizer.json")


def test_an_address_in_use(permute: Path, cloven_here: Command) -> None:
    with enclave_thread(permute / "trusted") as (address, _):
        outcome = cloven_here("enclave", str(permute / "trusted"), "--listen", address)
    assert outcome.code == 1 and outcome.out == "" and re.search(r"cloven: cannot listen at .* already\n$", outcome.err), outcome.err


# --- what the enclave's process is made of


def test_what_a_real_enclave_imports(socket_folder: Path) -> None:
    """Light: no transformers, no model code, nothing of the other scheme or of the attacks. (It does hold what draws keys.)"""
    forbidden = ("transformers", "tokenizers", "cloven.model", "cloven.slip", "cloven.masks", "cloven.audit", "cloven.demo", "cloven.zoo")
    out, address = kv_bundle("llama", "session"), f"ipc://{socket_folder}/e"
    log = socket_folder / "log"  # a file: thousands of lines would fill a pipe
    with log.open("w") as errors:
        command = [sys.executable, "-X", "importtime", "-m", "cloven", "enclave", str(out / "trusted"), "--listen", address]
        enclave = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            model = load(out)
            with cloven.attach(model, address, timeout=20):  # what is imported on the first request counts too
                logits(model, ids_of(1, 3))
        finally:
            enclave.send_signal(signal.SIGINT)
            assert enclave.wait(20) == 0
    imported = set(re.findall(r"^import time:.*\|\s*([\w.]+)\s*$", log.read_text(), re.MULTILINE))
    assert {"torch", "zmq", "cloven.kv_shield.service", "cloven.kv_shield.enclave"} <= imported
    assert [name for name in imported if any(name == one or name.startswith(one + ".") for one in forbidden)] == []
