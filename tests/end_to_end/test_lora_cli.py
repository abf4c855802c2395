"""Private LoRA by its command line. Servers, and the happy path, run in processes of their own; most errors in this one."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cloven
from cloven.bench import private_lora as lora_bench
from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.demo import private_lora as lora_demo
from cloven.demo.merged import merged_model
from cloven.errors import BudgetExhausted, RunError
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ServerManifest
from cloven.private_lora.prepare import prepare_private_lora
from cloven.private_lora.session import LoraSession
from cloven.zoo.demo import demo_adapter_path
from tests.end_to_end.commands import Command, Outcome, one_line
from tests.helpers import free_port
from tests.lora_bundles import adapter_server, copied
from tests.split_models import demo_model, demo_tokenizer, greedy, run_cloven, scratch, tiny_folder

PROMPT = "The church was built in"
BASE = str(cloven.demo_model_path())
TOKENS = 5
BUDGET = 3000

KEYS = {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict"}


def prepared(name: str = "demo", budget: int = BUDGET) -> Path:
    """OUT of the demo adapter (or, with another name, of one that is half as strong); not to be served: see `own`."""
    out = scratch() / f"lora-cli-{name}-{budget}"
    if out.exists():
        return out
    adapter = demo_adapter_path() if name == "demo" else half_adapter()
    with patch.dict(os.environ, {"CLOVEN_STATE": str(scratch() / f"state-{out.name}")}):  # where `copied` looks for the witness
        prepare_private_lora(BASE, adapter, out, PrivateLoraConfig(budget))
    return out


@functools.cache
def half_adapter() -> Path:
    folder = scratch() / "half-adapter"
    shutil.copytree(demo_adapter_path(), folder)
    weights = {name: tensor * (0.5 if "lora_B" in name else 1) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@functools.cache
def expected(name: str = "demo", tokens: int = TOKENS) -> list[int]:
    """What PEFT's merged model writes."""
    model = merged_model(cloven.demo_model_path(), demo_adapter_path() if name == "demo" else half_adapter())
    return greedy(model, PROMPT, tokens, pad_token_id=0)


def own(tmp_path: Path, name: str = "demo", budget: int = BUDGET) -> Path:
    """A bundle with its witness in this test's state folder."""
    return copied(prepared(name, budget), tmp_path / f"out-{name}")


def generate(out: Path, address: str, *more: str, tokens: int = TOKENS, prompt: str = PROMPT) -> tuple[str, ...]:
    """Arguments of `cloven generate`."""
    return (
        *("generate", str(out / "client"), "--server", address, "--base", BASE, "--prompt", prompt),
        *("--max-new-tokens", str(tokens), "--dtype", "float32", "--timeout", "20", *more),
    )


def book(out: Path) -> Ledger:
    server = ServerManifest.read(out / "server")
    return Ledger(server.ledger_path(out / "server"), server.adapter)


def used(out: Path) -> dict[str, int]:
    """Rows charged per group, by all clients."""
    rows: dict[str, int] = {}
    with closing(book(out)) as ledger:
        for account in ledger.accounts():
            rows[account.matrix] = rows.get(account.matrix, 0) + account.rows
    return rows


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """`cloven generate` leaves base and pin in the environment of its process, which here is the tests'."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def address(folder: Path) -> str:
    return f"ipc://{folder}/s"


# --- the whole way, in processes of their own


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_whole_way(apart: bool, tmp_path: Path, address: str, cloven_here: Command) -> None:
    """The short form: only the server in a process of its own."""

    def command(*arguments: str) -> Outcome:
        if not apart:
            return cloven_here(*arguments)
        done = run_cloven(*arguments)
        return Outcome(done.returncode, done.stdout, done.stderr)

    out = tmp_path / "out"
    result = command(
        *("prepare", "private-lora", str(out), "--base", BASE, "--adapter", str(demo_adapter_path())),
        *("--budget-tokens", "100", "--client-tokens", "90"),
    )
    assert result.code == 0 and result.err == "", result.err
    first, server, client, share, *_ = re.sub(r"\n(?=/)", "", result.out).splitlines() if not apart else result.out.splitlines()
    assert re.fullmatch(r"Bundle [0-9a-f]{32}: 35 adapted linears, 20 queries per token", first)
    assert str(out / "server") in server and "secret" in server and str(out / "client") in client
    assert share.startswith("100 tokens of 16 bits give away up to 100.0% of the adapter's narrowest matrix") and "metered" in share
    pin = client.rpartition(" ")[2]
    assert re.fullmatch(r"[0-9a-f]{64}", pin)
    serve = [sys.executable, "-m", "cloven", "adapter-server", str(out / "server"), "--listen", address]
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        result = command(*generate(out, address, "--json", "--pin", pin))
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report["tokens"] == expected() and report["exchanges"] == 20 * TOKENS
        assert report["bytes_up"] > 20 * report["bytes_down"] and "INSECURE" not in result.err
    finally:
        process.send_signal(signal.SIGTERM)
        listening, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and errors == ""
    assert listening == f"bundle {first.split()[1][:-1]}: 20 groups, listening at {address}\n"
    rows = report["prompt_tokens"] + TOKENS - 1
    result = command("ledger", str(out / "server"), "--json")
    assert result.code == 0 and result.err == "", result.err
    record = json.loads(result.out)
    assert (record["budget"], record["client_budget"]) == (100, 90) and len(record["groups"]) == 20
    for group in record["groups"]:
        assert group["used"] == rows and group["left"] == 100 - rows and group["clients"] == {"local": rows}
        width = 672 if "down_proj" in group["group"] else 256
        assert 16 * rows / (8 * width) < group["revealed"] < 16 * rows / (5 * width)  # weights of 5 to 8 bits


# --- one server, looked at from all sides


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A server in a process of its own, over ipc; its bundle and its address."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("CLOVEN_STATE", str(scratch() / "state-shared"))
        out = copied(prepared(), scratch() / "shared")
        with AdapterServerProcess(out / "server") as server:
            yield out, server.address
            assert server.log() == ""


def test_generate_streams_and_reads_the_environment(
    shared: tuple[Path, str], cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, address = shared
    monkeypatch.setenv("CLOVEN_SERVER", address)
    monkeypatch.setenv("CLOVEN_BASE", BASE)
    monkeypatch.delenv("CLOVEN_PIN", raising=False)
    outcome = cloven_here(*("generate", str(out / "client"), "--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--dtype", "float32"))
    assert outcome.code == 0 and outcome.err == "", outcome.err
    assert outcome.out.strip() == demo_tokenizer().decode(expected(), skip_special_tokens=True).strip()
    assert expected() != greedy(demo_model(), PROMPT, TOKENS, pad_token_id=0)


def test_inspect(shared: tuple[Path, str], cloven_here: Command, tmp_path: Path) -> None:
    out, _ = shared
    outcome = cloven_here("inspect", str(out), "--verify", "--json")
    record = json.loads(outcome.out)
    assert outcome.code == 0 and record["verified"] is True and record["scheme"] == "private-lora"
    assert record["modules"] == 35 and len(record["groups"]) == 20 and record["parameters"] == {"bits": 16, "hint": "lwe"}
    assert record["groups"][0] == [2 * 3 * 8, 256] and record["client_bytes"] > 10**6
    plain = cloven_here("inspect", str(out))
    assert plain.code == 0 and record["bundle"] in plain.out and "not hashed" in plain.out
    shutil.copytree(out / "client", tmp_path / "clients" / "client")  # as a client has it
    assert json.loads(cloven_here("inspect", str(tmp_path / "clients"), "--json").out)["fingerprint"] == record["fingerprint"]


def test_inspect_prints_the_fingerprint_to_pin_in_full(shared: tuple[Path, str], cloven_here: Command) -> None:
    """A table would cut it off at 80 columns, and with it the base's hash."""
    out, _ = shared
    pin = json.loads(cloven_here("inspect", str(out), "--json").out)["fingerprint"]
    assert pin in cloven_here("inspect", str(out)).out


def test_inspect_verifies(tmp_path: Path, cloven_here: Command) -> None:
    out = own(tmp_path)
    with (out / "server" / "adapter.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert cloven_here("inspect", str(out)).code == 0
    one_line(cloven_here("inspect", str(out), "--verify"), 3, r"adapter\.safetensors")
    with (out / "client" / "config.json").open("a") as file:
        file.write(" ")
    shutil.rmtree(out / "server")
    one_line(cloven_here("inspect", str(out), "--verify"), 3, r"config\.json")


def test_audit(shared: tuple[Path, str], cloven_here: Command) -> None:
    """Beside a running server, whose ledger it does not change."""
    out, _ = shared
    with patch.dict(os.environ, {"CLOVEN_STATE": str(scratch() / "state-shared")}):
        before = used(out)
        outcome = cloven_here("audit", str(out), "--json")
        assert outcome.code == 0, outcome.err
        attacks = {attack["name"]: attack for attack in json.loads(outcome.out)["attacks"]}
        table = cloven_here("audit", str(out))
        assert used(out) == before
    assert "Extraction against queries" in (out / "audit.html").read_text(encoding="utf-8")
    assert set(attacks["packing"]) == {*KEYS, "interval", "details"}
    assert attacks["packing"]["verdict"] == "broken" and "budget of 3,000 answers" in attacks["packing"]["metric"]
    assert attacks["hint_inversion"]["verdict"] == attacks["averaging"]["verdict"] == "holds"
    assert table.code == 0 and "What the parties recover" in table.out and "hint inversion" in table.out


def test_an_audit_without_matplotlib(tmp_path: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report then has no figure; JSON has its numbers."""
    out = own(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cloven_here("audit", str(out), "--json")
    assert outcome.code == 0 and "the report has no figures" in outcome.err
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert "hint inversion" in page and "<svg" not in page
    assert [figure["name"] for figure in json.loads(outcome.out)["figures"]] == ["extraction"]
    quiet = cloven_here("audit", str(out), "--no-report")
    assert quiet.code == 0 and "figures" not in quiet.err


def test_a_text_for_the_audit_is_refused(tmp_path: Path, cloven_here: Command) -> None:
    """Before a tokenizer is looked for in a half that there is not."""
    out, text = own(tmp_path), tmp_path / "text"
    text.write_text("The church was built.", encoding="utf-8")
    one_line(cloven_here("audit", str(out), "--text", str(text)), 2, "audited without --text")


def test_a_wrong_base(shared: tuple[Path, str], cloven_here: Command) -> None:
    out, address = shared
    arguments = list(generate(out, address))
    arguments[arguments.index("--base") + 1] = str(tiny_folder("llama"))
    one_line(cloven_here(*arguments), 3, "not the weights of the base that the adapter was made for")
    arguments[arguments.index("--base") + 1] = "/nowhere"
    assert cloven_here(*arguments).code == 2


def test_a_wrong_pin(shared: tuple[Path, str], cloven_here: Command) -> None:
    out, address = shared
    one_line(cloven_here(*generate(out, address, "--pin", "0" * 64)), 3, "fingerprint is .* pinned is 0000")
    one_line(cloven_here(*generate(out, address, "--pin", "abc")), 2, "pin is no fingerprint")


def test_the_wrong_half(shared: tuple[Path, str], cloven_here: Command, folder: Path) -> None:
    out, address = shared
    arguments = list(generate(out, address))
    arguments[1] = str(out / "server")
    one_line(cloven_here(*arguments), 2, "the adapter server's half; generate with OUT/client.*cloven adapter-server")
    one_line(cloven_here("adapter-server", str(out / "client"), "--listen", f"ipc://{folder}/x", "--threads", "0"), 2, "manifest|half")
    one_line(cloven_here("worker", str(out / "server"), "--listen", f"ipc://{folder}/x"), 2, "manifest|bundle|half")
    assert list(folder.iterdir()) == []


def test_a_bundle_that_the_server_does_not_hold(shared: tuple[Path, str], cloven_here: Command) -> None:
    one_line(cloven_here(*generate(prepared("half"), shared[1])), 3, "does not serve that bundle")


def test_fhe_is_off_unless_both_sides_ask_for_it(shared: tuple[Path, str], cloven_here: Command) -> None:
    out, address = shared
    one_line(cloven_here(*generate(out, address, "--backend", "fhe")), 2, "needs insecure_fhe_semi_honest on both sides")
    outcome = cloven_here(*generate(out, address, "--backend", "fhe", "--insecure-fhe-semi-honest", "--json"))
    assert outcome.code == 1 and outcome.out == "" and "INSECURE: the fhe backend" in outcome.err
    assert "the fhe backend is off: it needs --insecure-fhe-semi-honest at the server" in outcome.err.splitlines()[-1]


def test_no_server(cloven_here: Command, folder: Path) -> None:
    one_line(cloven_here(*generate(prepared(), f"ipc://{folder}/none", "--timeout", "2")), 1, "none")
    arguments = [word for word in generate(prepared(), "x") if word not in ("--server", "x")]
    one_line(cloven_here(*arguments), 2, r"give --server ADDRESS \(or CLOVEN_SERVER\)")


# --- tcp


def test_two_clients_over_tcp_are_told_apart(tmp_path: Path, folder: Path, cloven_here: Command) -> None:
    out, address = own(tmp_path), f"tcp://127.0.0.1:{free_port()}"
    keys, second, stranger = folder / "keys", folder / "second", folder / "stranger"
    assert cloven_here("keygen", str(keys)).code == 0
    made = cloven_here("keygen", str(second), "--client-of", str(keys / "worker"))
    assert made.code == 0 and made.err == "" and f"--keys {second}/trusted" in made.out
    (admitted,) = re.findall(r"^(\S+\.json) ", re.sub(r"\n(?! |/)", "", made.out), re.MULTILINE)
    assert cloven_here("keygen", str(stranger)).code == 0
    shutil.copyfile(keys / "trusted" / "worker.json", stranger / "trusted" / "worker.json")  # it knows the server, not the reverse
    with AdapterServerProcess(out / "server", address, "--keys", str(keys / "worker")) as server:
        for client, tokens in ((keys, TOKENS), (second, 2)):
            outcome = cloven_here(*generate(out, address, "--keys", str(client / "trusted"), "--json", tokens=tokens))
            assert outcome.code == 0 and "INSECURE" not in outcome.err, outcome.err
            assert json.loads(outcome.out)["tokens"] == expected()[:tokens]
        one_line(cloven_here(*generate(out, address)), 2, "tcp needs keys.*cloven keygen")
        one_line(cloven_here(*generate(out, address, "--keys", str(stranger / "trusted"))), 3, "refuses this key")
        Path(admitted).unlink()
        one_line(cloven_here(*generate(out, address, "--keys", str(second / "trusted"))), 3, "refuses this key")
        assert server.log().count("Traceback") == 0
    record = json.loads(cloven_here("ledger", str(out / "server"), "--json").out)
    prompt = len(demo_tokenizer()(PROMPT)["input_ids"])
    for group in record["groups"]:
        assert sorted(group["clients"].values()) == [prompt + 1, prompt + TOKENS - 1] and group["used"] == sum(group["clients"].values())
        assert all(re.fullmatch(r"[0-9a-f]{64}", client) for client in group["clients"]) and Path(admitted).stem in group["clients"]
    table = cloven_here("ledger", str(out / "server"))
    assert table.code == 0 and "3,000 rows for all clients" in table.out and table.out.count(f" {2 * prompt + TOKENS} ") == 20


def test_plain_tcp_needs_an_option(cloven_here: Command) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    refused = cloven_here("adapter-server", str(prepared() / "server"), "--listen", address, "--threads", "0")
    one_line(refused, 2, "tcp needs keys.*cloven keygen")


def test_keygen_for_a_client_refuses_to_overwrite_and_needs_the_servers_keys(folder: Path, cloven_here: Command) -> None:
    assert cloven_here("keygen", str(folder / "keys")).code == 0
    one_line(cloven_here("keygen", str(folder / "keys"), "--client-of", str(folder / "keys")), 2, "holds keys already")
    one_line(cloven_here("keygen", str(folder / "new"), "--client-of", str(folder / "none")), 2, "no such key file")
    assert not (folder / "new").exists()


# --- the budget


def without_warnings(outcome: Outcome) -> Outcome:
    """Those are the server's, which runs in this process."""
    said = [line for line in outcome.err.strip().splitlines() if "WARNING" not in line]
    return Outcome(outcome.code, outcome.out, "\n".join(said))


def test_a_budget_that_ends_in_mid_generation(tmp_path: Path, address: str, cloven_here: Command) -> None:
    prompt = len(demo_tokenizer()(PROMPT)["input_ids"])
    out = own(tmp_path, budget=prompt + 3)
    with adapter_server(out / "server", address):
        outcome = without_warnings(cloven_here(*generate(out, address, "--json", tokens=20)))
        one_line(outcome, 1, "answered 'budget': the budget of answers is used up, or too small for 1 rows")
        assert PROMPT not in outcome.err
        again = without_warnings(cloven_here(*generate(out, address, "--json")))  # the server goes on
        one_line(again, 1, f"the budget of answers is used up, or too small for {prompt} rows")
    assert max(used(out).values()) == prompt + 3
    record = json.loads(cloven_here("ledger", str(out / "server"), "--json").out)
    assert record["groups"][0]["left"] == 0


def test_the_server_says_that_its_budget_is_used_up(tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """The operator is told, too."""
    out = own(tmp_path, budget=1)
    with adapter_server(out / "server", address):
        model, session = started(out, address)
        with session, pytest.raises(BudgetExhausted):
            model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len([record for record in caplog.records if "used up" in record.getMessage()]) == 1


def test_what_streamed_before_the_budget_ended_stays_on_standard_output(tmp_path: Path, address: str, cloven_here: Command) -> None:
    prompt = len(demo_tokenizer()(PROMPT)["input_ids"])
    out = own(tmp_path, budget=prompt + 12)
    with adapter_server(out / "server", address):
        outcome = cloven_here(*generate(out, address, tokens=20))
    said = without_warnings(outcome).err.splitlines()
    assert outcome.code == 1 and len(said) == 1 and "used up" in said[0]
    written = demo_tokenizer().decode(expected(tokens=20), skip_special_tokens=True)
    assert outcome.out.strip() and written.strip().startswith(outcome.out.strip())


# --- the ledger under kill -9, damage and restoration


def started(out: Path, address: str, timeout: float = 3.0) -> tuple[Any, LoraSession]:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    session = cloven.adapt(model, out / "client", address, look_ahead=0, timeout=timeout)
    assert isinstance(session, LoraSession)
    return model, session


@pytest.mark.long  # in the short form tests/private_lora/test_server.py kills one
@torch.no_grad()
def test_a_server_that_is_killed_forgets_no_answer(tmp_path: Path, address: str) -> None:
    out = own(tmp_path, budget=265)
    ids = torch.tensor([[5, 6, 7]])
    with AdapterServerProcess(out / "server", address) as server:
        model, session = started(out, address)
        with session:
            for _ in range(3):
                model(input_ids=ids)
            server.kill()
            with pytest.raises(RunError):
                model(input_ids=ids)
    charged = used(out)
    assert len(charged) == 35 and set(charged.values()) == {256}  # a block of which 9 rows were answered: never too few
    assert Path(address.removeprefix("ipc://")).exists()  # left by the killed one, and used again
    with AdapterServerProcess(out / "server", address):
        model, session = started(out, address, timeout=30.0)  # the server takes a while to start, and the socket is there already
        with session:
            for _ in range(3):
                model(input_ids=ids)
            with pytest.raises(BudgetExhausted):
                model(input_ids=ids)
    assert set(used(out).values()) == {265}


def refused_start(out: Path, address: str, cloven_here: Command, match: str) -> None:
    socket = Path(address.removeprefix("ipc://"))
    socket.unlink(missing_ok=True)
    one_line(cloven_here("adapter-server", str(out / "server"), "--listen", address, "--threads", "0"), 1, match)
    assert not socket.exists()


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_missing_ledger(apart: bool, tmp_path: Path, address: str, cloven_here: Command) -> None:
    """Here, or in a process of its own."""
    out, says = own(tmp_path), "the ledger is missing: restore it; it is made only by `cloven prepare private-lora`"
    (out / "server" / "ledger.sqlite").unlink()
    if apart:
        one_line(run_cloven("adapter-server", str(out / "server"), "--listen", address), 1, says)
    else:
        refused_start(out, address, cloven_here, says)


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "zeros in the middle"])
def test_a_corrupt_ledger(damage: str, tmp_path: Path, address: str, cloven_here: Command) -> None:
    out = own(tmp_path)
    path = out / "server" / "ledger.sqlite"
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "garbage": os.urandom(4096),
            "cut": data[:middle],
            "empty": b"",
            "zeros in the middle": data[: middle - 50] + bytes(4096) + data[middle + 4046 :],
        }[damage]
    )
    refused_start(out, address, cloven_here, "ledger")
    one_line(cloven_here("ledger", str(out / "server")), 1, "ledger")


def test_a_restored_backup_is_refused(tmp_path: Path, address: str, cloven_here: Command) -> None:
    out = own(tmp_path)
    path = out / "server" / "ledger.sqlite"
    backup = path.read_bytes()
    with adapter_server(out / "server", address):
        assert cloven_here(*generate(out, address, "--json", tokens=1)).code == 0
    latest = path.read_bytes()
    path.write_bytes(backup)
    refused_start(out, address, cloven_here, "older than its last known state")
    one_line(cloven_here("ledger", str(out / "server")), 1, "restored from a backup")
    path.write_bytes(latest)
    assert cloven_here("ledger", str(out / "server")).code == 0


def test_a_lost_witness_and_another_adapters_ledger(
    tmp_path: Path, address: str, cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = own(tmp_path), own(tmp_path, "half")
    mine, path = (other / "server" / "ledger.sqlite").read_bytes(), out / "server" / "ledger.sqlite"
    kept = path.read_bytes()
    path.write_bytes(mine)
    refused_start(out, address, cloven_here, "the ledger of another adapter")
    path.write_bytes(kept)
    monkeypatch.setenv("CLOVEN_STATE", str(tmp_path / "new"))
    refused_start(out, address, cloven_here, "witness .* is missing")


def test_prepare_does_not_reset_a_ledger(tmp_path: Path, cloven_here: Command) -> None:
    out, again = own(tmp_path), tmp_path / "again"
    arguments = ("prepare", "private-lora", str(again), "--base", BASE, "--adapter", str(demo_adapter_path()), "--budget-tokens", "50")
    one_line(cloven_here(*arguments), 2, f"this adapter has a ledger already: give --ledger {re.escape(str(out))}")
    assert not again.exists()
    with closing(book(out)) as ledger:
        ledger.charge("model.layers.0.mlp.down_proj", "somebody", 7)
    assert cloven_here(*arguments, "--ledger", str(out / "server" / "ledger.sqlite")).code == 0
    record = json.loads(cloven_here("ledger", str(again / "server"), "--json").out)
    assert record["budget"] == 50 and {"somebody": 7} in [group["clients"] for group in record["groups"]]


def test_prepare_errors(tmp_path: Path, cloven_here: Command) -> None:
    out = tmp_path / "out"

    def refused(match: str, *more: str, base: str = BASE, adapter: Path = demo_adapter_path()) -> None:  # noqa: B008
        arguments = ("prepare", "private-lora", str(out), "--base", base, "--adapter", str(adapter))
        one_line(cloven_here(*arguments, *(more or ("--budget-tokens", "10"))), 2, match)
        assert not out.exists()

    refused("budget-tokens 0: give at least 1", "--budget-tokens", "0")
    refused("client-tokens 11: more than the budget", "--budget-tokens", "10", "--client-tokens", "11")
    refused("bits 17: choose 8 to 16", "--budget-tokens", "10", "--bits", "17")
    refused("hint 'none': choose lwe or statistical", "--budget-tokens", "10", "--hint", "none")
    refused("not a PEFT adapter directory", adapter=tmp_path)
    refused("the adapter is for another base", base=str(tiny_folder("llama")))
    refused("not a readable Ed25519 private key", "--budget-tokens", "10", "--signing-key", str(tmp_path / "none"))


def test_prepare_needs_a_budget(tmp_path: Path, cloven_here: Command) -> None:
    outcome = cloven_here("prepare", "private-lora", str(tmp_path / "out"), "--base", BASE, "--adapter", str(demo_adapter_path()))
    assert outcome.code == 2 and "--budget-tokens" in outcome.err and not (tmp_path / "out").exists()


# --- more than one adapter


def test_two_adapters_at_one_server(tmp_path: Path, address: str, cloven_here: Command) -> None:
    demo, half = own(tmp_path), own(tmp_path, "half")
    with AdapterServerProcess(demo / "server", address, str(half / "server")) as server:
        for out, name in ((demo, "demo"), (half, "half")):
            outcome = cloven_here(*generate(out, address, "--json"))
            assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == expected(name), outcome.err
        assert server.log() == ""
    assert expected("demo") != expected("half")
    rows = len(demo_tokenizer()(PROMPT)["input_ids"]) + TOKENS - 1
    assert set(used(demo).values()) == set(used(half).values()) == {rows}
    refused = cloven_here("adapter-server", str(half / "server"), str(half / "server"), "--listen", address, "--threads", "0")
    one_line(refused, 2, "given twice")


@pytest.mark.long
def test_fhe_where_both_sides_ask_for_it(tmp_path: Path, address: str, cloven_here: Command) -> None:
    pytest.importorskip("seal")
    out = own(tmp_path)
    with AdapterServerProcess(out / "server", address, "--insecure-fhe-semi-honest") as server:
        outcome = cloven_here(*generate(out, address, "--backend", "fhe", "--insecure-fhe-semi-honest", "--json", tokens=1, prompt="The"))
        assert outcome.code == 0, outcome.err
        rows = json.loads(outcome.out)["prompt_tokens"]
        assert outcome.err.count("INSECURE: the fhe backend") == server.log().count("INSECURE: the fhe backend") == 1
    assert set(used(out).values()) == {rows}


# --- the demo and the benchmark


def test_demo(cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_demo, "BITS", (16, 8))
    monkeypatch.setattr(lora_demo, "TEXT_SEQUENCES", 1)
    monkeypatch.setattr(lora_demo, "TEXT_TOKENS", 8)
    outcome = cloven_here("demo", "private-lora", "--json", "--prompts", "1", "--tokens", "3")
    assert outcome.code == 0 and outcome.err == "", outcome.err
    report = json.loads(outcome.out)
    assert report["tokens_identical_to_peft"] == report["prompts"] == 1 and report["queries_used"] == report["budget"] - 1


def demo_result(identical: int, prompts: int) -> lora_demo.LoraDemo:
    fields: dict[str, Any] = dict.fromkeys(lora_demo.LoraDemo.__dataclass_fields__, 3)
    fields |= {"prompts": prompts, "new_tokens": 4, "tokens_identical_to_peft": identical, "error_by_bits": {"16": 1e-4, "8": 1e-2}}
    fields |= {"example_prompt": "The church", "example_text": " [bold]", "example_base": "x"}
    return lora_demo.LoraDemo(**fields)


@pytest.mark.parametrize(("identical", "prompts", "code"), [(20, 20, 0), (19, 20, 0), (18, 20, 1)])
def test_demo_prints_tables_and_fails_where_texts_differ(
    identical: int, prompts: int, code: int, cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_demo, "run_lora_demo", lambda *_: demo_result(identical, prompts))
    outcome = cloven_here("demo", "private-lora")
    assert outcome.code == code and f"{identical} of {prompts}" in outcome.out and "The church [bold]" in outcome.out
    assert cloven_here("demo", "private-lora", "--json").code == code


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_demo_of_few_prompts_fails_where_none_is_identical(prompts: int, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text of twenty may differ; one of one may not."""
    monkeypatch.setattr(lora_demo, "run_lora_demo", lambda *_: demo_result(0, prompts))
    assert cloven_here("demo", "private-lora", "--json").code == 1


@pytest.mark.long
def test_demo_in_a_process_of_its_own() -> None:
    result = run_cloven("demo", "private-lora", "--json", "--prompts", "1", "--tokens", "4")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    report = json.loads(result.stdout)
    issue = ("tokens_identical_to_peft", "perplexity_base", "perplexity_private", "perplexity_peft", "queries_used", "budget")
    assert set(issue) <= set(report) and report["tokens_identical_to_peft"] == 1


def test_bench(cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measured(shape: str, progress: Any, **options: Any) -> lora_bench.LoraBench:
        asked.append({"shape": shape, **options})
        return result

    with monkeypatch.context() as context:
        context.setattr(lora_bench, "references", lambda adapter: ({}, ["fhe"]))
        result = lora_bench.bench_private_lora("demo", lambda *_: None, tokens=1, rounds=1, layers=1, prefill=1)
    monkeypatch.setattr(lora_bench, "bench_private_lora", measured)
    command = ("bench", "private-lora", "--shape", "demo", "--layers", "1", "--tokens", "3", "--rounds", "2")
    outcome = cloven_here(*command, "--json")
    assert outcome.code == 0 and json.loads(outcome.out) == json.loads(json.dumps(result.to_dict())), outcome.err
    outcome = cloven_here(*command)
    assert outcome.code == 0 and "protocol, ms per layer and token" in outcome.out and "Not installed, so not measured: fhe." in outcome.out
    assert asked == [{"shape": "demo", "layers": 1, "tokens": 3, "rounds": 2}] * 2


def test_bench_of_an_unknown_shape(cloven_here: Command) -> None:
    one_line(cloven_here("bench", "private-lora", "--shape", "gpt-5"), 2, "choose one of chatglm2-6b, llama-2-7b, demo")
