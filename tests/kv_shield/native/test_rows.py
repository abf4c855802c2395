"""Calls of any shape: C++ against the same arithmetic in PyTorch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import SecretStream
from cloven.kv_shield.enclave_step import StepTemplate, library
from cloven.kv_shield.keyed_rows import keyed, normed, restored
from cloven.kv_shield.keys import session_keys
from cloven.kv_shield.rotary import Rotary, RotaryGather
from cloven.kv_shield.shapes import AttentionShape

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler built the library")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OneLayer:
    shape: AttentionShape
    norms: Tensor | None
    gather: RotaryGather | None
    restore: Tensor | None


def rotary(d: int) -> Rotary:
    half = d // 2
    place = torch.arange(d)
    sign = torch.where(place < half, -1, 1)
    return Rotary(1 / 100 ** (torch.arange(half) / half), 1.0, place % half, (place + half) % d, sign)


def in_float32(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tables[0].float().contiguous(), tables[1].float().contiguous()


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    difference = (ours.double() - theirs.double()).abs().max()
    return bool(difference <= (1e-5 if dtype == torch.float32 else 0.02) * theirs.double().abs().max())


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    per=st.integers(1, 4),
    half=st.integers(1, 20),
    noise=st.integers(1, 19),
    batch=st.integers(1, 3),
    rows=st.integers(1, 37),
    norms=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    threads=st.integers(1, 3),
)
def test_a_session_call_as_pytorch_computes_it(
    kv_heads: int, per: int, half: int, noise: int, batch: int, rows: int, norms: bool, dtype: str, threads: int
) -> None:
    kind, d, heads = DTYPES[dtype], 2 * half, kv_heads * per
    shape = AttentionShape("attention", heads, kv_heads, d, ("qkv",), "o", True, 1e-6 if norms else None)
    weights = 1 + torch.rand(heads + kv_heads, d) if norms else None
    layer = OneLayer(shape, weights, rotary(d).gather(torch.arange(d)[None]), None)
    stream = SecretStream(bytes(32), "test")
    keys, random = session_keys(stream, kv_heads, d + noise, batch), stream.noise(batch, 2, kv_heads, rows, noise)
    x = torch.randn(batch, rows, (heads + 2 * kv_heads) * d).to(kind)
    tables = rotary(d).tables(torch.arange(rows).expand(batch, rows), kind)
    native = StepTemplate([layer], noise, kind)
    before, qk = torch.get_num_threads(), x[..., : (heads + kv_heads) * d]
    if weights is not None:
        qk = normed(qk, weights, shape)
    assert layer.gather is not None
    qk = layer.gather.rotate(qk, layer.gather.columns(tables))
    expected = keyed(qk, x[..., (heads + kv_heads) * d :], keys, shape, random)
    a = torch.randn(batch, rows, heads * (d + noise)).to(kind)
    try:
        torch.set_num_threads(threads)
        ours = native.compute(0, True, x, in_float32(tables), keys, random)
        back = native.compute(0, False, a, None, keys, None)
    finally:
        torch.set_num_threads(before)
    assert ours.shape == expected.shape and ours.dtype == kind and close(ours, expected, kind)
    assert close(back, restored(a, keys, shape, noise), kind)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_permuted_call_bit_for_bit(rows: int, dtype: str) -> None:
    kind, d, heads, kv_heads = DTYPES[dtype], 12, 6, 2
    shape = AttentionShape("attention", heads, kv_heads, d, ("qkv",), "o", True, None)
    pi = torch.stack([torch.randperm(d) for _ in range(kv_heads)])
    gather = rotary(d).gather(torch.cat([pi.repeat_interleave(heads // kv_heads, 0), pi]))
    restore = torch.randperm(heads * d)
    native = StepTemplate([OneLayer(shape, None, gather, restore)], 0, kind)
    x, tables = torch.randn(2, rows, (heads + kv_heads) * d).to(kind), rotary(d).tables(torch.arange(rows).expand(2, rows), kind)
    assert torch.equal(native.compute(0, True, x, in_float32(tables), None, None), gather.rotate(x, gather.columns(tables)))
    a = torch.randn(2, rows, heads * d).to(kind)
    assert torch.equal(native.compute(0, False, a, None, None, None), a[..., restore])


def test_sizes_that_do_not_go_together() -> None:
    """C++ would read beside them."""
    d, noise, shape = 8, 4, AttentionShape("attention", 2, 1, 8, ("qkv",), "o", True, None)
    native = StepTemplate([OneLayer(shape, None, rotary(d).gather(torch.arange(d)[None]), None)], noise, torch.float32)
    stream = SecretStream(bytes(32), "test")
    x, tables = torch.randn(1, 3, 4 * d), in_float32(rotary(d).tables(torch.arange(3)[None], torch.float32))
    keys, random = session_keys(stream, 1, d + noise, 1), stream.noise(1, 2, 1, 3, noise)
    assert native.compute(0, True, x, tables, keys, random).shape == (1, 3, 4 * (d + noise))
    short = in_float32(rotary(d).tables(torch.arange(2)[None], torch.float32))
    for wrong in (
        (x[..., :-1], tables, keys, random),
        (x, short, keys, random),
        (x, None, keys, random),
        (x, tables, None, random),
        (x.repeat(2, 1, 1), in_float32(rotary(d).tables(torch.arange(3).expand(2, 3), torch.float32)), keys, random),
        (x, tables, keys, random[..., :2, :]),
    ):
        with pytest.raises(ValueError, match="other sizes"):
            native.compute(0, True, *wrong)
    with pytest.raises(ValueError, match="other sizes"):
        native.compute(0, False, x, None, keys, None)


def test_threads_after_a_fork() -> None:
    """The pool of the parent is not the child's: a call there must not wait for threads that are not."""
    script = """
import os, torch
from tests.kv_shield.native.test_rows import OneLayer, StepTemplate, AttentionShape
torch.set_num_threads(3)
shape = AttentionShape("attention", 4, 4, 8, ("qkv",), "o", False, None)
native = StepTemplate([OneLayer(shape, None, None, torch.randperm(32))], 0, torch.float32)
a = torch.randn(1, 300, 32)
compute = lambda: native.compute(0, False, a, None, None, None).numpy().tobytes()
before, child = compute(), os.fork()
if child == 0:
    os._exit(7 if compute() == before else 8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "7", result.stderr
