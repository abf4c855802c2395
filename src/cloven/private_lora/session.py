"""A private-LoRA session at the client: masks made ahead, one connection to the adapter server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from cloven.bundle.verification import verify_bytes
from cloven.errors import BadBundle, BadInput, SessionClosed
from cloven.field.codec import RowBounds
from cloven.field.residues import is_residue
from cloven.field.selection import select_backend
from cloven.masks.look_ahead import LookAhead
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import LweParameters
from cloven.model.runtime import MOST_PADS_AHEAD, RuntimeOptions, Session, open_channel
from cloven.private_lora.base import require_base
from cloven.private_lora.fhe import BANNER, FheClient
from cloven.private_lora.layer import AdaptedGroup, Product, Runs, Watch
from cloven.private_lora.manifest import ClientGroup, ClientManifest, read_client, verify_client
from cloven.private_lora.messages import ADAPTER
from cloven.private_lora.names import CLIENT_FILE, basis_name, hint_name, scales_name
from cloven.private_lora.query import CheckFailed, EncryptedMatrix, RemoteMatrix
from cloven.telemetry import Telemetry, logger
from cloven.wire.channel import Channel

_T = TypeVar("_T")
SPIN_SECONDS = 0.001  # an answer takes less, and waking up from sleep as much again (measured: 19 ms per token without, 12 with)
_LARGEST_SCALE, _NOT_ORTHONORMAL = 2.0**40, 1e-3


class LoraSession(Session):
    """A client's connection to the adapter server: see `Session`.

    Guarantee: the server sees LWE samples only; see `RemoteMatrix`. Not hidden: number, sizes and times of queries. After a failed check of
    the client the session has ended, for one generic reason; the connection stays open until `close`, so that the server is told nothing.
    """

    masks: list[LweMasks]
    remote: list[RemoteMatrix | EncryptedMatrix]
    look_ahead: LookAhead

    def __init__(self, model: nn.Module, channel: Channel, telemetry: Telemetry) -> None:
        super().__init__(model, channel, telemetry)
        self._failed = False

    def guarded(self, operation: Callable[[], _T]) -> _T:
        """See `Session.guarded`."""
        if self._failed:
            raise SessionClosed("a check of the client failed: the session has ended")
        try:
            return super().guarded(operation)
        except CheckFailed as error:
            self._failed, self.failure = True, error
            raise

    def pads_ready(self) -> int | None:
        """See `Session.pads_ready`."""
        return min((source.ready for source in list(self.masks)), default=None)

    def make_masks(self, rows: int) -> None:
        """Make masks until every group has `rows` ready."""
        for source in self.masks:
            source.fill(rows)

    def mask_seconds_per_row(self) -> float:
        """Seconds that the masks of one row took, summed over all groups."""
        return sum(source.seconds / source.made for source in self.masks if source.made)


def client_tensors(folder: Path, manifest: ClientManifest) -> dict[str, Tensor]:
    """The client's tensors, hashed and checked against the manifest: shapes, dtypes, ranges.

    Raises:
        BadBundle, TamperedBundle.
    """
    path = folder / CLIENT_FILE
    try:
        data = path.read_bytes()
        verify_bytes(data, manifest.files.get(CLIENT_FILE, ""), path)
        tensors: dict[str, Tensor] = load(data)
    except (OSError, SafetensorError) as error:
        raise BadBundle(f"{path}: cannot be read") from error
    n = manifest.parameters.n
    for index, group in enumerate(manifest.groups):
        wanted = {hint_name(index): ((group.rows, n), torch.int32), scales_name(index): ((group.rows,), torch.float64)}
        for position, module in enumerate(group.modules):
            wanted[basis_name(index, position)] = ((module.outputs, module.rank), torch.float32)
        for name, (shape, dtype) in wanted.items():
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise BadBundle(f"{path}: {name} is missing, or of another shape than the manifest says")
            if not tensor.isfinite().all() or (dtype == torch.int32 and not is_residue(tensor)):
                raise BadBundle(f"{path}: {name} holds values out of range")
        _require_plausible(tensors, index, group, path)
    return tensors


def _require_plausible(tensors: dict[str, Tensor], index: int, group: ClientGroup, path: Path) -> None:
    """Orthonormal bases and small scales: nothing overflows for some inputs only, which would tell the server about them."""
    scales = tensors[scales_name(index)]
    if float(scales.min()) <= 0 or float(scales.max()) * group.l2 > _LARGEST_SCALE:
        raise BadBundle(f"{path}: {scales_name(index)} holds values out of range")
    for position, module in enumerate(group.modules):
        v = tensors[basis_name(index, position)].double()
        if float((v.t() @ v - torch.eye(module.rank, dtype=torch.float64)).abs().max()) > _NOT_ORTHONORMAL:
            raise BadBundle(f"{path}: {basis_name(index, position)} is no orthonormal basis")


def adapt(
    model: Any,
    client: str | Path,
    address: str | None = None,
    keys: str | Path | None = None,
    *,
    base: str | Path | None = None,
    **options: Any,
) -> LoraSession | None:
    """Adapt a loaded base model: `AutoModelForCausalLM.from_pretrained(BASE)` plus this call.

    Args:
        model: the public base, loaded from its directory or the Hub, in any dtype. The directory is hashed; that the model in memory is
            what is in there is taken for granted.
        client: OUT/client.
        address: the adapter server's; None: attach later with `cloven.attach`.
        keys: the client's folder of keys, made by `cloven keygen`; needed for tcp.
        base: the base's directory, where the model itself does not say.
        options: `pin` (the bundle's fingerprint), `timeout`, `look_ahead`, `pad_bytes`, `backend`, `insecure_…`; see `RuntimeOptions`.

    Returns:
        The session, or None where no address was given.

    Raises:
        ForeignBundle: the base is not the one that the adapter was made for, or the fingerprint is not the pinned one.
        BadBundle, TamperedBundle: the client's half.  WorkerUnreachable, WorkerTimeout, PeerRefused: the server.
    """
    folder = Path(client).expanduser()
    manifest = read_client(folder, options.get("pin"))
    verify_client(folder, manifest)
    require_base(base_folder(base or getattr(model, "name_or_path", "") or manifest.base_name), manifest.base)
    try:
        settings = RuntimeOptions(address or "", Path(keys) if keys is not None else None, **options)
    except TypeError as error:
        raise BadInput(f"cloven.adapt: unknown option among {', '.join(sorted(options))}") from error
    install(model, folder, manifest)
    return open_session(model, settings) if address is not None else None


def base_folder(base: str | Path) -> Path:
    """The directory of the base: given, or of the Hub's cache.

    Raises:
        BadInput: not known, or not there.
    """
    from cloven.model.source import open_source  # imports transformers, which imports this module when cloven registers with it

    if not str(base):
        raise BadInput("the base model is needed: give its directory as `base`, --base or CLOVEN_BASE")
    folder = open_source(base).folder
    assert folder is not None
    return folder


def install(model: Any, folder: Path, manifest: ClientManifest) -> None:
    """Put the adapted groups into a model; they need a session before they run."""
    if getattr(model, "cloven_lora", None) is not None:
        raise BadInput("this model is adapted already: connect it with cloven.attach, or load the base again for another adapter")
    tensors, runs = client_tensors(folder, manifest), Runs()
    groups: list[AdaptedGroup] = []
    try:
        for index, group in enumerate(manifest.groups):
            bases = [tensors[basis_name(index, position)] for position in range(len(group.modules))]
            groups.append(AdaptedGroup(model, index, group, tensors[scales_name(index)], bases, runs))
    except BaseException:
        for done in groups:
            done.remove()
        raise
    Watch(model, [group.name for group in groups], runs)
    model.cloven_scheme, model.cloven_folder, model.cloven_lora = "private-lora", folder, groups
    model.cloven_hints = [tensors[hint_name(index)] for index in range(len(groups))]


def remote_bounds(group: ClientGroup) -> RowBounds:
    """Public bounds on the rows of W: the L1 norm by Cauchy–Schwarz."""
    return RowBounds(int(group.l2 * group.columns**0.5) + 1, float(group.l2))


@torch.no_grad()
def open_session(model: Any, options: RuntimeOptions) -> LoraSession:
    """Connect an adapted model to its server.

    Raises:
        BadBundle: the model is not adapted.  ForeignBundle: the server does not serve the bundle.
        PeerRefused, WorkerUnreachable, WorkerTimeout: the server.
    """
    if options.constant_rows:
        raise BadInput("constant_rows pads exchanges with a SLIP worker: every row is charged to the ledger")
    groups, folder = getattr(model, "cloven_lora", None), getattr(model, "cloven_folder", None)
    if not isinstance(groups, list) or not isinstance(folder, Path):
        raise BadBundle("this model is not adapted: load OUT/client with from_pretrained, or call cloven.adapt")
    manifest = read_client(folder, options.pin)
    telemetry = Telemetry()
    channel = open_channel(options, manifest.bundle, telemetry, schema=ADAPTER, peer="adapter-server", spin=SPIN_SECONDS)
    try:
        if channel.hello() != len(groups):
            raise BadBundle("the adapter server has another number of groups for this bundle")
        keys = FheClient() if options.backend == "fhe" else None
        telemetry.reset()
        session = LoraSession(model, channel, telemetry)
    except BaseException:
        channel.close()
        raise
    try:
        if keys is not None:
            logger.warning(BANNER)
            _connect_encrypted(session, groups, keys)
        else:
            _connect_groups(session, model, groups, manifest, options)
    except BaseException:
        session.close("it could not be opened")
        raise
    return session


def _connect_encrypted(session: LoraSession, groups: list[AdaptedGroup], keys: FheClient) -> None:
    """The fhe backend: no masks, one fresh key pair for the session."""
    session.masks, session.remote = [], []
    for adapted in groups:
        group = adapted.group
        remote = EncryptedMatrix(group.name, adapted.index, group.rows, group.columns, remote_bounds(group), keys, session.channel)
        adapted.attach(_guarded_product(session, remote))
        session.remote.append(remote)


def _connect_groups(
    session: LoraSession, model: Any, groups: list[AdaptedGroup], manifest: ClientManifest, options: RuntimeOptions
) -> None:
    backend, parameters = select_backend("cpu"), manifest.parameters
    session.masks, session.remote = [], []
    for adapted, hint in zip(groups, model.cloven_hints, strict=True):
        columns = parameters.pad_columns + adapted.group.columns
        masks = LweMasks(hint, columns, parameters, backend)
        remote = remote_matrix(adapted.index, adapted.group, manifest.bits, parameters, masks, session.channel)
        adapted.attach(_guarded_product(session, remote))
        session.masks.append(masks)
        session.remote.append(remote)
        session.on_close(masks.forget)
    session.on_close(session.masks.clear)
    bytes_per_row = 4 * sum(parameters.pad_columns + adapted.group.columns + adapted.group.rows for adapted in groups)
    fitting = max(1, min(MOST_PADS_AHEAD, options.pad_bytes // bytes_per_row))
    ahead = options.look_ahead if options.look_ahead is not None else fitting
    session.look_ahead = LookAhead(session.masks, ahead, session.fail)
    session.on_close(session.look_ahead.stop)


def remote_matrix(index: int, group: ClientGroup, bits: int, parameters: LweParameters, masks: LweMasks, channel: Channel) -> RemoteMatrix:
    """A group's matrix at the server, as the client sees it."""
    noise = parameters.noise(group.l2, bits)
    pad, bounds = parameters.pad_columns, remote_bounds(group)
    return RemoteMatrix(group.name, index, group.rows, group.columns, pad, bits, bounds, noise, masks, channel)


def _guarded_product(session: LoraSession, remote: RemoteMatrix | EncryptedMatrix) -> Product:
    return lambda x, meanwhile: session.guarded(lambda: remote.product(x, meanwhile))
