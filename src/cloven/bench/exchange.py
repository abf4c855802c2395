"""`cloven bench exchange`: where the time of one exchange goes, step by step.

One square group of linears, a real worker over ipc, pads ready. In every round the steps run by hand, as `slip.layer` and `offload` chain
them, then the product alone in this process on such a matrix; after some such rounds, as many whole calls of the layer: medians of all. How
long the worker worked on the exchanges by hand, its metrics say: the mean of some rounds, which is compared with the mean of what this
process waited in them; of these means the medians.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import cloven
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import BadInput
from cloven.field.codec import decode, encode, scale_of
from cloven.field.hadamard import turn, turn_onto
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.masks.waiting import Pads
from cloven.metrics.scrape import Scrape, open_client, scrape
from cloven.model.quiet import quiet_transformers
from cloven.slip.config import SlipConfig
from cloven.slip.layer import SplitGroup
from cloven.slip.session import SlipSession
from cloven.slip.split_model import groups_of
from cloven.zoo.random_bundle import write_random_bundle

GROUP = 1  # o_proj: square
WARM_UP = 10
LOOKS = 20  # at the worker's metrics
MOST_PADS = 1024  # rows that wait
WITH_PRODUCT = "sent, multiplied, received"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ExchangeBench:
    """Medians, in microseconds.

    Args:
        width: K = N; rows: M; rounds; products: the back end.
        steps: by name, in order; "sent, multiplied, received" holds the worker's product.
        worker: the product at the worker, from the request's arrival to the answer's departure.
        wire: of that step all but the product: frames are made and copied, the worker and this process wake up, the answer is looked at.
        product: such a product alone, in one process; secret_part: B (A x), which runs while the worker works.
        overhead: all steps, with `wire` in the place of the one that holds the product.
        whole_call: of the layer, the secret part in it.
    """

    width: int
    rows: int
    rounds: int
    products: str
    steps: dict[str, float]
    worker: float
    wire: float
    product: float
    secret_part: float
    overhead: float
    whole_call: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def bench_exchange(width: int, rows: int, rounds: int, progress: Callable[[str, int, int], None]) -> ExchangeBench:
    """Measure.

    Raises:
        BadInput: a width that heads of 64 do not divide.
    """
    if width < 64 or width % 64:
        raise BadInput(f"width {width}: give a multiple of 64")
    quiet_transformers()
    config = LlamaConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=width // 64, vocab_size=64)
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as folder:
        progress("writing random weights", 0, 1)
        bundle = write_random_bundle(config, Path(folder) / "out", SlipConfig())
        port = _free_port()
        with WorkerProcess(bundle.exposed, None, "--metrics-port", str(port)) as worker, open_client() as client:
            model = AutoModelForCausalLM.from_pretrained(bundle.trusted, dtype=torch.bfloat16, trust_remote_code=False)
            with cloven.attach(model, worker.address, look_ahead=0) as session:
                assert isinstance(session, SlipSession)
                return _measured(model, session, rows, rounds, progress, lambda: scrape(client, f"http://127.0.0.1:{port}/metrics"))


def _measured(
    model: Any,
    session: SlipSession,
    rows: int,
    rounds: int,
    progress: Callable[[str, int, int], None],
    worker: Callable[[], Scrape],
) -> ExchangeBench:
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(1e6 * (time.perf_counter() - started))
        return result

    group, offloaded, backend = groups_of(model)[GROUP], session.offloaded[GROUP], select_backend("cpu")
    x = torch.randn(rows, offloaded.columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    w = backend.place(torch.randint(-127, 128, (offloaded.rows, offloaded.columns), dtype=torch.int8))
    blocks = min(LOOKS, rounds)
    each = rounds // blocks

    def some(count: int) -> None:
        before = worker()
        for _ in range(count):
            _pads_for(session, rows, rounds)
            c = _by_hand(group, session, x, timed)
            timed("product", lambda c=c: multiply(backend, c, w))  # type: ignore[misc]
        work = 1e6 * _mean_work(before, worker())
        times.setdefault("worker", []).append(work)
        times.setdefault("wire", []).append(statistics.mean(times[WITH_PRODUCT][-count:]) - work)
        for _ in range(count):
            _pads_for(session, rows, rounds)
            multiply(backend, c, w)  # as above, this call finds the caches as a large matrix leaves them
            timed("whole call", lambda: group.members[0](x))

    for block in range(blocks + 1):
        progress("exchanges", block, blocks + 1)
        if block == 1:
            times.clear()  # the first block warms up
        some(each if block else WARM_UP)
    medians = {name: statistics.median(values) for name, values in times.items()}
    apart = (medians.pop(name) for name in ("worker", "wire", "product", "secret part", "whole call"))
    at_worker, wire, product, secret, whole = apart
    overhead = sum(medians.values()) - medians[WITH_PRODUCT] + wire
    return ExchangeBench(offloaded.columns, rows, blocks * each, backend.name, medians, at_worker, wire, product, secret, overhead, whole)


def _pads_for(session: SlipSession, rows: int, rounds: int) -> None:
    """Have pads for an exchange: made many at once, as sessions make them: what is measured finds the caches as it leaves them."""
    if session.pads[GROUP].ready < 2 * rows:
        session.pads[GROUP].fill(max(2 * rows, min(2 * rows * rounds, MOST_PADS)))


def _mean_work(before: Scrape, after: Scrape) -> float:
    """Seconds of work per exchange between two looks at a worker."""

    def grown(name: str) -> float:
        return (after.total(name) or 0.0) - (before.total(name) or 0.0)

    return grown("cloven_work_seconds_total") / max(1.0, grown("cloven_exchanges_total"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _by_hand(group: SplitGroup, session: SlipSession, x: Tensor, timed: Callable[[str, Callable[[], Any]], Any]) -> Tensor:
    """One exchange, step by step; what was sent. Without the kernels the passes are many."""
    offloaded = session.offloaded[GROUP]
    channel, freivalds = offloaded.shares[0].holder.current(GROUP)
    out = torch.empty(len(x), offloaded.rows, dtype=x.dtype)
    pads: Pads = timed("pads taken", lambda: offloaded.masks.take(len(x)))
    passes = group.passes()
    if passes is not None:
        between = passes.buffers(len(x))
        timed("secret part", lambda: group.secret_part(x, between.total))
        finite = timed("turned, encoded, masked", lambda: passes.ask(x, scale_of(offloaded.bounds), pads.masks(x.shape), between))
        assert finite  # or nothing is in c
        z = timed(WITH_PRODUCT, lambda: channel.multiply(group.name, GROUP, between.c, offloaded.rows, lambda: None, between.z))
        image = pads.images(z.shape)

        def told() -> None:
            freivalds.check_by(lambda test: passes.told(test, z, image, between, out), len(x), group.name)

        timed("checked, unmasked, decoded, turned back, added, rounded", told)
        return between.c.clone()
    total, (to_worker, back) = torch.empty(len(x), offloaded.rows), group.stages()
    timed("secret part", lambda: group.secret_part(x, total))
    turned = timed("turned", lambda: turn(x.double().numpy(), *to_worker, leading=False))
    x_int, alpha = timed("encoded", lambda: encode(torch.from_numpy(turned), offloaded.bounds))
    c = timed("masked", lambda: pads.mask(x_int))
    z = timed(WITH_PRODUCT, lambda: channel.multiply(group.name, GROUP, c, offloaded.rows, lambda: None))
    timed("checked", lambda: freivalds.check(c, z, group.name))
    y_int = timed("unmasked", lambda: pads.unmask(z))
    y = timed("decoded", lambda: decode(y_int, alpha))
    timed("turned back, added, rounded", lambda: turn_onto(y.numpy(), back, total, out))
    return torch.as_tensor(c)
