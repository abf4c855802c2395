"""The worker's process must not even hold the code that handles secrets: whoever takes it over finds no use for it there."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.split_models import load, logits, open_session, random_ids, tiny_bundle

FORBIDDEN = (
    "transformers",
    "cloven.masks",
    "cloven.slip",
    "cloven.model",
    "cloven.offload",
    "cloven.demo",
    "cloven.zoo",
    "cloven.field.prg",
    "cloven.field.freivalds",
    "cloven.field.codec",
)


def test_what_a_real_worker_imports(socket_folder: Path) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{socket_folder}/w"
    command = [sys.executable, "-X", "importtime", "-m", "cloven", "worker", str(bundle.exposed), "--listen", address]
    log = socket_folder / "log"  # a file: thousands of lines would fill a pipe
    with log.open("w") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            model = load(bundle.trusted)
            with open_session(model, address):  # what is imported on the first request counts too
                logits(model, random_ids(97, 1, 3))
        finally:
            worker.send_signal(signal.SIGINT)
            assert worker.wait(20) == 0
    imported = set(re.findall(r"^import time:.*\|\s*([\w.]+)\s*$", log.read_text(), re.MULTILINE))
    assert {"torch", "zmq", "cloven.worker.service", "cloven.field.products"} <= imported
    assert [name for name in imported if any(name == one or name.startswith(one + ".") for one in FORBIDDEN)] == []
