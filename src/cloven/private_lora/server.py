"""The adapter server: answers queries with the product of secret weights, rounded and metered.

Per query, in this order:
    1. check the message: bundle, group, size, residues
    2. charge the ledger, for this client and for all; durable before anything is computed
    3. z = W' c mod p
    4. the highest b bits of every residue, and nothing else, leave

Guarantee to the owner: at most N·b bits per row leave, as often as the ledger allows; the same query has the same answer. Not promised:
that the weights stay secret from whoever is allowed about 8·d/b rows. Guarantee to the client: none; the content of a query is LWE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import zmq
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cloven.bundle.verification import verify_bytes
from cloven.errors import BadBundle, BadInput, BudgetExhausted, LedgerUnusable
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.metrics.catalog import Sample
from cloven.private_lora.fhe import BANNER, FheMatrix
from cloven.private_lora.fhe import context as context_of_bfv
from cloven.private_lora.lane_answers import LaneAnswers
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import SERVER_FILE, ServerManifest
from cloven.private_lora.messages import ADAPTER, Answer, Encrypted, EncryptedAnswer, Query, rounded
from cloven.telemetry import logger
from cloven.wire.keys import WorkerKeys
from cloven.wire.lane_service import Handover
from cloven.wire.limits import rows_per_exchange
from cloven.wire.messages import residues_of_frame
from cloven.wire.schema import Hello, MalformedMessage, Serve, Serving, Welcome
from cloven.wire.server import Frame, Server

_NAME = 16  # characters of an adapter's hash, as `cloven ledger` shows it


class ServedAdapter:
    """One OUT/server: its matrices, verified, and its ledger.

    Args:
        folder: OUT/server.
        ledgers: those that are open, by path; bundles of one adapter share one.

    Raises:
        BadBundle, TamperedBundle: the folder.  LedgerUnusable: the ledger.
    """

    def __init__(self, folder: Path, ledgers: dict[Path, Ledger]) -> None:
        self.manifest = ServerManifest.read(folder)
        backend = select_backend("cpu")
        self._backend = backend
        self.matrices = [backend.place(matrix) for matrix in server_matrices(folder, self.manifest)]
        self._encrypted: dict[int, FheMatrix] = {}
        path = self.manifest.ledger_path(folder)
        if path not in ledgers or ledgers[path].adapter != self.manifest.adapter:
            ledgers[path] = Ledger(path, self.manifest.adapter)
        self.ledger = ledgers[path]
        names = [group.name for group in self.manifest.groups]
        self.lane_answers = LaneAnswers.of(backend, self.matrices, names, self.manifest.bits, self.ledger)

    def __repr__(self) -> str:
        return f"ServedAdapter({self.manifest.bundle})"

    def answer(self, group: int, c: Tensor, client: str) -> memoryview:
        """Steps 2 to 4 for residues c int32 [M, D] -> the payload of an answer.

        Raises:
            BudgetExhausted, LedgerUnusable.
        """
        self.ledger.charge(self.manifest.groups[group].name, client, c.shape[0])  # 2
        z = multiply(self._backend, c, self.matrices[group])  # 3
        return rounded(z, self.manifest.bits)  # 4

    def answer_encrypted(self, group: int, query: memoryview, client: str) -> bytes:
        """The fhe backend's steps 2 to 4 for one row. INSECURE: see `fhe`.

        Raises:
            BudgetExhausted, LedgerUnusable, MalformedMessage.
        """
        if group not in self._encrypted:
            w = self.matrices[group]
            self._encrypted[group] = FheMatrix(w.codes[: w.rows, self.manifest.parameters.pad_columns : w.columns])
        encrypted = self._encrypted[group]
        encrypted.require_size(query)
        self.ledger.charge(self.manifest.groups[group].name, client, 1)
        return encrypted.answer(query)


def server_matrices(folder: Path, manifest: ServerManifest) -> list[Tensor]:
    """W' of every group, int8, from the bytes that were hashed.

    Raises:
        BadBundle, TamperedBundle.
    """
    path = folder / SERVER_FILE
    try:
        data = path.read_bytes()
        verify_bytes(data, manifest.files[SERVER_FILE], path)
        tensors = load(data)
    except (OSError, SafetensorError) as error:
        raise BadBundle(f"{path}: cannot be read") from error
    matrices = []
    for index, group in enumerate(manifest.groups):
        matrix = tensors.get(str(index))
        if matrix is None or matrix.dtype != torch.int8 or tuple(matrix.shape) != (group.rows, group.columns) or (matrix == -128).any():
            raise BadBundle(f"{path}: has no int8 matrix [{group.rows}, {group.columns}] for group {index}, as the manifest says")
        matrices.append(matrix)
    return matrices


class AdapterServer(Server):
    """Serves adapters at one address.

    Args:
        folders: OUT/server of one or more bundles.
        address, keys, insecure_plain_tcp, context: see `Server`.
        insecure_fhe_semi_honest: also answer queries of the fhe backend, with a banner: see `fhe`.

    Clients are told apart by their CURVE keys; over ipc all processes of the user are one client.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        address: str,
        *,
        keys: WorkerKeys | None = None,
        insecure_plain_tcp: bool = False,
        insecure_fhe_semi_honest: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        super().__init__("adapter-server", address, ADAPTER, keys=keys, insecure_plain_tcp=insecure_plain_tcp, context=context)
        self.adapters: dict[bytes, ServedAdapter] = {}
        self._ledgers: dict[Path, Ledger] = {}
        self._fhe = insecure_fhe_semi_honest
        if self._fhe:
            context_of_bfv()  # fails now where SEAL is not installed
            logger.warning(BANNER)
        try:
            for folder in folders:
                adapter = ServedAdapter(Path(folder), self._ledgers)
                if self.adapters.setdefault(bytes.fromhex(adapter.manifest.bundle), adapter) is not adapter:
                    raise BadInput(f"{folder}: bundle {adapter.manifest.bundle} is given twice")
            self.bind()
        except BaseException:
            self._close_ledgers()
            raise

    def close(self) -> None:
        """Close the socket, then the ledgers, which get back what was reserved and not answered."""
        super().close()
        self._close_ledgers()

    def samples(self) -> Iterator[Sample]:
        """See `Server.samples`; and what the ledgers say."""
        yield from super().samples()
        for ledger in list(self._ledgers.values()):
            labels = (ledger.adapter[:_NAME],)
            try:
                standing = ledger.standing()
            except LedgerUnusable:
                yield Sample("cloven_ledger_usable", 0.0, labels)
                continue
            yield Sample("cloven_ledger_usable", 1.0, labels)
            yield Sample("cloven_ledger_budget_rows", float(standing.budget), labels)
            yield Sample("cloven_ledger_left_rows", float(standing.left), labels)
            for client, left in standing.clients.items():
                yield Sample("cloven_ledger_client_left_rows", float(left), (*labels, client))

    def _close_ledgers(self) -> None:
        for ledger in self._ledgers.values():
            try:
                ledger.close()
            except LedgerUnusable as error:
                logger.error("%s; the rows reserved for running clients stay charged", error)

    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        """See `Server.answer`."""
        message, payload = ADAPTER.unpack(frames)
        if not isinstance(message, Hello | Serve | Query | Encrypted):
            raise MalformedMessage("malformed", "this message is an answer, not a request", message.id)
        adapter = self.adapters.get(message.bundle)
        if adapter is None:
            raise MalformedMessage("bundle", "this server does not serve that bundle: is the client's half of another version?", message.id)
        if isinstance(message, Hello):
            self._request.hellos = 1
            return [ADAPTER.pack(Welcome(message.id, message.bundle, len(adapter.matrices)))]
        if isinstance(message, Serve):
            return self._serving(adapter.lane_answers, message.id, peer)
        assert payload is not None  # the schema says so
        if message.group >= len(adapter.matrices):
            raise MalformedMessage("group", f"no group {message.group}: there are {len(adapter.matrices)}", message.id)
        try:
            return self._metered(adapter, message, payload, peer)
        except BudgetExhausted as error:
            logger.warning("refused a query of %s for %s: %s", peer or "a client", adapter.manifest.groups[message.group].name, error)
            raise MalformedMessage("budget", str(error), message.id) from error
        except LedgerUnusable as error:
            logger.error("%s", error)
            raise MalformedMessage("ledger", "the adapter's ledger cannot be used, so nothing is answered", message.id) from error
        except MalformedMessage as error:
            error.request = message.id
            raise

    def _serving(self, answers: LaneAnswers | None, request: int, peer: str) -> list[Frame]:
        def no() -> list[Frame]:
            return [ADAPTER.pack(Serving(request, 0))]

        if answers is None:
            return no()
        serve = answers.serve
        return Handover([ADAPTER.pack(Serving(request, answers.most))], lambda lane, going_on: serve(lane, going_on, self.counts, peer), no)

    def _metered(self, adapter: ServedAdapter, message: Query | Encrypted, payload: memoryview, peer: str) -> list[Frame]:
        if isinstance(message, Encrypted):
            if not self._fhe:
                raise MalformedMessage("malformed", "the fhe backend is off: it needs --insecure-fhe-semi-honest at the server")
            ciphertexts = adapter.answer_encrypted(message.group, payload, peer)
            self._request.rows = 1
            return [ADAPTER.pack(EncryptedAnswer(message.id)), ciphertexts]
        w = adapter.matrices[message.group]
        if message.rows > rows_per_exchange(w.columns, w.rows):
            raise MalformedMessage("size", f"{message.rows} rows at once are too many for this group")
        c = residues_of_frame(payload, message.rows, w.columns)  # 1
        answer = adapter.answer(message.group, c, peer)
        self._request.rows = message.rows
        return [ADAPTER.pack(Answer(message.id, message.rows)), answer]
