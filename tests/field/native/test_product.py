from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.field.native import product
from cloven.field.native.library import KERNEL_NAMES, Kernels, load_kernels
from cloven.field.native.product import FEW_ROWS
from cloven.field.residues import H
from tests.field.test_products import THREE_LOW_DIGITS, extreme_codes, extreme_residues
from tests.helpers import python_product, random_codes, random_residues

SOURCE = Path(product.__file__).parent
kernels = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the C++ kernels are not built")
EVERY_KERNEL = kernels.there if kernels is not None else ()


def library() -> Kernels:
    assert kernels is not None
    return kernels


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("k", [1, 2, 15, 31, 63, 64, 65, 127, 128, 129, 1000, 4096])
def test_every_kernel_against_python_integers(kernel: int, k: int) -> None:
    for m, n in [(1, 1), (1, 3), (3, 4), (2, 5), (FEW_ROWS, 7), (5, 33), (17, 65)]:
        c, w = random_residues(m, k, k), random_codes(n, k, k + 1)
        assert torch.equal(library().product(c, w, kernel), python_product(c, w))
    c = torch.cat(extreme_residues(1, k))
    w = torch.cat([*extreme_codes(1, k), torch.full((1, k), -128, dtype=torch.int8)])
    assert torch.equal(library().product(c, w, kernel), python_product(c, w))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_the_longest_inner_dimension_at_its_extremes(kernel: int) -> None:
    k = product.MAX_INNER
    for value in (H, -H, -1, THREE_LOW_DIGITS):  # −1 is p − 1: bytes 254, 255, 255, 127
        c = torch.full((1, k), value, dtype=torch.int32)
        for code in (127, -128):
            w = torch.full((2, k), code, dtype=torch.int8)
            assert torch.equal(library().product(c, w, kernel), python_product(c, w))


@given(data=st.data())
def test_any_shape_and_value(data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 9), label=name) for name in "mnk")
    rows = st.lists(st.lists(st.integers(-H, H) | st.sampled_from([H, -H, 0, -1]), min_size=k, max_size=k), min_size=m, max_size=m)
    codes = st.lists(st.lists(st.integers(-128, 127), min_size=k, max_size=k), min_size=n, max_size=n)
    c, w = torch.tensor(data.draw(rows), dtype=torch.int32), torch.tensor(data.draw(codes), dtype=torch.int8)
    for kernel in EVERY_KERNEL:
        assert torch.equal(library().product(c, w, kernel), python_product(c, w))


def test_many_chunks_and_views() -> None:
    c, w = random_residues(3, 130), random_codes(30_000, 200)
    assert torch.equal(library().product(c, w[:, 7:137]), library().product(c, w[:, 7:137].contiguous(), 0))
    some = slice(None, None, 997)
    assert torch.equal(library().product(c, w[some, 7:137]), python_product(c, w[some, 7:137]))
    strided = random_residues(130, 3).t()
    assert torch.equal(library().product(strided, w[:9, :130]), python_product(strided, w[:9, :130]))


@pytest.mark.parametrize(("m", "k", "n"), [(5, 64, 16), (16, 1025, 64), (129, 2100, 70), (300, 65, 129), (40, 12_000, 3), (1030, 70, 5)])
def test_many_rows(m: int, k: int, n: int) -> None:
    """More than one block of rows, part of k and strip of W, and parts of each."""
    c, w = random_residues(m, k), random_codes(n, k + 3)[:, 2 : 2 + k]
    expected = python_product(c, w)
    for kernel in EVERY_KERNEL:
        assert torch.equal(library().product(c, w, kernel), expected)


def test_bad_arguments_are_refused() -> None:
    c, w = random_residues(1, 8), random_codes(4, 8)
    for wrong in (w[:, :7], w.t(), w.to(torch.int16), random_codes(8, 8).t()):
        with pytest.raises(ValueError, match="dense rows"):
            library().product(c, wrong)
    with pytest.raises(ValueError, match="dense rows"):
        library().product(c.long(), w)
    assert 0 in library().there and library().best == max(library().there)
    for kernel in {-1, *range(len(KERNEL_NAMES) + 1)} - set(library().there):
        with pytest.raises(ValueError, match="refuses"):
            library().product(c, w, kernel)
    k = product.MAX_INNER + 1
    with pytest.raises(ValueError, match="refuses"):
        library().product(random_residues(1, k), random_codes(1, k))


def test_several_threads_at_once() -> None:
    w = random_codes(20_000, 64)
    inputs = [random_residues(2, 64) for _ in range(4)]
    expected = [library().product(c, w, 0) for c in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(40) if not torch.equal(library().product(inputs[i], w), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def _in_the_child(c: torch.Tensor, w: torch.Tensor, answers: multiprocessing.queues.Queue[bool]) -> None:
    torch.set_num_threads(2)
    answers.put(bool((library().product(c, w).numpy() == library().product(c, w, 0).numpy()).all()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    c, w = random_residues(1, 64), random_codes(20_000, 64)
    library().product(c, w)  # the parent's threads are there
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_the_child, args=(c, w, answers))
    child.start()
    assert answers.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program = tmp_path / "check"
    source = [
        str(Path(__file__).with_name("check.cpp")),
        *(str(SOURCE / f"{name}.cpp") for name in ("product", "hadamard", "rows", "query", "low_rank")),
        f"-I{SOURCE}",
    ]
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *options, *source, "-o", str(program)], check=True, timeout=240)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok, ")
