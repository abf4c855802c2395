"""`prepare slip`: from a model to OUT/trusted and OUT/exposed.

    1. trace the groups of linears that share an input
    2. spectra of all matrices; the global budget gives the ranks
    3. group by group: split (with decoy), stack, equalise, quantise, scramble; write codes to exposed/, the rest to trusted/
    4. what is not linear (embeddings, norms) goes to trusted/
    5. manifests with hashes; then one rename makes OUT appear, complete

OUT is written beside its place as `.OUT.partial` and renamed at the end, so that an interrupted run leaves nothing that loads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.bundle.bundle import Bundle, open_bundle
from cloven.bundle.manifest import ExposedGroup, ExposedManifest
from cloven.bundle.partial_folder import partial_folder, require_new
from cloven.bundle.shards import ShardWriter
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import sha256_file, sha256_matrix
from cloven.errors import BadInput
from cloven.field.codec import RowBounds, row_bounds
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.model.groups import Group, trace_groups
from cloven.model.linears import bias_of, linears_of, matrix_of
from cloven.model.source import Source, open_source, other_tensors, write_configuration
from cloven.slip.cards import exposed_card, trusted_card
from cloven.slip.config import SlipConfig
from cloven.slip.decomposition import allocate_ranks, spectrum, split
from cloven.slip.exposed_matrix import expose
from cloven.slip.split_model import LinearShape, SplitModelShape
from cloven.slip.summary import Summary

Progress = Callable[[str, int, int], None]  # stage, done, total
VERSION = 1
_ROWS_AT_A_TIME = 4096


def prepare_slip(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    config: SlipConfig | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Bundle:
    """Split a causal language model into a trusted and an exposed half.

    Args:
        model: a model directory, a Hub id, or a model in memory (which is not changed).
        out: a folder that does not exist yet, or is empty.
        config: parameters; the defaults are safe.
        progress: called with (stage, done, total).

    Returns:
        The bundle: OUT/trusted (mode 0700) and OUT/exposed.

    Raises:
        BadInput, UnsupportedModel: before anything is written.  RunError: the disk is full, say; nothing is left behind.

    Guarantee: all split randomness comes from the operating system; the exposed half holds int8 codes and shapes only. Not hidden:
    the shapes of the groups, and what the exposed codes give away of the weights (see docs/threat-model.md). Every call makes another
    decoy: two bundles of one model in one party's hands give away the secret subspaces. Prepare once per model; copy bundles.
    """
    config = config or SlipConfig()
    out = Path(out).expanduser().absolute()
    source = open_source(model)
    require_new(out)
    groups = trace_groups(source.config)
    with partial_folder(out) as partial, torch.no_grad():
        _write(source, groups, config, partial, progress)
    return open_bundle(out)


def _write(source: Source, groups: list[Group], config: SlipConfig, partial: Path, progress: Progress) -> None:
    model = source.load()
    linears = linears_of(model)
    trusted, exposed = partial / "trusted", partial / "exposed"
    trusted.mkdir(mode=0o700)
    exposed.mkdir(mode=0o755)
    names = [name for group in groups for name in group]
    matrices = {name: matrix_of(linears[name]) for name in names}
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "slip")

    # 2
    spectra: dict[str, Tensor] = {}
    for done, name in enumerate(names):
        progress("spectra", done, len(names))
        spectra[name] = _finite_spectrum(name, matrices[name])
    shapes = [(int(matrices[name].shape[0]), int(matrices[name].shape[1])) for name in names]
    if config.rank is None:
        ranks = allocate_ranks([spectra[name] for name in names], shapes, config.secret_fraction)
    else:
        ranks = [min(config.rank, min(shape) // 2) for shape in shapes]
    rank_of = dict(zip(names, ranks, strict=True))

    # 3
    secret_shards = ShardWriter(trusted, "model", secret=True)
    exposed_shards = ShardWriter(exposed, "exposed", secret=False)
    records: list[ExposedGroup] = []
    bounds: list[RowBounds] = []
    described: list[tuple[LinearShape, ...]] = []
    summary = Summary()
    for index, group in enumerate(groups):
        progress("split", index, len(groups))
        parts = [split(matrices[name], rank_of[name], spectra[name], stream) for name in group]
        stacked = torch.cat([part.exposed for part in parts])  # [N, K]
        matrix = expose(stacked, config.terms, stream if config.scramble else None)
        tensor = f"group-{index:05d}"
        exposed_shards.add(tensor, matrix.codes)
        height, width = matrix.codes.shape
        records.append(ExposedGroup(height, width, exposed_shards.file_of[tensor], tensor, sha256_matrix(matrix.codes)))
        bounds.append(row_bounds(matrix.codes))
        start = 0
        shapes_of_group = []
        for name, part in zip(group, parts, strict=True):
            rows, columns = part.exposed.shape
            bias = bias_of(linears[name])
            shapes_of_group.append(LinearShape(name, rows, columns, rank_of[name], bias is not None))
            secret_shards.add(f"{name}.weight", torch.empty(0))
            secret_shards.add(f"{name}.secret_a", part.secret_a.float())
            secret_shards.add(f"{name}.secret_b", part.secret_b.float())
            secret_shards.add(f"{name}.row_gather", matrix.row_gather[:, start : start + rows])
            secret_shards.add(f"{name}.row_scale", matrix.row_scale[:, start : start + rows])
            if bias is not None:
                secret_shards.add(f"{name}.bias", bias)
            if start == 0:
                secret_shards.add(f"{name}.column_gather", matrix.column_gather)
                secret_shards.add(f"{name}.column_scale", matrix.column_scale)
            summary.add(name, rows, columns, rank_of[name], spectra[name])
            start += rows
        for first in range(0, stacked.shape[0], _ROWS_AT_A_TIME):
            rows_checked = slice(first, first + _ROWS_AT_A_TIME)
            summary.add_quantisation(stacked[rows_checked], matrix.dequantised(rows_checked))
        described.append(tuple(shapes_of_group))
    exposed_shards.close()

    # 4
    for name, tensor_value in other_tensors(model, set(names)):
        secret_shards.add(name, tensor_value)
    secret_shards.close()
    secret_shards.write_index()

    # 5
    progress("write", 0, 1)
    exposed_manifest = ExposedManifest(tuple(records), exposed_shards.files)
    exposed_manifest.write(exposed)
    shape = SplitModelShape(config.precision, tuple(described))
    _write_configuration(model, trusted, exposed_manifest.bundle, shape)
    _write_cards(source, partial, config, summary)
    files = {path.name: sha256_file(path) for path in sorted(trusted.iterdir())}
    TrustedManifest("slip", exposed_manifest, tuple(bounds), files, config.to_dict(), summary.to_dict()).write(trusted)


def _finite_spectrum(name: str, matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise BadInput(f"{name}: the weight holds NaN or infinity")
    return spectrum(matrix)


def _write_configuration(model: PreTrainedModel, trusted: Path, bundle: str, shape: SplitModelShape) -> None:
    description = {"scheme": "slip", "version": VERSION, "bundle": bundle, "model": shape.to_dict()}
    write_configuration(model, trusted, description, tie_word_embeddings=False)  # the head is split, the embedding stays trusted


def _write_cards(source: Source, partial: Path, config: SlipConfig, summary: Summary) -> None:
    source.copy_files(partial / "trusted")
    for half in ("trusted", "exposed"):
        source.copy_files(partial / half, licences=True)
    (partial / "trusted" / "README.md").write_text(trusted_card(source.name, source.licence(), config, summary), encoding="utf-8")
    (partial / "exposed" / "README.md").write_text(exposed_card(source.name, source.licence(), config), encoding="utf-8")
    for path in (partial / "trusted").iterdir():
        path.chmod(0o600)
    for path in (partial / "exposed").iterdir():
        path.chmod(0o644)
