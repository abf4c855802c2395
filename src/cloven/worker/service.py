"""The worker's service: answers `multiply` requests of any number of sessions, and lives on whatever it receives.

It keeps no state between requests, so a restarted worker goes on at once, and a repeated request gets the same answer. It logs counts
only. Its transport key is its only secret. One request with a header is computed at a time, with all threads of the machine; lanes that are
served without headers share these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq

from cloven.bundle.placement import parse_part
from cloven.wire.keys import WorkerKeys
from cloven.wire.lane_service import Handover
from cloven.wire.limits import rows_per_exchange
from cloven.wire.messages import WORKER, Message, Multiply, Product, pack, residue_frame, residues_of_frame, unpack
from cloven.wire.schema import Hello, MalformedMessage, Serve, Serving, Welcome
from cloven.wire.server import Frame, Server
from cloven.worker.lane_products import LaneProducts
from cloven.worker.matrices import Matrices
from cloven.worker.transcript import Transcript


class Worker(Server):
    """Serves one exposed bundle at one address.

    Args:
        folder: OUT/exposed.
        address: ipc://PATH or tcp://HOST:PORT; inproc://NAME with a shared `context`, for tests.
        keys: the worker's folder of keys; needed for tcp.
        device: "cpu", "cuda" or "cuda:N".
        part: what this worker holds of the bundle, for example "layers:1/2"; "" for everything.
        insecure_plain_tcp: listen on tcp without keys, with a banner.
        record: write every row received to this file, anew, for audits: what a curious worker would keep.

    Guarantee to its operator: malformed requests get an error answer; message sizes and queues are bounded (not the
    number of frames in a message, which ZeroMQ cannot bound); over CURVE only listed keys
    connect, over ipc only this user. It is the untrusted party: nothing is guaranteed to anyone else.
    """

    def __init__(
        self,
        folder: str | Path,
        address: str,
        *,
        keys: WorkerKeys | None = None,
        device: str = "cpu",
        insecure_plain_tcp: bool = False,
        record: Path | None = None,
        part: str = "",
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        super().__init__("worker", address, WORKER, keys=keys, insecure_plain_tcp=insecure_plain_tcp, context=context)
        self.part = parse_part(part)
        self.matrices = Matrices.load(Path(folder), device, self.part)
        self._transcript = Transcript(record) if record is not None else None
        self._products = LaneProducts.of(self.matrices.backend, self.matrices.groups) if record is None else None
        self.bind()

    def close(self) -> None:
        """Close the socket and the transcript; no more connections."""
        super().close()
        if self._transcript is not None:
            self._transcript.close()

    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        """See `Server.answer`."""
        del peer  # whoever is admitted is served alike
        message, payload = unpack(frames)
        self._require_bundle(message)
        if isinstance(message, Hello):
            self._request.hellos = 1
            return [pack(Welcome(message.id, self.matrices.bundle, len(self.matrices.groups), str(self.part)))]
        if isinstance(message, Serve):
            return self._serving(message.id)
        if not isinstance(message, Multiply) or payload is None:
            raise MalformedMessage("malformed", "this message is an answer, not a request", message.id)
        if message.group >= len(self.matrices.groups):
            raise MalformedMessage("group", f"no group {message.group}: there are {len(self.matrices.groups)}", message.id)
        w = self.matrices.groups[message.group]
        if w is None:
            raise MalformedMessage("group", f"group {message.group} is not in this worker's part, {self.part}", message.id)
        if message.rows > rows_per_exchange(w.columns, w.rows):
            raise MalformedMessage("size", f"{message.rows} rows at once are too many for this group", message.id)
        c = residues_of_frame(payload, message.rows, w.columns, message.id)
        if self._transcript is not None:
            self._transcript.append(message.group, c)
        z = self.matrices.multiply(message.group, c)
        self._request.rows = message.rows
        return [pack(Product(message.id, message.rows)), residue_frame(z)]

    def _serving(self, request: int) -> list[Frame]:
        def no() -> list[Frame]:
            return [pack(Serving(request, 0))]

        products = self._products
        if products is None:
            return no()
        return Handover([pack(Serving(request, products.most))], lambda lane, going_on: products.serve(lane, going_on, self.counts), no)

    def _require_bundle(self, message: Message) -> None:
        if isinstance(message, Hello | Multiply | Serve) and message.bundle != self.matrices.bundle:
            raise MalformedMessage("bundle", f"this worker holds bundle {self.matrices.bundle.hex()}", message.id)
