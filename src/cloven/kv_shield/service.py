"""The enclave as a server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor

from cloven.kv_shield.enclave import Enclave
from cloven.kv_shield.messages import (
    DTYPES,
    ENCLAVE,
    MAX_BLOCK_BYTES,
    TAG_BYTES,
    Close,
    Closed,
    Key,
    Keyed,
    Label,
    Open,
    Opened,
    Restore,
    Restored,
    Seal,
    Sealed,
    SealEnd,
    SealEnded,
    Step,
    Stepped,
    Unseal,
    Unsealed,
    frame_of,
    tensor_of,
)
from cloven.metrics.catalog import Sample
from cloven.telemetry import log_event
from cloven.wire.keys import WorkerKeys
from cloven.wire.lane import Lane
from cloven.wire.lane_service import Handover
from cloven.wire.schema import Hello, MalformedMessage, Welcome
from cloven.wire.server import Frame, Server

_POSITION_BYTES = 4


class EnclaveServer(Server):
    """Serves the keys of one bundle at one address.

    Args:
        folder: OUT/trusted.
        address, keys, insecure_plain_tcp, context: see `Server`.

    Guarantee: see `Enclave`.
    """

    def __init__(
        self,
        folder: str | Path,
        address: str,
        *,
        keys: WorkerKeys | None = None,
        insecure_plain_tcp: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        super().__init__("enclave", address, ENCLAVE, keys=keys, insecure_plain_tcp=insecure_plain_tcp, context=context)
        self.enclave = Enclave(Path(folder))
        self._opened = 0
        self.bind()

    def idle(self) -> bool:
        """Draw keys ahead."""
        return self.enclave.draw_ahead()

    def samples(self) -> Iterator[Sample]:
        """See `Server.samples`."""
        yield from super().samples()
        yield Sample("cloven_tokens_total", float(self.counts.total().tokens))
        yield Sample("cloven_enclave_sessions", float(self.enclave.sessions))
        yield Sample("cloven_enclave_sessions_opened_total", float(self._opened))

    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        """See `Server.answer`."""
        message, payload = ENCLAVE.unpack(frames)
        if message.__class__ not in (Hello, Open, Key, Restore, Step, Seal, SealEnd, Unseal, Close):
            raise MalformedMessage("malformed", "this message is an answer, not a request", message.id)
        if message.bundle != self.enclave.bundle:
            raise MalformedMessage("bundle", f"this enclave holds the keys of bundle {self.enclave.bundle.hex()}", message.id)
        try:
            return self._answer(message, payload, peer)
        except MalformedMessage as error:
            error.request = message.id
            raise

    def _sealing(self, message: Seal | Unseal, payload: memoryview, peer: str) -> list[Frame]:
        vault = self.enclave.vault(message.session, peer)
        label = Label(message.layer, message.part, message.block, tuple(message.shape), message.dtype)
        if payload.nbytes > MAX_BLOCK_BYTES + TAG_BYTES:
            raise MalformedMessage("size", f"a block of {payload.nbytes} bytes, at most {MAX_BLOCK_BYTES}")
        if isinstance(message, Seal):
            ciphertext = vault.seal(label, payload)
            return [ENCLAVE.pack(Sealed(message.id, vault.epoch)), ciphertext]
        plain = vault.unseal(label, message.epoch, payload)
        return [ENCLAVE.pack(Unsealed(message.id, vault.left)), plain]

    def _step(self, message: Step, positions: Tensor, peer: str) -> list[Frame]:
        step = self.enclave.begin(message.session, message.first, positions, DTYPES[message.dtype], peer)
        if step is None:
            return [ENCLAVE.pack(Stepped(message.id, 0))]

        def then(lane: Lane, going_on: Callable[[], bool]) -> None:
            try:
                step.serve(lane, going_on, self.counts)
            finally:
                otherwise()

        def otherwise() -> list[Frame]:
            with self._one_at_a_time:
                self.enclave.end(step)
            return [ENCLAVE.pack(Stepped(message.id, 0))]

        return Handover([ENCLAVE.pack(Stepped(message.id, len(step.calls)))], then, otherwise)

    def _tell(self, event: str, peer: str, sequences: int = 0) -> None:
        """The name of a session is its holder's, and stays out of the log."""
        opened = event == "session_opened"
        message = "a session of %s was opened, there are %d" if opened else "a session of %s was closed, there are %d"
        fields = {"sequences": sequences} if opened else {}
        log_event(logging.INFO, event, message, peer or "a peer", self.enclave.sessions, peer=peer, open=self.enclave.sessions, **fields)

    def _answer(self, message: Any, payload: memoryview | None, peer: str) -> list[Frame]:
        if isinstance(message, Hello):
            self._request.hellos = 1
            return [ENCLAVE.pack(Welcome(message.id, self.enclave.bundle, self.enclave.layers))]
        if isinstance(message, Open):
            name = self.enclave.open(message.sequences, peer)
            self._opened += 1
            self._tell("session_opened", peer, message.sequences)
            return [ENCLAVE.pack(Opened(message.id, name))]
        if isinstance(message, Close):
            self.enclave.close(message.session, peer)
            self._tell("session_closed", peer)
            return [ENCLAVE.pack(Closed(message.id))]
        if isinstance(message, SealEnd):
            epoch = self.enclave.vault(message.session, peer).end(message.blocks)
            return [ENCLAVE.pack(SealEnded(message.id, epoch))]
        assert payload is not None  # the schema says so
        if isinstance(message, Seal | Unseal):
            return self._sealing(message, payload, peer)
        if message.dtype not in DTYPES:
            raise MalformedMessage("malformed", f"KV-Shield computes in {', '.join(DTYPES)}")
        rows = message.batch * message.rows
        dtype, place = DTYPES[message.dtype], (message.batch, message.rows)
        if isinstance(message, Step):
            return self._step(message, tensor_of(payload, place, torch.int32), peer)
        if isinstance(message, Key):
            split = _POSITION_BYTES * message.batch * message.rows
            positions = tensor_of(payload[:split], place, torch.int32)
            x = tensor_of(payload[split:], (*place, self.enclave.widths_in(message.layer)), dtype)
            keyed = self.enclave.key(message.layer, x, positions, message.session, message.first, peer)
            self._request.rows = rows
            return [ENCLAVE.pack(Keyed(message.id, *place)), frame_of(keyed)]
        a = tensor_of(payload, (*place, self.enclave.width_keyed(message.layer)), dtype)
        restored = self.enclave.restore(message.layer, a, message.session, peer)
        self._request.rows = rows
        self._request.tokens = rows if message.layer == self.enclave.layers - 1 else 0
        return [ENCLAVE.pack(Restored(message.id, *place)), frame_of(restored)]
