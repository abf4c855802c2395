from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import PadMisuse
from cloven.field.codec import encode
from cloven.field.prg import KEY_BYTES
from cloven.field.products import Float64
from cloven.field.residues import H, P, is_residue
from cloven.field.selection import select_backend
from cloven.masks import lwe
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import LweParameters, lwe_parameters
from cloven.masks.public_matrix import a_pub
from cloven.private_lora import prepare
from cloven.private_lora.manifest import ClientGroup, ClientModule
from cloven.private_lora.prepare import with_pad
from cloven.private_lora.session import remote_bounds
from tests.helpers import CPU, centred, python_product, random_codes, random_residues

HINTS = ("lwe", "statistical")
K, N = 40, 3


def small_masks(rows: int = 2, columns: int = 24, hint: str = "lwe") -> LweMasks:
    """Masks for a matrix of no meaning."""
    return LweMasks(random_residues(rows, 1280), columns, lwe_parameters(hint), select_backend())


def masks_of(source: LweMasks, rows: int, columns: int = 24) -> list[tuple[int, ...]]:
    """Masks themselves: masking zeros shows them."""
    return [tuple(row) for row in source.take(rows).mask(torch.zeros(rows, columns, dtype=torch.int32)).tolist()]


def prepared(codes: Tensor, parameters: LweParameters) -> tuple[Tensor, Tensor, LweMasks]:
    """W', H and masks for it, as `prepare` and the client make them."""
    columns = parameters.pad_columns + codes.shape[1]
    matrix, hint = with_pad(codes, parameters, a_pub(columns).t().contiguous())
    return matrix, hint, LweMasks(hint, columns, parameters, select_backend())


def exact(a: Tensor, w: Tensor) -> Tensor:
    """a Wᵀ in int64, for small numbers."""
    return a.to(torch.int64) @ w.to(torch.int64).t()


def centred_of(x: Tensor) -> Tensor:
    """Centred residues of int64."""
    return (x + H) % P - H


class Recorder:
    """Notes what the sampler gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.samples: list[Tensor] = []
        original = module.gaussians

        def record(*arguments: Any) -> Any:
            samples = original(*arguments)
            self.samples.append(torch.from_numpy(np.array(samples, np.int64)))
            return samples

        monkeypatch.setattr(module, "gaussians", record)


@pytest.mark.parametrize("hint", HINTS)
def test_the_identity_is_exact(hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """z − H s = W x + W'e − E_h s mod p, and z is the product by Python integers."""
    parameters, codes = lwe_parameters(hint), random_codes(N, K)
    of_owner, of_client = Recorder(monkeypatch, prepare), Recorder(monkeypatch, lwe)
    matrix, _, masks = prepared(codes, parameters)
    x_int = torch.randint(-(2**20), 2**20, (2, K), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    pads = masks.take(2)
    c = pads.mask(torch.nn.functional.pad(x_int, (parameters.pad_columns, 0)))
    y = pads.unmask(python_product(c, matrix))
    s, e = of_client.samples[0].split([parameters.n, matrix.shape[1]], 1)
    expected = exact(x_int, codes) + exact(e, matrix)
    if hint == "lwe":
        expected -= exact(s, of_owner.samples[-1])
    assert torch.equal(y.to(torch.int64), centred_of(expected))
    assert is_residue(c) and matrix.dtype == torch.int8 and int(matrix.min()) >= -127
    assert torch.equal(matrix[:, parameters.pad_columns :], codes)


@pytest.mark.parametrize("hint", HINTS)
def test_the_mask_is_an_lwe_sample(hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, lwe)
    c = small_masks(hint=hint).take(3).mask(torch.zeros(3, 24, dtype=torch.int32))
    s, e = recorder.samples[0].split([1280, 24], 1)
    assert torch.equal(c.to(torch.int64), centred_of(exact(s, a_pub(24)) + e))
    assert 5.5 < float(s.double().std()) < 7.3 and int(s.abs().max()) < 64


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("bits", [8, 16])
def test_the_error_is_within_the_bound_and_nothing_wraps(hint: str, bits: int) -> None:
    """Inputs along the rows of W use the whole field: the bound on the noise is what is left of it."""
    parameters, codes = lwe_parameters(hint), torch.cat([random_codes(N, K), torch.full((1, K), 127, dtype=torch.int8)])
    matrix, _, masks = prepared(codes, parameters)
    l2 = int(codes.float().norm(dim=1).max()) + 1
    noise = parameters.noise(l2, bits)
    x = torch.cat([codes.double() * sign for sign in (1, -1)] * 4)
    x_int, alpha = encode(x, remote_bounds(ClientGroup(K, l2, (ClientModule("m", 1, 2),))), noise)
    pads = masks.take(len(x))
    c = pads.mask(torch.nn.functional.pad(x_int, (parameters.pad_columns, 0)))
    z = centred_of(exact(c, matrix)).to(torch.int32)
    middle = ((z >> (31 - bits)) << (31 - bits)) + (1 << (30 - bits))
    y = pads.unmask(middle.clamp(-H, H)).to(torch.int64)
    truth = exact(x_int, codes)
    assert int(truth.abs().max()) > 0.4 * H  # near the edge
    assert int((y - truth).abs().max()) <= noise
    assert int(truth.abs().max()) + noise <= H
    assert alpha.shape == (len(x), 1)


def test_the_bound_is_eight_standard_deviations() -> None:
    parameters, codes = lwe_parameters("lwe"), random_codes(N, K)
    matrix, _, masks = prepared(codes, parameters)
    pads = masks.take(400)
    c = pads.mask(torch.zeros(400, matrix.shape[1], dtype=torch.int32))
    error = pads.unmask(centred_of(exact(c, matrix)).to(torch.int32)).double()
    bound = parameters.noise(float(codes.float().norm(dim=1).max()), 31)
    assert 6 < bound / float(error.std()) < 11 and float(error.abs().max()) < bound
    assert abs(float(error.mean())) < 6 * float(error.std()) / math.sqrt(error.numel())


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 5), st.sampled_from(HINTS))
def test_any_shape(rows: int, columns: int, queries: int, hint: str) -> None:
    parameters, codes = lwe_parameters(hint), random_codes(rows, columns)
    matrix, _, masks = prepared(codes, parameters)
    pads = masks.take(queries)
    x_int = torch.full((queries, columns), 1000, dtype=torch.int32)
    c = pads.mask(torch.nn.functional.pad(x_int, (parameters.pad_columns, 0)))
    y = pads.unmask(centred_of(exact(c, matrix)).to(torch.int32)).to(torch.int64)
    assert y.shape == (queries, rows)
    assert ((y - exact(x_int, codes)).abs() <= parameters.noise(127 * columns**0.5, 31)).all()


# --- fresh randomness


def test_masks_never_repeat() -> None:
    one, two = small_masks(), small_masks()
    one.fill(60)
    everything = masks_of(one, 100) + masks_of(two, 100) + masks_of(one, 1)
    one.forget()
    everything += masks_of(one, 20)
    assert len(set(everything)) == 221


def test_every_row_takes_32_fresh_bytes_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given_out: list[bytes] = []
    original = os.urandom

    def counted(size: int) -> bytes:
        given_out.append(original(size))
        return given_out[-1]

    monkeypatch.setattr(os, "urandom", counted)
    source = small_masks()
    source.fill(7)
    source.take(9)
    assert [len(key) for key in given_out] == [KEY_BYTES] * 9 and len(set(given_out)) == 9


def test_the_same_bytes_would_give_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else goes into a mask: neither its number, nor the group, nor the time. So the 32 bytes must never repeat."""
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    first, second = masks_of(small_masks(), 2)
    assert first == second == masks_of(small_masks(3), 1)[0]


def test_masks_look_uniform_on_every_column() -> None:
    c = small_masks(columns=300).take(60).mask(torch.zeros(60, 300, dtype=torch.int32)).double()
    assert abs(float(c.mean())) < 0.03 * H and abs(float(c.std()) / H - 3**-0.5) < 0.02


@pytest.mark.parametrize("backend", [select_backend(), Float64(CPU)], ids=lambda backend: str(backend.name))
def test_batches_do_not_change_the_result(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([bytes([i]) * 32 for i in range(11)] * 2)
    monkeypatch.setattr(os, "urandom", lambda _: next(keys))
    hint = random_residues(2, 1280)
    at_once = LweMasks(hint, 24, lwe_parameters("lwe"), backend).take(11)
    monkeypatch.setattr(lwe, "_BYTES_AT_A_TIME", 4 * 4 * 24 * 3)  # three rows
    in_steps = LweMasks(hint, 24, lwe_parameters("lwe"), backend).take(11)
    zeros, nothing = torch.zeros(11, 24, dtype=torch.int32), torch.zeros(11, 2, dtype=torch.int32)
    assert torch.equal(at_once.mask(zeros), in_steps.mask(zeros))
    assert torch.equal(at_once.unmask(nothing), in_steps.unmask(nothing))


def test_the_image_is_by_python_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, lwe)
    hint = torch.cat([random_residues(1, 1280), torch.full((1, 1280), H, dtype=torch.int32), torch.full((1, 1280), -H, dtype=torch.int32)])
    pads = LweMasks(hint, 5, lwe_parameters("lwe"), select_backend()).take(1)
    pads.mask(torch.zeros(1, 5, dtype=torch.int32))
    s = recorder.samples[0][0, :1280].tolist()
    expected = [centred(-sum(a * b for a, b in zip(s, row, strict=True))) for row in hint.tolist()]
    assert pads.unmask(torch.zeros(1, 3, dtype=torch.int32)).tolist() == [expected]


# --- misuse


def test_masks_once() -> None:
    pads = small_masks().take(2)
    pads.mask(torch.zeros(2, 24, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="masks once"):
        pads.mask(torch.ones(2, 24, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(1, 24), (2, 1), (2, 23)])
def test_one_row_is_one_mask(shape: tuple[int, int]) -> None:
    with pytest.raises(PadMisuse):
        small_masks().take(2).mask(torch.zeros(shape, dtype=torch.int32))


def test_no_rows() -> None:
    pads = small_masks().take(0)
    assert pads.mask(torch.zeros(0, 24, dtype=torch.int32)).shape == (0, 24)
    assert pads.unmask(torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 2)


def test_nothing_secret_in_a_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, lwe)
    source = small_masks()
    source.fill(2)
    pads = source.take(1)
    shown = repr(source) + repr(pads)
    assert "tensor" not in shown and "<secret>" in shown
    assert str(recorder.samples[0][0, :3].tolist())[1:-1] not in shown


_FORK = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking a process that has threads: the very thing tried here
import torch
from cloven.errors import PadMisuse
from cloven.field.selection import select_backend
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import lwe_parameters

source = LweMasks(torch.ones(2, 1280, dtype=torch.int32), 24, lwe_parameters("lwe"), select_backend())
source.fill(4)
unused = source.take(1)
zeros = torch.zeros(1, 24, dtype=torch.int32)
child = os.fork()
if child == 0:
    failures = [] if source.ready == 0 and not source._ready else ["masks are there"]
    for name, attempt in {"take": lambda: source.take(1), "mask": lambda: unused.mask(zeros)}.items():
        try:
            attempt()
            failures.append(name)
        except PadMisuse:
            pass
    print("child", failures, flush=True)
    os._exit(bool(failures))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
unused.mask(zeros)
print("parent", len(source.take(5).mask(zeros.repeat(5, 1)).unique(dim=0)))
"""


def test_a_forked_child_has_no_masks(pytestconfig: pytest.Config) -> None:
    result = subprocess.run([sys.executable, "-c", _FORK], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["child []", "parent 5"], result.stdout + result.stderr
