"""`cloven serve` in a process of its own, OpenAI's client, and the demo model's bundles of all three schemes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import httpx
import openai

import cloven
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.prepare import prepare_private_lora
from cloven.zoo.demo import demo_adapter_path
from tests.split_models import scratch

TEMPLATE = "{% for message in messages %}{{ message['role'] | upper }}:\n{{ message['content'] }}\n{% endfor %}ROMEO:"
PROMPTS = ("ROMEO:", "The king is", "My lord,", "What say you", "JULIET: O", "Enter the duke of", "To be or not", "I pray thee sir,")
_START_SECONDS = 120.0


class EndpointProcess:
    """`cloven serve HALF --port 0 --json …`; a context manager."""

    def __init__(self, half: Path, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cl")
        self._log = (Path(self._folder.name) / "log").open("w+")
        line = [sys.executable, "-P", "-m", "cloven", "serve", str(half), "--port", "0", "--json", *arguments]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=self._log, stdin=subprocess.DEVNULL, text=True)
        self.ready: dict[str, str] = {}

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        try:
            seen, _, _ = select.select([self.process.stdout], [], [], _START_SECONDS)
            line = self.process.stdout.readline() if seen else ""
            assert line, f"no address: {self.log()}"
            self.ready = json.loads(line)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def root(self) -> str:
        return self.ready["url"].removesuffix("/v1")

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.ready["url"], api_key=key, max_retries=0, **{"timeout": 60.0, **options})

    def health(self) -> str:
        return str(httpx.get(f"{self.root}/health", timeout=10).json()["status"])

    def wait_for(self, status: str, seconds: float) -> float:
        """Seconds until the health is this."""
        started = time.monotonic()
        while self.health() != status:
            assert time.monotonic() - started < seconds, f"not {status} within {seconds} s: {self.log()}"
            time.sleep(0.05)
        return time.monotonic() - started

    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8") if not self._log.closed else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        self._folder.cleanup()


@contextlib.contextmanager
def endpoint(half: Path, *arguments: str) -> Iterator[tuple[EndpointProcess, openai.OpenAI]]:
    """A running endpoint and its client, which is closed."""
    with EndpointProcess(half, *arguments) as process, process.client() as client:
        yield process, client


def written(client: openai.OpenAI, prompt: str, tokens: int = 12, **more: Any) -> str:
    """A greedy completion."""
    answer = client.completions.create(model=name_of(client), prompt=prompt, max_tokens=tokens, temperature=0, **more)
    return answer.choices[0].text


def streamed(client: openai.OpenAI, prompt: str, tokens: int = 12, **more: Any) -> str:
    """The same in pieces, joined."""
    with client.completions.create(model=name_of(client), prompt=prompt, max_tokens=tokens, temperature=0, stream=True, **more) as pieces:
        return "".join(piece.choices[0].text for piece in pieces)


@functools.cache
def _named(base: str) -> str:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        return client.models.list().data[0].id


def name_of(client: openai.OpenAI) -> str:
    return _named(str(client.base_url))


@functools.cache
def kv_demo(mode: str) -> Path:
    """OUT of the demo model with KV-Shield."""
    out = scratch() / f"served-{mode}"
    prepare_kv_shield(cloven.demo_model_path(), out, KvShieldConfig(mode))
    return out


@functools.cache
def lora_demo() -> Path:
    """OUT of the demo adapter; not to be served: see `tests.lora_bundles.copied`."""
    out = scratch() / "lora-served"
    with patch.dict(os.environ, {"CLOVEN_STATE": str(scratch() / f"state-{out.name}")}):  # where `copied` looks for the witness
        prepare_private_lora(str(cloven.demo_model_path()), demo_adapter_path(), out, PrivateLoraConfig(100_000))
    return out
