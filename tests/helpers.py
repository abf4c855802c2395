"""What several test files need: slow exact arithmetic, small bundles, workers in threads, and workers that misbehave."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import mul
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor

from cloven.bundle.manifest import ExposedGroup, ExposedManifest
from cloven.bundle.shards import ShardWriter
from cloven.bundle.verification import sha256_matrix
from cloven.field.codec import row_bounds
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.native.library import load_kernels
from cloven.field.native.product import Native
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.field.products import Backend, Float64, Int8Digits, PlacedMatrix
from cloven.field.residues import H, P
from cloven.field.selection import select_backend, self_check
from cloven.masks.one_time import MaskSource, OneTimePads, PadKey
from cloven.offload import OffloadedMatrix, OneWorker, Share
from cloven.wire.channel import Exchanger
from cloven.worker.service import Worker

CPU = torch.device("cpu")
Context = zmq.Context[zmq.Socket[bytes]]


def centred(value: int) -> int:
    """The centred residue of a Python integer."""
    return (value + H) % P - H


def python_product(c: Tensor, w: Tensor) -> Tensor:
    """z = c Wᵀ mod p by Python integers: the oracle."""
    rows = w.tolist()
    return torch.tensor([[centred(sum(map(mul, x, row))) for row in rows] for x in c.tolist()], dtype=torch.int32)


def random_codes(n: int, k: int, seed: int = 0) -> Tensor:
    """int8 [n, k] in [−127, 127]."""
    return torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_residues(m: int, k: int, seed: int = 0) -> Tensor:
    """Uniform residues, int32 [m, k]."""
    return torch.randint(-H, H + 1, (m, k), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def native_backend() -> Backend | None:
    """The C++ kernel over the slow back end, so that a fall-back shows; None where it is not built."""
    kernels = load_kernels()
    return Native(kernels, Float64(CPU)) if kernels is not None else None


def int8_digits_is_exact() -> bool:
    """Whether this machine's `_int_mm` can be tested at all (it saturates on CPUs without VNNI)."""
    return self_check(Int8Digits(CPU))


def verifier(codes: Tensor, backend: Backend | None = None) -> Freivalds:
    """A Freivalds check of an int8 matrix under a fresh secret."""
    backend = backend or Float64(CPU)
    s = SecretStream(secrets.token_bytes(KEY_BYTES), "test").residues(CHECKS, codes.shape[0])
    return Freivalds(s, backend, backend.place(codes))


def pads_of(codes: Tensor, group: int = 0, key: PadKey | None = None, backend: Backend | None = None) -> OneTimePads:
    """One-time pads for an int8 matrix."""
    backend = backend or select_backend()
    placed = backend.place(codes)
    return OneTimePads(group, key or PadKey(), lambda: placed, backend, verifier(codes), "layer")


def offloaded(
    codes: Tensor, channel: Exchanger, *, masks: MaskSource | None = None, freivalds: Freivalds | None = None, group: int = 0
) -> OffloadedMatrix:
    """The trusted side of one matrix, behind a channel."""
    n, k = codes.shape
    masks = masks or pads_of(codes, group)
    return OffloadedMatrix("layer", group, n, k, row_bounds(codes), masks, (Share(n, OneWorker(channel, freivalds or verifier(codes))),))


class HonestExchanger:
    """A channel to a worker in this process that answers rightly; records what it saw."""

    def __init__(self, *matrices: Tensor) -> None:
        self.matrices = matrices
        self.seen: list[Tensor] = []

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
        """z = c Wᵀ mod p."""
        del layer, columns_out
        self.seen.append(c.clone())
        meanwhile()
        return self.product(group, c)

    def product(self, group: int, c: Tensor) -> Tensor:
        """The right answer."""
        from cloven.field.products import multiply

        backend = Float64(CPU)
        return multiply(backend, c, backend.place(self.matrices[group]))


def write_exposed(folder: Path, matrices: Sequence[Tensor]) -> ExposedManifest:
    """A bundle's exposed half with these int8 matrices."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "exposed", secret=False)
    for number, matrix in enumerate(matrices):
        writer.add(f"group-{number}", matrix)
    writer.close()
    groups = [
        ExposedGroup(matrix.shape[0], matrix.shape[1], writer.file_of[f"group-{number}"], f"group-{number}", sha256_matrix(matrix))
        for number, matrix in enumerate(matrices)
    ]
    manifest = ExposedManifest(tuple(groups), writer.files)
    manifest.write(folder)
    return manifest


def free_port() -> int:
    """A loopback port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def serving(folder: Path, address: str, **options: Any) -> Iterator[Worker]:
    """A real worker, served from a thread."""
    worker = Worker(folder, address, **options)
    thread = threading.Thread(target=worker.serve, name="worker")
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


Behaviour = Callable[[list[bytes]], list[list[bytes]]]


class FakeWorker:
    """A worker that does what a test wants: `behave` maps the frames of a request to the answers to send."""

    def __init__(self, context: Context, address: str, behave: Behaviour) -> None:
        self.received: list[list[bytes]] = []
        self._behave = behave
        self._stopping = threading.Event()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._run, name="fake-worker")

    def __enter__(self) -> FakeWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._socket.poll(20):
                    peer, *frames = self._socket.recv_multipart()
                    self.received.append(frames)
                    for answer in self._behave(frames):
                        self._socket.send_multipart([peer, *answer])
        finally:
            self._socket.close()


class Saturating:
    """An int8 back end like `vpmaddubsw`: pairs of u8·s8 products are added with saturation at 16 bits."""

    name = "saturating"
    device = CPU

    def place(self, codes: Tensor) -> PlacedMatrix:
        """The codes as they are."""
        return PlacedMatrix(codes, *codes.shape)

    def product(self, c: Tensor, w: PlacedMatrix) -> Tensor | None:
        """None."""
        del c, w
        return None

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """The right formula on wrong sums."""
        from cloven.field.products import digits

        m, k = c.shape
        unsigned = digits(c).permute(2, 0, 1).reshape(4 * m, k).to(torch.int32) + 128
        codes = w.codes.to(torch.int32)
        products = torch.nn.functional.pad(unsigned[:, None, :] * codes[None, :, :], (0, k % 2))  # [4M, N, K]
        pairs = products.view(*products.shape[:2], -1, 2).sum(3).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(2) - 128 * codes.sum(1)).view(4, m, w.rows).to(torch.int32)
