"""A SLIP session: its workers, fresh secrets, and pads, made ahead in memory or read from a store.

Opening a session:
    1. ask the workers whether they hold the bundle, and which part of it
   for every group
    2. read the trusted side's own copy of the exposed matrix, and hash the bytes
    3. draw S for every worker, compute S·W from those bytes; with a store: take both from it, without 2
    4. set up pads: under a fresh key, or from the store
then start the look-ahead.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cloven.bundle.exposed_copy import ExposedCopy
from cloven.bundle.placement import WHOLE, Part
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.errors import BadBundle, ClovenError, VerificationFailed
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.native.exchange import FusedExchange
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.field.products import PlacedMatrix
from cloven.field.selection import select_backend
from cloven.masks.look_ahead import LookAhead
from cloven.masks.one_time import OneTimePads, PadKey
from cloven.masks.pad_store import AHEAD, PadStore
from cloven.masks.stored_pads import StoredPads
from cloven.masks.waiting import WaitingPads
from cloven.model.runtime import MOST_PADS_AHEAD, RuntimeOptions, Session, open_channel
from cloven.offload import OffloadedMatrix, Share
from cloven.slip.constant_rows import ConstantRows
from cloven.slip.layer import Fused, Product, SplitGroup
from cloven.slip.split_model import groups_of
from cloven.slip.workers import Workers
from cloven.telemetry import Telemetry

_T = TypeVar("_T")


class SlipSession(Session):
    """A session whose pads can be made in advance, all at once, for measurements: see `Session`."""

    pads: list[WaitingPads]
    offloaded: list[OffloadedMatrix]
    look_ahead: LookAhead
    store_left: Callable[[], int | None] = staticmethod(lambda: None)

    def pads_ready(self) -> int | None:
        """See `Session.pads_ready`."""
        return min((source.ready for source in list(self.pads)), default=None)

    def pads_stored(self) -> int | None:
        """See `Session.pads_stored`; None also where the store cannot be read just now."""
        with contextlib.suppress(ClovenError):
            return self.store_left() if not self.closed else None
        return None

    def make_pads(self, rows: int) -> None:
        """Make pads until every group has `rows` ready."""
        for source in self.pads:
            self.guarded(lambda source=source: source.fill(rows))  # type: ignore[misc]

    def pad_seconds_per_row(self) -> float:
        """Seconds that the pads of one row took, summed over all groups."""
        return sum(source.seconds / source.made for source in self.pads if source.made)


def open_session(model: nn.Module, options: RuntimeOptions) -> SlipSession:
    """Connect a loaded split model to its workers.

    Raises:
        BadBundle, ForeignBundle, TamperedBundle: the copy of exposed/ is missing, of another bundle, or altered.
        StoreUnusable: the pad store is not to be trusted.
        PeerRefused, WorkerUnreachable, WorkerTimeout: a worker.
    """
    groups = groups_of(model)
    trusted = getattr(model, "cloven_folder", None)
    if not isinstance(trusted, Path):
        raise BadBundle("this model was not loaded from OUT/trusted")
    manifest = TrustedManifest.read(trusted)
    if len(manifest.exposed.groups) != len(groups):
        raise BadBundle(f"{trusted}: config.json and manifest.json list different numbers of groups")
    telemetry = Telemetry()
    secrets_of_session = _Secrets(trusted, manifest, options)
    try:
        workers = Workers(
            options.address,
            options.placement,
            manifest.exposed.groups,
            lambda address, patience: open_channel(options, manifest.bundle, telemetry, address=address, patience=patience),
            secrets_of_session.check,
        )
    except BaseException:
        secrets_of_session.destroy()
        raise
    telemetry.reset()
    session = SlipSession(model, workers, telemetry)
    session.on_close(secrets_of_session.destroy)
    session.store_left = secrets_of_session.store_left
    try:
        _connect_groups(session, groups, workers, secrets_of_session)
    except BaseException:
        session.close("it could not be opened")
        raise
    return session


class _Secrets:
    """Where a session's pads and checks come from: the copy of exposed/ with fresh keys, or a store."""

    def __init__(self, trusted: Path, manifest: TrustedManifest, options: RuntimeOptions) -> None:
        self.manifest, self._options = manifest, options
        self.constant_rows = options.constant_rows
        self._backend = select_backend("cpu")
        self._key = PadKey()
        self._stream = SecretStream(secrets.token_bytes(KEY_BYTES), "freivalds")
        folder = options.exposed or trusted.parent / "exposed"
        wanted = options.pads is None or options.on_empty == "compute" or options.placement == "rows"
        self._copy = ExposedCopy(folder, manifest) if wanted else None
        self._store = PadStore(options.pads, manifest.bundle) if options.pads is not None else None  # last: nothing fails after it

    def __repr__(self) -> str:
        return "_Secrets(<secret>)"

    def matrix(self, group: int) -> PlacedMatrix:
        """W [N, K] of verified bytes."""
        assert self._copy is not None
        return self._backend.place(self._copy.verified(group))

    def check(self, worker: str, group: int, part: Part) -> Freivalds:
        """The check of one worker's answers: S is drawn for it alone."""
        if self._store is not None and part.kind != "rows":
            return self._store.freivalds(self._store.check_number(worker), group)
        w = self.matrix(group)
        rows = part.rows(group, self.manifest.exposed.groups)
        if len(rows) < w.rows:
            w = self._backend.place(w.codes[rows.start : rows.stop, : w.columns])
        return Freivalds(self._stream.residues(CHECKS, len(rows)), self._backend, w)

    def rejected(self, worker: str) -> None:
        """Drop a worker's S for good: it is never used again, by any session with the store."""
        if self._store is not None:
            self._store.drop_check(worker)

    def pads(self, group: SplitGroup, checks: list[Freivalds], ended: Callable[[], bool]) -> WaitingPads:
        """The pads of a group; checked by the only worker's check of all rows where there is one, and no store."""
        if self._store is None:
            own = checks[0] if len(checks) == 1 else self.check("", group.index, WHOLE)
            return OneTimePads(group.index, self._key, self._lent(group.index), self._backend, own, group.name)
        spare = None
        if self._options.on_empty == "compute":
            w = self.matrix(group.index)
            check = Freivalds(self._stream.residues(CHECKS, w.rows), self._backend, w)
            spare = OneTimePads(group.index, self._key, self._lent(group.index), self._backend, check, group.name).fresh
        return StoredPads(self._store, group.index, self._store.freivalds(0, group.index), group.name, self._options.on_empty, spare, ended)

    def store_left(self) -> int | None:
        """Pads left in the store, of the group that has fewest; None where there is no store.

        Raises:
            StoreUnusable: it cannot be read.
        """
        return self._store.fewest_left() if self._store is not None else None

    def rows_ahead(self) -> int:
        """Rows of pads to keep ready."""
        if self._options.look_ahead is not None:
            return self._options.look_ahead
        bytes_per_row = 4 * sum(group.rows + group.columns for group in self.manifest.exposed.groups)
        most = MOST_PADS_AHEAD if self._store is None else AHEAD
        return max(1, min(most, self._options.pad_bytes // bytes_per_row))  # of pads, whether their rows are padding or not

    def destroy(self) -> None:
        """Overwrite the keys."""
        self._key.destroy()
        if self._store is not None:
            with contextlib.suppress(ClovenError):
                self._store.give_back()
                self._store.drop_used_files()
            self._store.close()

    def _lent(self, group: int) -> Callable[[], PlacedMatrix]:
        assert self._copy is not None
        copy = self._copy
        return lambda: self._backend.place(copy.mapped(group))


@torch.no_grad()
def _connect_groups(session: SlipSession, groups: list[SplitGroup], workers: Workers, given: _Secrets) -> None:
    session.pads, session.offloaded = [], []
    for group, record, bounds in zip(groups, given.manifest.exposed.groups, given.manifest.bounds, strict=True):
        held = workers.shares(group.index)
        shares = tuple(Share(rows, seat) for rows, seat in held)
        checks = [seat.freivalds(group.index) for _, seat in held]  # 2, 3
        pads = given.pads(group, checks, lambda: session.closed)  # 4
        offloaded = OffloadedMatrix(group.name, group.index, record.rows, record.columns, bounds, pads, shares)
        sender = ConstantRows(offloaded, given.constant_rows) if given.constant_rows else offloaded
        group.attach(*_guarded_product(session, sender, given))
        session.pads.append(pads)
        session.offloaded.append(offloaded)
        session.on_close(pads.forget)
        session.on_close(lambda group=group: group.attach(_ended_product(session)))  # type: ignore[misc]
    session.on_close(session.pads.clear)
    session.on_close(session.offloaded.clear)
    session.look_ahead = LookAhead(session.pads, given.rows_ahead(), session.fail)
    session.on_close(session.look_ahead.stop)


def _guarded_product(session: Session, offloaded: OffloadedMatrix | ConstantRows, given: _Secrets) -> tuple[Product, Fused]:
    def rejecting(work: Callable[[], _T]) -> _T:
        try:
            return work()
        except VerificationFailed as error:
            try:
                if error.worker:
                    given.rejected(error.worker)
            except ClovenError as kept:
                raise VerificationFailed(f"{error}; the secret that it met cannot be dropped: {kept}") from error
            raise

    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        return session.guarded(lambda: rejecting(lambda: offloaded.product(x, meanwhile)))

    def fused(x: Tensor, passes: FusedExchange, out: Tensor, meanwhile: Callable[[Tensor], None]) -> bool:
        return session.guarded(lambda: rejecting(lambda: offloaded.fused(x, passes, out, meanwhile)))

    return product, fused


def _ended_product(session: Session) -> Product:
    """What the groups call after the session: it says why there is none, and holds no secrets."""

    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        return session.guarded(lambda: x)  # raises

    return product
