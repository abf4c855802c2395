"""Run time: where the worker is, and the session that connects a loaded model to it."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from cloven.errors import BadInput, ClovenError, PadMisuse, SecurityError, SessionClosed, VerificationFailed
from cloven.telemetry import LayerStatistics, Telemetry, log_event
from cloven.wire.channel import Channel, checked_rtt
from cloven.wire.keys import trusted_keys
from cloven.wire.limits import DEFAULT_TIMEOUT

_T = TypeVar("_T")
DEFAULT_PAD_BYTES = 256 * 2**20
MOST_PADS_AHEAD = 256
CLOSED = "it was closed"
ON_EMPTY = ("fail", "wait", "compute")


@dataclass(frozen=True)
class RuntimeOptions:
    """How to reach the worker, or the enclave.

    Args:
        address: ipc://PATH or tcp://HOST:PORT; for SLIP several, see `placement`.
        placement: how several workers share a SLIP bundle: "replicas" (all hold everything; the first that answers is used, the others
            take over when it is gone), "layers" or "rows" (each holds a part, `cloven worker --part`; commas separate a part's replicas).
        pads: a pad store, from `cloven pads fill`; None: pads are made in memory.
        on_empty: when the store has run dry: "fail", "wait", or "compute" pads in memory.
        keys: the trusted side's folder of keys, for tcp.
        exposed: the trusted side's own copy of exposed/; the sibling of trusted/ if not given.
        timeout: seconds that an answer may take.
        look_ahead: rows of pads to make in advance per group; None: as many as fit in `pad_bytes`, at most 256; 0: none.
        pad_bytes: memory for pads made in advance.
        insecure_plain_tcp: allow tcp without keys.
        pin: the fingerprint that the bundle must have (private LoRA).
        backend: "lwe", or "fhe": standard homomorphic encryption, for comparison (private LoRA).
        insecure_fhe_semi_honest: allow the fhe backend.
        constant_rows: rows of every exchange (SLIP): fewer are padded, more go in several; 0: as many as there are.
        simulated_rtt: for measurements: seconds by which every exchange takes longer; `session.channel.simulated_rtt` changes it later.
    """

    address: str
    keys: Path | None = None
    exposed: Path | None = None
    timeout: float = DEFAULT_TIMEOUT
    look_ahead: int | None = None
    pad_bytes: int = DEFAULT_PAD_BYTES
    insecure_plain_tcp: bool = False
    pin: str | None = None
    backend: str = "lwe"
    placement: str = "replicas"
    pads: Path | None = None
    on_empty: str = "fail"
    insecure_fhe_semi_honest: bool = False
    simulated_rtt: float = 0.0
    constant_rows: int = 0

    def __post_init__(self) -> None:
        if self.constant_rows < 0:
            raise BadInput("constant_rows: give 0 or more")
        if self.on_empty not in ON_EMPTY:
            raise BadInput(f"on_empty {self.on_empty!r}: choose one of {', '.join(ON_EMPTY)}")
        if self.backend not in ("lwe", "fhe"):
            raise BadInput(f"backend {self.backend!r}: choose lwe or fhe")
        if self.backend == "fhe" and not self.insecure_fhe_semi_honest:
            raise BadInput("the fhe backend gives the adapter to a client that cheats: it needs insecure_fhe_semi_honest on both sides")
        if (self.look_ahead is not None and self.look_ahead < 0) or self.pad_bytes < 0:
            raise BadInput("look_ahead and pad_bytes: give 0 or more")
        checked_rtt(self.simulated_rtt)

    def with_timeout(self, timeout: float) -> RuntimeOptions:
        """The same with another timeout."""
        return replace(self, timeout=timeout)


def open_channel(options: RuntimeOptions, bundle: str, telemetry: Telemetry, address: str | None = None, **more: Any) -> Channel:
    """A connection as the options say.

    Args:
        bundle: the bundle's id, hexadecimal.
        address: one of several; None: the only one.
        more: `schema`, `peer` and `spin` of `Channel`.
    """
    return Channel(
        address or options.address,
        bytes.fromhex(bundle),
        keys=trusted_keys(options.keys) if options.keys is not None else None,
        timeout=options.timeout,
        insecure_plain_tcp=options.insecure_plain_tcp,
        telemetry=telemetry,
        simulated_rtt=options.simulated_rtt,
        **more,
    )


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


class Connection(Protocol):
    """What a session needs of a channel, or of several."""

    @property
    def address(self) -> object:
        """Where the other side is."""

    def close(self) -> None:
        """End it."""


class Session:
    """A model's connection to its worker: a context manager with statistics.

    Guarantee: after the first failed verification the session is closed and its secrets are dropped; calls then raise SessionClosed,
    and only a new `attach`, the operator's decision, reconnects. Not hidden from the worker: rows, sizes and times of exchanges.
    `failure` is the error that ended the session, where one did.
    """

    def __init__(self, model: nn.Module, channel: Connection, telemetry: Telemetry) -> None:
        self.channel: Any = channel
        self.telemetry = telemetry
        self.failure: ClovenError | None = None
        self._on_close: list[Callable[[], None]] = []
        self._reason: str | None = None
        self._closing = threading.Lock()
        previous = _sessions.get(model)
        if previous is not None:
            previous.close()
        _sessions[model] = self
        log_event(logging.INFO, "session_opened", "a session with %s", channel.address, peer=str(channel.address))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.channel.address}, {'closed' if self._reason else 'open'})"

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._reason is not None

    def statistics(self) -> dict[str, LayerStatistics]:
        """Exchanges, rows, message bytes each way and seconds of waiting, by layer."""
        return self.telemetry.layers()

    def pads_ready(self) -> int | None:
        """Rows of pads or masks that are ready, of the group that has fewest; None where there are none."""
        return None

    def pads_stored(self) -> int | None:
        """Rows left in the pad store, of the group that has fewest; None where there is none."""
        return None

    def on_close(self, action: Callable[[], None]) -> None:
        """Run an action when the session ends."""
        self._on_close.append(action)

    def guarded(self, operation: Callable[[], _T]) -> _T:
        """Run an operation of the open session; a security failure ends the session before it is raised."""
        if self._reason is not None:
            raise self._ended()
        try:
            return operation()
        except PadMisuse as error:
            if self._reason is not None:  # another thread has ended the session meanwhile, and destroyed the keys: that is why
                raise self._ended() from error
            self.fail(error)
            raise
        except SecurityError as error:
            self.fail(error)
            raise

    def _ended(self) -> SessionClosed:
        return SessionClosed(f"the session with {self.channel.address} has ended: {self._reason}")

    def fail(self, error: ClovenError) -> None:
        """End the session because of an error, the first of which is kept; a failed verification is counted and logged."""
        if isinstance(error, VerificationFailed):
            self.telemetry.verification_failed()
            log_event(logging.INFO, "verification_failed", "%s", error, peer=error.worker)
        if self._reason is None:
            self.failure = self.failure or error
        self.close(str(error))

    def close(self, reason: str = CLOSED) -> None:
        """End the session; secrets are dropped, the model can be attached again."""
        with self._closing:
            if self._reason is not None:
                return
            self._reason = reason
        with contextlib.ExitStack() as stack:  # runs in reverse order, and all of them whatever one does
            for action in self._on_close:
                stack.callback(action)
            stack.callback(self.channel.close)  # first: nothing is sent while keys are being destroyed
        self._on_close.clear()
        log_event(logging.INFO, "session_closed", "the session with %s has ended: %s", self.channel.address, reason, reason=reason)


def session_of(model: nn.Module) -> Session | None:
    """The model's session, if it has one."""
    return _sessions.get(model)
