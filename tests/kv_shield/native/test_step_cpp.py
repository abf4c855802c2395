from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import cloven

SOURCE = Path(cloven.__file__).parent / "kv_shield" / "native"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.long)])
def test_a_pass_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program = tmp_path / "check"
    source = [str(Path(__file__).with_name("check.cpp")), f"-I{SOURCE}"]
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *options, *source, "-o", str(program)], check=True, timeout=240)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok, ")
