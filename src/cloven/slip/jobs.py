"""The two passes of a preparation, one job per group: idempotent, single-threaded, bounded in memory.

    1. spectra     the singular values of every matrix, and its hash
    2. split       split (with decoy), stack, equalise, mix, quantise, scramble; codes to exposed/, the rest to trusted/

A job reads the plan and the key from the folder that it is given, and writes files that appear complete or not at all. Memory: below five
times the group in float32, plus 1 GB.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloven.bundle.manifest import ExposedGroup
from cloven.bundle.shards import write_shard
from cloven.bundle.verification import sha256_matrix
from cloven.errors import BadInput
from cloven.field.codec import row_bounds
from cloven.field.prg import SecretStream
from cloven.model.adapter import LoraModule
from cloven.slip.absorption import absorb
from cloven.slip.decomposition import Split, precise, spectrum, split, truncate
from cloven.slip.exposed_matrix import ExposedMatrix, expose
from cloven.slip.plan import CALIBRATION, RANKS, WORK, Plan, PlannedLinear, write_json
from cloven.slip.split_key import SPLIT_KEY, read_split_key
from cloven.slip.split_model import LinearShape

_RECORD = {"exposed", "bounds", "shapes", "exposed_sha256", "kept", "energies", "quantisation"}


@dataclass(frozen=True)
class GroupJob:
    """One group of the preparation in a folder."""

    folder: str
    group: int


def spectra_path(folder: Path, group: int) -> Path:
    """What pass 1 writes."""
    return folder / WORK / f"spectra-{group:05d}.safetensors"


def record_path(folder: Path, group: int) -> Path:
    """What pass 2 writes last."""
    return folder / WORK / f"split-{group:05d}.json"


@torch.no_grad()
def find_spectra(job: GroupJob) -> None:
    """Pass 1 for one group: of W, or of W − W_base where there is a public base."""
    folder = Path(job.folder)
    plan = Plan.read(folder / WORK)
    source, base = plan.source.open(), plan.base.open() if plan.base else None
    spectra, hashes = {}, []
    for position, linear in enumerate(plan.groups[job.group]):
        matrix = plan.matrix(source, linear)
        if not bool(torch.isfinite(matrix).all()):
            raise BadInput(f"{linear.name}: the weight holds NaN or infinity")
        theirs = plan.matrix(base, linear) if base is not None else None
        hashes.append(_digest(matrix, theirs))
        if theirs is not None:
            matrix = _difference(matrix, theirs, linear)
        spectra[str(position)] = spectrum(matrix.to(plan.device))
    write_shard(spectra_path(folder, job.group), spectra, secret=True, metadata={"sha256": json.dumps(hashes)})


def read_spectra(folder: Path, group: int) -> tuple[list[Tensor], list[str]]:
    """What pass 1 found: singular values and hashes of the group's matrices."""
    path = spectra_path(folder, group)
    try:
        with safe_open(path, framework="pt") as file:
            hashes = json.loads(file.metadata()["sha256"])
            return [file.get_tensor(str(position)) for position in range(len(hashes))], hashes
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: damaged; remove it, and the same command makes it again") from error


def read_record(folder: Path, group: int) -> dict[str, Any]:
    """What pass 2 said about a group."""
    path = record_path(folder, group)
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if set(record) != _RECORD:
            raise ValueError("not the fields of a record")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: damaged; remove it, and the same command makes it again") from error
    return record


@torch.no_grad()
def split_group(job: GroupJob) -> None:
    """Pass 2 for one group."""
    folder, index = Path(job.folder), job.group
    plan = Plan.read(folder / WORK)
    group = plan.groups[index]
    stream = read_split_key(folder / "trusted" / SPLIT_KEY).stream(index)
    stacked, parts, energies, reference = _split_matrices(folder, plan, index, stream)
    width = stacked.shape[1]
    activations = _read_calibration(folder / WORK / CALIBRATION, index, width) if plan.calibration else None
    scramble = plan.config.scramble
    secret = stream if scramble != "none" else None
    matrix = expose(stacked, plan.config.terms, secret, reference, activations, mixed=scramble == "mixing")
    del reference
    corrected, error, energy = absorb(parts, stacked, matrix, activations)
    if plan.adapter is None:  # whose factors are exactly the secret part
        parts = corrected
    tensor, number = f"group-{index:05d}", f"{index + 1:05d}.safetensors"
    sha256 = write_shard(folder / "exposed" / f"exposed-{number}", {tensor: matrix.codes}, secret=False)
    kept = _trusted_tensors(plan, group, parts, matrix)
    write_shard(folder / "trusted" / f"model-{number}", kept, secret=True)
    record = {
        "exposed": asdict(ExposedGroup(matrix.codes.shape[0], width, f"exposed-{number}", tensor, sha256_matrix(matrix.codes))),
        "bounds": asdict(row_bounds(matrix.codes)),
        "shapes": [
            asdict(LinearShape(linear.name, linear.rows, linear.columns, int(part.secret_a.shape[0]), linear.bias is not None))
            for linear, part in zip(group, parts, strict=True)
        ],
        "exposed_sha256": sha256,
        "kept": {"file": f"model-{number}", "tensors": list(kept), "bytes": sum(tensor.nbytes for tensor in kept.values())},
        "energies": energies,
        "quantisation": [error, energy],
    }
    write_json(record_path(folder, index), record)


def _split_matrices(
    folder: Path, plan: Plan, index: int, stream: SecretStream
) -> tuple[Tensor, list[Split], list[tuple[float, float]], Tensor | None]:
    """E of all members, stacked [N, K]; the secret parts; secret and whole energy of each; the base's matrix where scales are its."""
    group = plan.groups[index]
    source, base = plan.source.open(), plan.base.open() if plan.base else None
    ranks = json.loads((folder / WORK / RANKS).read_text(encoding="utf-8"))[index]
    adapter = plan.adapter.modules() if plan.adapter else {}
    spectra, hashes = read_spectra(folder, index) if plan.adapter is None else ([], [])
    stacked = torch.empty(sum(linear.rows for linear in group), group[0].columns, dtype=precise(plan.weight_of(index)))
    reference = torch.empty_like(stacked) if base is not None else None
    parts, energies, start = [], [], 0
    for position, linear in enumerate(group):
        rows = slice(start, start + linear.rows)
        start += linear.rows
        w = stacked[rows]
        matrix = plan.matrix(source, linear)
        theirs = plan.matrix(base, linear) if base is not None else None
        if hashes and _digest(matrix, theirs) != hashes[position]:
            raise BadInput(f"{linear.name}: the weight has changed since the first pass")
        w.copy_(matrix)
        if plan.adapter is not None:
            part = _adapted(w, linear, adapter.get(linear.name))
            energy = float(((part.secret_b.t() @ part.secret_b) * (part.secret_a @ part.secret_a.t())).sum())  # ‖B A‖²
            energies.append((energy, energy))
        else:
            values = spectra[position]
            if theirs is not None and reference is not None:
                reference[rows].copy_(theirs)
                part = truncate(w, _difference(matrix, theirs, linear), ranks[position], stream, out=w, device=plan.device)
            else:
                part = split(w, ranks[position], values, stream, out=w, device=plan.device)
            energies.append((float(values[: ranks[position]].square().sum()), float(values.square().sum())))
        parts.append(part)
    return stacked, parts, energies, reference


def _digest(matrix: Tensor, theirs: Tensor | None) -> str:
    """What the split is made from: the matrix, and the base's where there is one."""
    return sha256_matrix(matrix) if theirs is None else f"{sha256_matrix(matrix)}+{sha256_matrix(theirs)}"


def _difference(matrix: Tensor, theirs: Tensor, linear: PlannedLinear) -> Tensor:
    """W − W_base."""
    if not bool(torch.isfinite(theirs).all()):
        raise BadInput(f"{linear.name}: the base's weight holds NaN or infinity")
    dtype = precise(matrix.numel())
    return matrix.to(dtype).sub_(theirs.to(dtype)) if matrix.dtype != dtype else matrix - theirs.to(dtype)


def _adapted(w: Tensor, linear: PlannedLinear, module: LoraModule | None) -> Split:
    """The base's own matrix, and the adapter as the secret part: exactly s·B and A."""
    if not bool(torch.isfinite(w).all()):
        raise BadInput(f"{linear.name}: the weight holds NaN or infinity")
    if module is None:
        return Split(w, torch.empty(0, linear.columns, dtype=torch.float64), torch.empty(linear.rows, 0, dtype=torch.float64))
    return Split(w, module.a.double(), module.b.double() * module.scale)


def _trusted_tensors(plan: Plan, group: tuple[PlannedLinear, ...], parts: list[Split], matrix: ExposedMatrix) -> dict[str, Tensor]:
    source = plan.source.open()
    tensors: dict[str, Tensor] = {}
    start = 0
    for linear, part in zip(group, parts, strict=True):
        rows = slice(start, start + linear.rows)
        tensors[f"{linear.name}.weight"] = torch.empty(0)
        tensors[f"{linear.name}.secret_a"] = part.secret_a.float()
        tensors[f"{linear.name}.secret_b"] = part.secret_b.float()
        tensors[f"{linear.name}.row_gather"] = matrix.row_gather[:, rows]
        tensors[f"{linear.name}.row_scale"] = matrix.row_scale[:, rows]
        if linear.bias is not None:
            tensors[f"{linear.name}.bias"] = source.tensor(linear.bias).to(getattr(torch, plan.dtype))
        if start == 0:
            tensors[f"{linear.name}.column_gather"] = matrix.column_gather
            tensors[f"{linear.name}.column_scale"] = matrix.column_scale
            tensors[f"{linear.name}.mixing_gather"] = matrix.mixing_gather
            tensors[f"{linear.name}.mixing_scale"] = matrix.mixing_scale
        start += linear.rows
    return tensors


def _read_calibration(path: Path, group: int, columns: int) -> Tensor:
    """The root mean squares of one group's inputs, float64 [K].

    Raises:
        BadInput: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            means: Tensor = file.get_tensor(str(group))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: damaged; remove it, and the same command makes it again") from error
    if means.shape != (columns,) or not bool(torch.isfinite(means).all()):
        raise BadInput(f"{path}: the activations of group {group} are not finite numbers: the model cannot be calibrated with this text")
    return means
