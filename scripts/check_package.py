"""Build the wheel and the sdist, install the wheel into a clean environment, and use it from there.

The clean environment borrows torch and the other dependencies from the one that runs this script (a .pth file), so that the check takes
seconds; cloven itself comes from the wheel alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        (sdist,) = folder.glob("*.tar.gz")
        contents = set(zipfile.ZipFile(wheel).namelist())
        for needed in (
            "cloven/py.typed",
            "cloven/zoo/demo_model/model.safetensors",
            "cloven/zoo/demo_model/tokenizer.json",
            "cloven/serving/page/index.html",
            "cloven/serving/page/page.js",
            "cloven/zoo/demo_adapter/adapter_model.safetensors",
        ):
            assert needed in contents, f"{needed} is not in the wheel"
        with tarfile.open(sdist) as archive:
            assert any(path.endswith("pyproject.toml") for path in archive.getnames())
        clean = folder / "clean"
        venv.create(clean, with_pip=True)
        python = clean / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        packages = next((clean / "lib").glob("python*/site-packages"))
        borrowed = [path for path in Path(sysconfig.get_paths()["purelib"]).iterdir() if "cloven" not in path.name]
        (packages / "borrowed").mkdir()
        for path in borrowed:
            if not (packages / path.name).exists() and not path.name.endswith(".pth"):
                (packages / "borrowed" / path.name).symlink_to(path)
        (packages / "borrowed.pth").write_text("borrowed\n")
        where = subprocess.run(
            [str(python), "-c", "import cloven; print(cloven.__file__)"], check=True, cwd=folder, capture_output=True, text=True
        )
        assert str(clean) in where.stdout, where.stdout
        subprocess.run([str(clean / "bin" / "cloven"), "doctor"], check=True, cwd=folder)
        command = [str(clean / "bin" / "cloven"), "demo", "slip", "--json", "--prompts", "2", "--tokens", "8"]
        demo = json.loads(subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True).stdout)
        assert demo["tokens_identical"] == 2 and demo["bit_exact"], demo
        print(f"{wheel.name}: built, installed into a clean environment, demo ran")


if __name__ == "__main__":
    main()
