"""What a replica adds to the endpoint, in this process; real ones are in `test_serve`."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import httpx

from cloven.cli.hardening import forbid_core_dumps
from cloven.metrics.catalog import Sample
from cloven.model.runtime import RuntimeOptions
from cloven.serving.half import Half
from cloven.serving.loading import LoadOptions
from cloven.serving.options import ServeOptions
from cloven.serving.replicas.actor import _MOST_LINES, STATE, Given, KeptLog, _with_state
from cloven.wire.messages import WORKER
from tests.served import run


def record(message: str, *arguments: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("cloven", level, "x.py", 1, message, arguments, None)


def test_a_log_is_fetched_once_and_bounded() -> None:
    kept = KeptLog()
    kept.emit(record("%s is away", "it"))
    kept.emit(record("gone", level=logging.ERROR))
    assert kept.fetch() == [(logging.WARNING, "it is away"), (logging.ERROR, "gone")] and kept.fetch() == []
    for number in range(_MOST_LINES + 10):
        kept.emit(record(str(number)))
    lines = kept.fetch()
    assert len(lines) == _MOST_LINES and lines[-1][1] == str(_MOST_LINES + 9)


def test_its_own_route() -> None:
    async def behind(scope: Any, receive: Any, send: Any) -> None:
        del receive
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    async def test() -> None:
        kept = KeptLog()
        kept.emit(record("hello"))
        app = _with_state(
            behind, lambda: "ready", kept, lambda: [Sample("cloven_tokens_total", 3.0), Sample("cloven_answers_total", 1.0, ("200",))]
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            assert (await client.get(STATE)).json() == {
                "state": "ready",
                "log": [[logging.WARNING, "hello"]],
                "samples": [["cloven_tokens_total", 3.0, []]],
            }
            assert (await client.get("/health")).text == "/health"

    run(test)


def test_ray_is_told_nothing_secret(tmp_path: Path) -> None:
    """Paths, numbers, a certificate: neither API keys nor contents of files."""
    secret = tmp_path / "secret"
    secret.write_text("Xylophone" * 10)
    half = Half(tmp_path, "slip", "ab" * 16, "ipc:///w", "worker", WORKER, True)
    serving = ServeOptions(api_key_file=secret, tls_key=secret, tls_certificate=secret)
    runtime = RuntimeOptions("ipc:///w", tmp_path, pads=tmp_path)
    given = Given(half, LoadOptions(chat_template=secret), runtime, serving, "CERTIFICATE", 2, forbid_core_dumps, logging.WARNING)
    assert b"Xylophone" not in pickle.dumps(given)
    again = pickle.loads(pickle.dumps(given))
    assert (again.how, again.runtime, again.serving, again.harden) == (given.how, given.runtime, given.serving, forbid_core_dumps)
    assert again.half.folder == tmp_path and again.half.schema._types == WORKER._types
