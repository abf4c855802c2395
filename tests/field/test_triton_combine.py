"""The one-pass epilogue against the passes it stands for, in Triton's interpreter: no GPU is needed, Triton is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from cloven.field import products
from cloven.field.products import DIGITS, combine_in_passes, one_pass
from cloven.field.residues import H, P

CHECK = """
import torch
from cloven.field.products import combine_in_passes, one_pass
fused = one_pass(torch.device("cpu"))
assert fused is not None, "Triton does not work"
random = torch.Generator().manual_seed(1)
for m, n, wider in ((1, 1, 0), (3, 5, 3), (40, 100, 4), (7, 4096, 8)):
    for extreme in (None, -(2**31), 2**31 - 1, 0, -1, 1):
        whole = torch.randint(-(2**31), 2**31, (4, m, n + wider), generator=random).to(torch.int32)
        if extreme is not None:
            whole[:] = extreme
        parts, found, expected = whole[:, :, :n], torch.empty(m, n, dtype=torch.int32), torch.empty(m, n, dtype=torch.int32)
        fused(parts, found)
        combine_in_passes(parts, expected)
        assert torch.equal(found, expected), (m, n, extreme)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_same_bits_as_the_passes() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_passes_against_python_integers() -> None:
    parts = torch.randint(-(2**31), 2**31, (DIGITS, 4, 6), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    out = torch.empty(4, 6, dtype=torch.int32)
    combine_in_passes(parts, out)
    for i in range(4):
        for j in range(6):
            value = sum(256**t * int(parts[t, i, j]) for t in range(DIGITS)) % P
            assert int(out[i, j]) == (value - P if value > H else value)


def test_where_it_does_not_work_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    products.one_pass.cache_clear()
    monkeypatch.setitem(sys.modules, "cloven.field.triton_combine", None)  # an import that fails
    assert one_pass(torch.device("cpu")) is None
    wrong = type(sys)("cloven.field.triton_combine")
    wrong.combined_into = lambda parts, out: out.zero_()  # type: ignore[attr-defined]
    products.one_pass.cache_clear()
    monkeypatch.setitem(sys.modules, "cloven.field.triton_combine", wrong)
    assert one_pass(torch.device("cpu")) is None
    products.one_pass.cache_clear()
