"""A SLIP session: one worker, fresh secrets, pads made ahead.

Opening a session, for every group:
    1. read the trusted side's own copy of the exposed matrix, and hash the bytes
    2. draw S, compute S·W from those bytes
    3. set up pads under a fresh key
then ask the worker whether it holds the bundle, and start the look-ahead.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cloven.bundle.exposed_copy import ExposedCopy
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.errors import BadBundle, ClovenError
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.field.products import PlacedMatrix
from cloven.field.selection import select_backend
from cloven.masks.look_ahead import LookAhead
from cloven.masks.one_time import OneTimePads, PadKey
from cloven.model.runtime import MOST_PADS_AHEAD, RuntimeOptions, Session, open_channel
from cloven.offload import OffloadedMatrix
from cloven.slip.layer import Product, SplitGroup
from cloven.slip.split_model import groups_of
from cloven.telemetry import Telemetry


class SlipSession(Session):
    """A session whose pads can be made in advance, all at once, for measurements: see `Session`."""

    pads: list[OneTimePads]
    offloaded: list[OffloadedMatrix]
    look_ahead: LookAhead

    def make_pads(self, rows: int) -> None:
        """Make pads until every group has `rows` ready."""
        for source in self.pads:
            self.guarded(lambda source=source: source.fill(rows))  # type: ignore[misc]

    def pad_seconds_per_row(self) -> float:
        """Seconds that the pads of one row took, summed over all groups."""
        return sum(source.seconds / source.made for source in self.pads if source.made)


def open_session(model: nn.Module, options: RuntimeOptions) -> SlipSession:
    """Connect a loaded split model to a worker.

    Raises:
        BadBundle, ForeignBundle, TamperedBundle: the copy of exposed/ is missing, of another bundle, or altered.
        PeerRefused, WorkerUnreachable, WorkerTimeout: the worker.
    """
    groups = groups_of(model)
    trusted = getattr(model, "cloven_folder", None)
    if not isinstance(trusted, Path):
        raise BadBundle("this model was not loaded from OUT/trusted")
    manifest = TrustedManifest.read(trusted)
    if len(manifest.exposed.groups) != len(groups):
        raise BadBundle(f"{trusted}: config.json and manifest.json list different numbers of groups")
    copy = ExposedCopy(options.exposed or trusted.parent / "exposed", manifest)
    telemetry = Telemetry()
    channel = open_channel(options, manifest.bundle, telemetry)
    try:
        channel.hello()
        telemetry.reset()
        session = SlipSession(model, channel, telemetry)
    except BaseException:
        channel.close()
        raise
    try:
        _connect_groups(session, groups, copy, manifest, options)
    except BaseException:
        session.close("it could not be opened")
        raise
    return session


@torch.no_grad()
def _connect_groups(
    session: SlipSession, groups: list[SplitGroup], copy: ExposedCopy, manifest: TrustedManifest, options: RuntimeOptions
) -> None:
    backend = select_backend("cpu")
    key = PadKey()
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "freivalds")
    session.on_close(key.destroy)
    session.pads, session.offloaded = [], []
    for group, record, bounds in zip(groups, manifest.exposed.groups, manifest.bounds, strict=True):
        w = backend.place(copy.verified(group.index))  # 1
        freivalds = Freivalds(stream.residues(CHECKS, record.rows), backend, w)  # 2

        def lend(index: int = group.index) -> PlacedMatrix:
            return backend.place(copy.mapped(index))

        pads = OneTimePads(group.index, key, lend, backend, freivalds, group.name)  # 3
        offloaded = OffloadedMatrix(group.name, group.index, record.rows, record.columns, bounds, pads, freivalds, session.channel)
        group.attach(_guarded_product(session, offloaded))
        session.pads.append(pads)
        session.offloaded.append(offloaded)
        session.on_close(pads.forget)
        session.on_close(lambda group=group: group.attach(_ended_product(session)))  # type: ignore[misc]
    session.on_close(session.pads.clear)
    session.on_close(session.offloaded.clear)
    session.look_ahead = LookAhead(session.pads, _rows_ahead(manifest, options), lambda error: _end(session, error))
    session.on_close(session.look_ahead.stop)


def _guarded_product(session: Session, offloaded: OffloadedMatrix) -> Product:
    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        return session.guarded(lambda: offloaded.product(x, meanwhile))

    return product


def _ended_product(session: Session) -> Product:
    """What the groups call after the session: it says why there is none, and holds no secrets."""

    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        return session.guarded(lambda: x)  # raises

    return product


def _rows_ahead(manifest: TrustedManifest, options: RuntimeOptions) -> int:
    if options.look_ahead is not None:
        return options.look_ahead
    bytes_per_row = 4 * sum(group.rows + group.columns for group in manifest.exposed.groups)
    return max(1, min(MOST_PADS_AHEAD, options.pad_bytes // bytes_per_row))


def _end(session: Session, error: ClovenError) -> None:
    session.close(str(error))
