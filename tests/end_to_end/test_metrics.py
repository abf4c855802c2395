"""Metrics and logs of real processes: they agree with what the other side counted, tell no contents, and stand hostile readers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from zmq.utils import z85

import cloven
from cloven.cli.top import table
from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.cluster.server_process import ServerProcess
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import VerificationFailed
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.metrics.rates import Activity, away
from cloven.metrics.scrape import Scrape, open_client, scrape
from cloven.metrics.structured_log import configure_log
from cloven.telemetry import LayerStatistics, logger
from cloven.wire.keys import generate_keys
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.liar import Liar
from tests.end_to_end.test_lora_cli import BASE, own
from tests.helpers import Context, FakeWorker, free_port
from tests.kv_bundles import ids_of as kv_ids
from tests.kv_bundles import kv_bundle
from tests.kv_bundles import load as load_kv
from tests.lora_bundles import connect, copied, lora_bundle
from tests.lora_bundles import ids_of as lora_ids
from tests.split_models import demo_bundle, demo_model, greedy, load, logits, open_session, random_ids, run_cloven, scratch, tiny_bundle

PROMPT = "Thou zyxquibble farthingale, speak"
WORDS = ("zyxquibble", "farthingale", "speak")
LOGGED = ("--log-format", "json", "--log-level", "DEBUG")


def read(port: int) -> Scrape:
    with open_client() as client:
        return scrape(client, f"http://127.0.0.1:{port}/metrics")


def grown(port: int, before: Scrape, *names: str) -> list[float]:
    now = read(port)
    return [(now.total(f"cloven_{name}") or 0) - (before.total(f"cloven_{name}") or 0) for name in names]


def agree(port: int, before: Scrape, total: LayerStatistics, *, rows: bool = True) -> None:
    """What a server counted since a scrape is what the session's telemetry says."""
    names = ("exchanges_total", "received_bytes_total", "sent_bytes_total", "rows_total", "refused_total")
    exchanges, received, sent, counted, refused = grown(port, before, *names)
    assert (exchanges, received, sent, refused) == (total.exchanges, total.bytes_up, total.bytes_down, 0)
    assert total.exchanges > 0 and total.resent == 0
    if rows:
        assert counted == total.rows


# --- they agree with the other side


def test_a_worker_over_ipc_counts_what_the_session_counts() -> None:
    bundle, port = tiny_bundle("llama"), free_port()
    with WorkerProcess(bundle.exposed, None, "--metrics-port", str(port)) as worker:
        model = load(bundle.trusted)
        with open_session(model, worker.address) as session:
            before = read(port)
            for length in (1, 7, 2):
                logits(model, random_ids(97, 1, length))
                agree(port, before, session.telemetry.total())  # at once, though a lane is being served
            found = read(port)
            assert found.total("cloven_connections") == 1 and found.total("cloven_hellos_total") == 1
            assert 0 < (found.total("cloven_work_seconds_total") or 0) < 60
            total = session.telemetry.total()
        agree(port, before, total)  # and after its end
        assert read(port).label("cloven_process_info", "role") == "worker"


def test_a_worker_over_tcp_counts_what_the_session_counts(folder: Path) -> None:
    bundle, port = tiny_bundle("llama"), free_port()
    generate_keys(folder / "keys")
    address, keys = f"tcp://127.0.0.1:{free_port()}", ("--keys", str(folder / "keys" / "worker"))
    with WorkerProcess(bundle.exposed, address, *keys, "--metrics-port", str(port)) as worker:
        model = load(bundle.trusted)
        with open_session(model, worker.address, keys=folder / "keys" / "trusted") as session:
            before = read(port)
            logits(model, random_ids(97, 2, 5))
            agree(port, before, session.telemetry.total())
            found = read(port)
            ways = {dict(labels)["way"]: value for (name, labels), value in found.values.items() if name == "cloven_exchanges_total"}
            assert ways["lane"] == ways["native"] == 0 < ways["socket"]


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_an_enclave_counts_what_the_session_counts(mode: str) -> None:
    out, port = kv_bundle("llama", mode), free_port()
    with EnclaveProcess(out / "trusted", None, "--metrics-port", str(port)) as enclave:
        model = load_kv(out)
        with cloven.attach(model, enclave.address, timeout=20) as session:
            before = read(port)
            model.generate(kv_ids(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            agree(port, before, session.telemetry.total(), rows=False)
            assert grown(port, before, "tokens_total") == [5 + 3]  # the last token is not read again
            assert read(port).total("cloven_enclave_sessions_opened_total") == (mode == "session")


def test_an_adapter_server_counts_what_the_session_counts(tmp_path: Path) -> None:
    out, port = copied(lora_bundle(), tmp_path / "out"), free_port()
    with AdapterServerProcess(out / "server", None, "--metrics-port", str(port)) as server:
        before = read(port)
        left = before.total("cloven_ledger_left_rows")
        model, session = connect(out, server.address)
        with session:
            before = read(port)
            logits(model, lora_ids(1, 5))
            agree(port, before, session.telemetry.total())
            found = read(port)
            assert left is not None and found.total("cloven_ledger_left_rows") == left - 256 and found.total("cloven_ledger_usable") == 1
            assert found.label("cloven_ledger_client_left_rows", "client") == "local"


# --- hostile readers


def test_readers_that_flood_and_dawdle_do_not_hurt_the_server() -> None:
    bundle, port = demo_bundle("int8x2"), free_port()
    expected = greedy(demo_model(), "ROMEO:", 6)
    with WorkerProcess(bundle.exposed, None, "--metrics-port", str(port)) as worker, hostile(port):
        done = run_cloven(
            *("generate", str(bundle.trusted), "--worker", worker.address, "--prompt", "ROMEO:", "--dtype", "float32"),
            *("--max-new-tokens", "6", "--json"),
        )
        worker.require_running()
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens"] == expected
        threads = int(re.search(r"^Threads:\s+(\d+)$", Path(f"/proc/{worker.pid}/status").read_text(), re.MULTILINE)[1])  # type: ignore[index]
        assert threads < 100
        assert worker.log() == ""


@contextlib.contextmanager
def hostile(port: int) -> Iterator[None]:
    """Connections that are opened and left, and garbage, as quick as two threads can."""
    ended = threading.Event()

    def flood(request: bytes) -> None:
        held: list[socket.socket] = []
        while not ended.is_set():
            with contextlib.suppress(OSError):
                peer = socket.create_connection(("127.0.0.1", port), timeout=2)
                held.append(peer)
                peer.sendall(request)
            if len(held) > 50:
                held.pop(0).close()
            ended.wait(0.002)
        for peer in held:
            peer.close()

    threads = [threading.Thread(target=flood, args=(request,)) for request in (b"", b"GET /metrics HTTP/1.1\r\n\r\n", b"\xff" * 9000)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(10)


def _read_soon(port: int) -> int:
    """The status, once the worker publishes: its socket is there a moment earlier."""
    for _ in range(200):
        with contextlib.suppress(httpx.ConnectError):
            return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).status_code
        time.sleep(0.05)
    raise AssertionError("nothing is published")


def test_it_listens_where_it_is_told_and_stops_with_the_server() -> None:
    bundle, port = tiny_bundle("llama"), free_port()
    with WorkerProcess(bundle.exposed, None, "--metrics-port", str(port)):
        assert _read_soon(port) == 200
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)


# --- what goes wrong


def test_without_prometheus_it_says_what_to_install(cloven_here: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "prometheus_client" else found(name, *more))
    for command, half in (("worker", "exposed"), ("enclave", "trusted"), ("adapter-server", "server")):
        outcome = cloven_here(command, str(folder / half), "--listen", f"ipc://{folder}/s", "--metrics-port", "9401")
        one_line(outcome, 2, r"--metrics-port needs prometheus_client: pip install 'cloven\[serve\]'")
    one_line(cloven_here("top", "http://127.0.0.1:1"), 2, "cloven top needs prometheus_client")


def test_a_port_that_is_taken_ends_the_server(cloven_here: Command, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ("worker", str(tiny_bundle("llama").exposed), "--listen", f"ipc://{folder}/s")
        outcome = cloven_here(*arguments, "--metrics-port", str(taken.getsockname()[1]))
    assert outcome.code == 1 and re.fullmatch(r"cloven: metrics: cannot listen at 127\.0\.0\.1:\d+: .*\n", outcome.err)
    assert outcome.out == ""  # it never says that it listens
    with pytest.raises(ConnectionError), socket.socket(socket.AF_UNIX) as peer:  # and the other one is closed
        peer.connect(str(folder / "s"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--log-format", "xml"), "log format 'xml': choose text or json"),
        (("--log-level", "LOUD"), "log level 'LOUD': choose one of DEBUG"),
        (("--metrics-port", "9401", "--metrics-host", "no.such.host.invalid"), "no address of this machine"),
    ],
)
def test_wrong_settings(arguments: tuple[str, ...], match: str, cloven_here: Command, folder: Path) -> None:
    outcome = cloven_here("worker", str(tiny_bundle("llama").exposed), "--listen", f"ipc://{folder}/s", *arguments)
    assert outcome.code == 2 and re.search(match, outcome.err.splitlines()[-1]), outcome.err


def test_ray_has_no_metrics(cloven_here: Command, folder: Path) -> None:
    one_line(cloven_here("worker", "x", "--listen", f"ipc://{folder}/s", "--engine", "ray", "--metrics-port", "9401"), 2, "--metrics-port")


# --- logs


def check_log(server: ServerProcess, *events: str) -> str:
    """Every line is JSON, and these events are there; the text."""
    text = server.log()
    records = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "event", "message"} <= set(record) for record in records)
    assert set(events) <= {record["event"] for record in records}, text
    return text


def secrets_of(keys: Path) -> list[str]:
    """The secret of every key file, as it stands there and as hexadecimal."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(keys.rglob("*.json"))]
    found = [record["secret"] for record in records if "secret" in record]
    return found + [z85.decode(secret).hex() for secret in found]


def generated(*arguments: str) -> tuple[str, str]:
    """The text that a `cloven generate` of its own made, and its log at DEBUG."""
    done = run_cloven("generate", *arguments, "--prompt", PROMPT, "--max-new-tokens", "8", "--json", CLOVEN_LOG="DEBUG")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["text"], done.stderr


def require_silent(log: str, text: str, secrets: list[str]) -> None:
    """Nothing of the prompt, of the text that was made, or of the keys."""
    words = text.split()
    made = [" ".join(pair) for pair in itertools.pairwise(words)]  # one word alone can be a log's own
    assert made
    for word in (*WORDS, *made, *secrets):
        assert word.lower() not in log.lower(), word
    assert re.search(r"\[\s*\d+(\s*,\s*\d+){4,}", log) is None  # lists of tokens


def test_no_log_of_slip_holds_contents(folder: Path) -> None:
    bundle = demo_bundle("int8x2")
    generate_keys(folder / "keys")
    secrets = secrets_of(folder / "keys")
    assert len(secrets) == 4
    address = f"tcp://127.0.0.1:{free_port()}"
    metrics = ("--metrics-port", str(free_port()))
    with WorkerProcess(bundle.exposed, address, "--keys", str(folder / "keys" / "worker"), *metrics, *LOGGED) as worker:
        text, log = generated(str(bundle.trusted), "--worker", address, "--keys", str(folder / "keys" / "trusted"))
        log += httpx.get(f"http://127.0.0.1:{metrics[1]}/metrics", trust_env=False).text
        worker.process.terminate()
        worker.process.wait(20)
        seen = check_log(worker, "server_started", "connection_opened", "connection_closed", "server_stopped")
    assert "a session with tcp://" in log and "the session with tcp://" in log
    require_silent(seen + log, text, secrets)


def test_no_log_of_kv_shield_holds_contents() -> None:
    out = scratch() / "metrics-kv"
    prepare_kv_shield(cloven.demo_model_path(), out, KvShieldConfig("session", noise_dims=8))
    with EnclaveProcess(out / "trusted", None, *LOGGED) as enclave:
        text, log = generated(str(out / "exposed"), "--enclave", enclave.address)
        enclave.process.terminate()
        enclave.process.wait(20)
        seen = check_log(enclave, "server_started", "session_opened", "session_closed", "server_stopped")
    require_silent(seen + log, text, [])


def test_no_log_of_private_lora_holds_contents(tmp_path: Path) -> None:
    out = own(tmp_path)
    with AdapterServerProcess(out / "server", None, *LOGGED) as server:
        text, log = generated(str(out / "client"), "--server", server.address, "--base", BASE, "--dtype", "float32")
        server.process.terminate()
        server.process.wait(20)
        seen = check_log(server, "server_started", "connection_opened", "connection_closed", "server_stopped")
    require_silent(seen + log, text, [])


def test_a_wrong_answer_is_logged_and_counted(context: Context, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a worker that lies: the trusted side's log says so, and names layer and worker."""
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/liar"
    handlers, level = list(logger.handlers), logger.level
    model = load(bundle.trusted)
    try:
        configure_log("DEBUG", "json")
        with FakeWorker(context, address, Liar(bundle.exposed, lie_at=2)), open_session(model, address) as session:
            with pytest.raises(VerificationFailed):
                logits(model, random_ids(97, 1, 3))
            assert session.telemetry.verification_failures == 1
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    told = [(record["event"], record["level"]) for record in records if record["event"] != "message"]
    assert told == [("session_opened", "INFO"), ("verification_failed", "INFO"), ("session_closed", "INFO")]
    (failed,) = [record for record in records if record["event"] == "verification_failed"]
    assert failed["peer"] == address and "layers.0" in failed["message"]


# --- cloven top


def test_top_shows_what_is_there_and_what_is_away(cloven_here: Command) -> None:
    bundle, port, nobody = tiny_bundle("llama"), free_port(), free_port()
    with WorkerProcess(bundle.exposed, None, "--metrics-port", str(port)) as worker:
        model = load(bundle.trusted)
        ended = threading.Event()
        with open_session(model, worker.address) as session:
            asking = threading.Thread(target=lambda: [logits(model, random_ids(97, 1, 1)) for _ in iter(ended.is_set, True)])
            asking.start()
            try:
                urls = (f"http://127.0.0.1:{port}", f"127.0.0.1:{nobody}")
                told = cloven_here("top", *urls, "--json", "--interval", "0.5")
                shown = cloven_here("top", *urls, "--once", "--interval", "0.2")
            finally:
                ended.set()
                asking.join(30)
            assert session.telemetry.total().exchanges > 0
    assert told.code == shown.code == 0, told.err + shown.err
    up, away = json.loads(told.out)
    assert (up["up"], up["status"], up["role"], away["up"], away["status"]) == (True, "up", "worker", False, "away: nobody listens there")
    assert up["exchanges"] > 0 and up["bytes_in"] > 0 and up["rows"] > 0 and up["memory"] > 2**20 and up["refused"] == 0
    assert away["exchanges"] is None
    head, rule, first, second = (line for line in shown.out.splitlines() if line.strip())
    assert head.split()[:3] == ["process", "state", "exch/s"] and set(rule) == {"─", " "}
    assert first.split()[:2] == [f"127.0.0.1:{port}", "worker"] and float(first.split()[2].rstrip("k")) > 0
    assert second.split()[:2] == [f"127.0.0.1:{nobody}", "away:"] and "nobody listens there" in second


def test_the_table_fits_the_terminal() -> None:
    console = Console(width=10_000)
    busy = Activity("http://127.0.0.1:9401/metrics", "up", "worker", exchanges=1234.0, refused=2.0, memory=1.5e9, busy=0.25, failures=0.0)
    rows = [busy, away("http://[::1]:9402/metrics", "[red]no answer in time")]
    for width in (60, 70, 80, 200):
        with console.capture() as capture:
            console.print(table(rows, width))
        text = capture.get()
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        assert "127.0.0.1:9401" in text and "[red]no answer in time" in text and "tok/s" not in text  # nobody has tokens
        assert ("1.5G" in text) == ("mem" in text) == (width == 200) == ("wider" not in text)
    assert "1.2k" in text and "25%" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_top_goes_on_until_it_is_interrupted(terminal: bool) -> None:
    """In a pipe one table after another; on a terminal one that is drawn again, and the terminal as it was at the end."""
    port = free_port()
    with WorkerProcess(tiny_bundle("llama").exposed, None, "--metrics-port", str(port)), contextlib.ExitStack() as stack:
        ours, theirs = os.openpty() if terminal else os.pipe()
        stack.callback(os.close, ours)
        command = [sys.executable, "-m", "cloven", "top", f"http://127.0.0.1:{port}", "--interval", "0.2"]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "20"}
        top = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment)
        os.close(theirs)
        try:
            shown, deadline = "", time.monotonic() + 60
            while shown.count("worker") < 3 and time.monotonic() < deadline:
                shown += os.read(ours, 65536).decode()
            assert shown.count("worker") >= 3 and "exch/s" in shown
            assert top.poll() is None
            top.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # a terminal whose other end is closed
                while piece := os.read(ours, 65536).decode():
                    shown += piece
            assert top.wait(20) == 0 and top.stderr is not None and top.stderr.read() == ""
            assert ("\x1b[?1049h" in shown) == ("\x1b[?1049l" in shown) == terminal
        finally:
            top.kill()
            top.communicate()


@pytest.mark.parametrize("url", ["ipc:///x/y", "http://127.0.0.1", "http://user:pass@127.0.0.1:1", "http://127.0.0.1:99999", ""])
def test_top_says_what_an_address_is(url: str, cloven_here: Command) -> None:
    one_line(cloven_here("top", url), 2, "give http://HOST:PORT|give the port too")
