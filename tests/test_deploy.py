"""The walkthrough of docs/deploy.md works as it is printed, and names nothing that is not there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloven.metrics.catalog import BY_NAME
from cloven.zoo.demo import demo_model_path
from tests.helpers import free_port
from tests.test_readme import environment, started

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
PORTS = ("5555", "8000", "9401", "9402")


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def commands() -> list[str]:
    return [line for block in re.findall(r"^```sh\n(.*?)^```$", text(), re.MULTILINE | re.DOTALL) for line in block.splitlines() if line]


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="no curl, or no openssl")
def test_the_walkthrough(tmp_path: Path) -> None:
    (tmp_path / "MODEL").symlink_to(demo_model_path())
    session = "\n".join(commands())
    for port in PORTS:  # somebody else may be at the printed ones
        session = session.replace(port, str(free_port()))
    running = started(["bash", "-c", f"set -e\ntrap 'kill $(jobs -p); wait' EXIT\n{session}\n"], tmp_path)
    out, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert "Traceback" not in errors and '"object":"text_completion"' in out and '{"status":"ok"}' in out
    assert (tmp_path / "API_KEYS").stat().st_mode & 0o777 == 0o600
    assert "worker" in out and "serve" in out  # the table of `cloven top`


def test_every_option_is_there() -> None:
    helps: dict[str, str] = {}
    shown = re.findall(r"cloven (worker|serve|prepare slip|keygen|pads fill|top|audit|inspect|enclave|adapter-server)([^\n`]*)", text())
    assert len(shown) > 10
    for command, rest in shown:
        if command not in helps:
            line = [sys.executable, "-m", "cloven", *command.split(), "--help"]
            wide = {**environment(), "COLUMNS": "200"}
            helps[command] = subprocess.run(line, capture_output=True, text=True, timeout=60, env=wide).stdout
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in helps[command], f"{command} {option}"


def test_every_metric_is_there() -> None:
    named = set(re.findall(r"`(cloven_\w+)`", text()))
    assert len(named) >= 8 and named <= set(BY_NAME)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text()):
        assert (PAGE.parent / target).exists(), target
