"""docs/deploy.md: its commands are one shell session that works as it is printed, and its units start commands that exist."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cloven.cli.main import app
from cloven.zoo.demo import demo_model_path
from tests.helpers import free_port
from tests.test_readme import environment

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
PORTS = ("5555", "8443")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def session() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def understood(line: str) -> str:
    """The command that a line starts, whose options and arguments exist and have values of the right kind; files are not looked for."""
    words = [word for word in shlex.split(line) if word != "&"]
    assert Path(words[0]).name == "cloven", line
    command: Any = typer.main.get_command(app)
    words = words[1:]
    names = []
    while hasattr(command, "commands"):
        names.append(words[0])
        command = command.commands[words.pop(0)]
    with command.make_context(names[-1], words):
        return " ".join(names)


def test_every_command_is_understood() -> None:
    commands = [understood(line) for line in session() if line.startswith("cloven ")]
    assert set(commands) == {"prepare slip", "keygen", "worker", "pads fill", "pads status", "serve"}
    assert any("--engine ray --replicas 2" in line for line in session())


def test_a_command_that_is_not_understood() -> None:
    """The check above can fail."""
    wrong = {
        "serve OUT --no-such-option": "No such option",
        "serve OUT --replicas two": "valid int",
        "worker OUT": "Missing|missing|--listen",
    }
    for line, message in wrong.items():
        with pytest.raises(Exception, match=message):
            understood(f"cloven {line}")
    with pytest.raises(KeyError):
        understood("cloven compose up")


def test_the_units() -> None:
    units = blocks("ini")
    assert len(units) == 2
    for text in units:
        unit = configparser.ConfigParser(interpolation=None, strict=True)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(text)
        assert set(unit.sections()) == {"Unit", "Service", "Install"}
        service = unit["Service"]
        assert understood(service["ExecStart"]) in ("worker", "serve") and Path(service["ExecStart"].split()[0]).is_absolute()
        assert service["User"] != "root" and service["LimitCORE"] == "0" and service["NoNewPrivileges"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """All but the program, which is not installed there, and with another one in its place."""
    for number, text in enumerate(blocks("ini")):
        unit = tmp_path / f"unit{number}.service"
        unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE), encoding="utf-8")
        done = subprocess.run(["systemd-analyze", "verify", "--recursive-errors=no", str(unit)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


@pytest.mark.long
def test_the_session(tmp_path: Path) -> None:
    (tmp_path / "MODEL").symlink_to(demo_model_path())
    text = "\n".join(session())
    for port in PORTS:  # somebody else may be at the printed ones
        text = text.replace(port, str(free_port()))
    given = environment()
    given.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        ["bash", "-c", f"set -e\ntrap 'kill $(jobs -p); wait' EXIT\n{text}\necho done\n"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=given,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0 and out.endswith("done\n"), errors
    assert "Traceback" not in errors
    assert out.count('"object":"text_completion"') == 2 and '{"status":"ok","replicas":2,"live":2}' in out
    assert sorted(path.name for path in (tmp_path / "TRUSTED").iterdir()) == ["api-keys", "out", "pads-2", "tls.key", "tls.pem"]
    assert not (tmp_path / "TRUSTED" / "out" / "pads").exists() and (tmp_path / "TRUSTED" / "api-keys").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "WORKER" / "keys" / "allowed").iterdir()] != ["trusted.json"]


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (PAGE.parent / path).exists(), target
        assert path or anchor in headings, target


def test_the_metrics_that_are_named_exist() -> None:
    """Where there is a page of metrics."""
    page = PAGE.with_name("metrics.md")
    if not page.exists():
        pytest.skip("no metrics in this version")
    named = set(re.findall(r"cloven_\w+", PAGE.read_text(encoding="utf-8")))
    assert named and named <= set(re.findall(r"cloven_\w+", page.read_text(encoding="utf-8")))
