"""The README's examples work as they are printed.

A ```python block is a complete program. The lines of the ```sh blocks are commands of one session; those that contain `make `,
`git clone` or `pip install` need a fresh clone and are not run. `MODEL` and `ADAPTER` stand for a model's and an
adapter's directory: here they are the demo's. The short form runs the commands in forked processes (see `forked_session`), the long one
by a shell.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloven.zoo.demo import demo_adapter_path, demo_model_path
from tests.helpers import free_port
from tests.split_models import scratch

README = Path(__file__).parents[1] / "README.md"
NOT_RUN = ("make ", "git clone", "pip install")
PORTS = ("5555", "5556", "8000")


def blocks(*languages: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    """`cloven` is on the path, as in an activated virtual environment; no settings, state or cache of the person who runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("CLOVEN_")}
    own |= {"XDG_STATE_HOME": str(scratch() / "readme-state"), "XDG_CACHE_HOME": str(scratch() / "readme-cache")}
    return own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"}


def commands() -> list[str]:
    lines = [line.removeprefix("$ ") for block in blocks("sh", "console", "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#") and not any(word in line for word in NOT_RUN)]


@pytest.mark.parametrize("shell", ["forked", pytest.param("bash", marks=pytest.mark.long)])
def test_the_examples(tmp_path: Path, shell: str) -> None:
    """All at once, because each mostly waits for something: the Python programs, and the commands as one shell session."""
    programs = []
    for number, block in enumerate(blocks("python")):
        script = tmp_path / f"example{number}.py"
        script.write_text(block, encoding="utf-8")
        programs.append(started([sys.executable, str(script)], tmp_path))
    (tmp_path / "MODEL").symlink_to(demo_model_path())
    (tmp_path / "ADAPTER").symlink_to(demo_adapter_path())
    session = "\n".join(commands())
    for port in PORTS:  # somebody else may be at the printed ones
        session = session.replace(port, str(free_port()))
    if shell == "bash":
        commander = started(["bash", "-c", f"set -e\ntrap 'kill $(jobs -p); wait' EXIT\n{session}\n"], tmp_path)
    else:
        commander = started([sys.executable, str(Path(__file__).with_name("forked_session.py"))], tmp_path, stdin=subprocess.PIPE)
        assert commander.stdin is not None
        commander.stdin.write(session)
        commander.stdin.close()
        commander.stdin = None
    for program in programs:
        out, errors = program.communicate(timeout=240)
        assert program.returncode == 0, errors
        assert "ROMEO:" in out and "exchanges=" in out
        assert "Warning" not in errors and "Traceback" not in errors
    out, errors = commander.communicate(timeout=240)
    assert commander.returncode == 0, errors
    assert "Traceback" not in errors and "FAIL" not in out
    assert (tmp_path / "OUT" / "trusted").is_dir() and (tmp_path / "OUT" / "exposed").is_dir()


def started(command: list[str], folder: Path, **more: Any) -> subprocess.Popen[str]:
    own = environment() | {"CLOVEN_STATE": str(folder / ".state")}  # an adapter that another test has prepared has a ledger there
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=own, **more)


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 1
    shown = " ".join(commands())
    assert all(f"cloven {name}" in shown for name in ("prepare slip", "keygen", "worker", "generate", "serve"))


def test_every_command_shown_anywhere_exists() -> None:
    named = set(re.findall(r"`?cloven ([\w-]+)", README.read_text(encoding="utf-8")))
    listed = subprocess.run([sys.executable, "-m", "cloven", "--help"], capture_output=True, text=True, timeout=30).stdout
    commands_there = set(re.findall(r"^│ ([\w-]+) ", listed, re.MULTILINE))
    words = {"works", "does", "is", "are", "knows", "never"}  # where the text speaks about cloven
    assert named - words <= commands_there, named - commands_there


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


def test_nothing_is_left_to_be_filled_in() -> None:
    text = README.read_text(encoding="utf-8")
    assert "@@" not in text and "TODO" not in text and "ROMEO" in text
