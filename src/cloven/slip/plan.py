"""The plan of a preparation: what the jobs need to know, as JSON. Jobs get its path and a group's number.

OUT/.work/plan.json            this
OUT/.work/spectra-00007        pass 1: the singular values of group 7, and the hashes of its matrices
OUT/.work/ranks.json           the ranks that the global budget gives
OUT/.work/split-00007.json     pass 2: what the manifests say about group 7
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.model.adapter import LoraModule, read_adapter
from cloven.model.checkpoint import Checkpoint
from cloven.slip.config import SlipConfig

WORK = ".work"
PLAN, RANKS, CALIBRATION = "plan.json", "ranks.json", "calibration.safetensors"


@dataclass(frozen=True)
class PlannedLinear:
    """One linear: its module's name, N, K, and where its weight (Wᵀ if `transposed`) and its bias are in the checkpoint."""

    name: str
    rows: int
    columns: int
    weight: str
    transposed: bool
    bias: str | None


@dataclass(frozen=True)
class Tensors:
    """A checkpoint, and the size and time of every file when the plan was made."""

    folder: str
    files: dict[str, list[int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tensors:
        """A checkpoint as it is now."""
        return cls(str(checkpoint.folder), {name: list(state) for name, state in checkpoint.files().items()})

    def open(self) -> Checkpoint:
        """The checkpoint, if it is still what it was.

        Raises:
            BadInput: it has changed.
        """
        checkpoint = Checkpoint(Path(self.folder))
        if Tensors.of(checkpoint) != self:
            raise BadInput(f"{self.folder}: the checkpoint has changed since the preparation began")
        return checkpoint


@dataclass(frozen=True)
class PlannedAdapter:
    """A PEFT directory, and the hash of its weights when the plan was made."""

    folder: str
    sha256: str

    def modules(self) -> dict[str, LoraModule]:
        """The adapted modules by name, if they are still what they were.

        Raises:
            BadInput: they have changed.
        """
        adapter = read_adapter(Path(self.folder))
        if adapter.sha256 != self.sha256:
            raise BadInput(f"{self.folder}: the adapter has changed since the preparation began")
        return {module.name: module for module in adapter.modules}


@dataclass(frozen=True)
class Plan:
    """All that a job needs besides its group's number and the key.

    Args:
        source: the model's checkpoint; base: that of the public base, if there is one; adapter: the LoRA, if there is one.
        groups: the linears, in the order of the bundle.
        others: where the other tensors of the state dict are in the checkpoint.
        dtype: of the model.
        config: see `SlipConfig`.
        device: where factorisations are computed.
        calibration: SHA-256 of the calibration text; "" for none.
    """

    source: Tensors
    base: Tensors | None
    adapter: PlannedAdapter | None
    groups: tuple[tuple[PlannedLinear, ...], ...]
    others: dict[str, str]
    dtype: str
    config: SlipConfig
    device: str
    calibration: str = ""

    @property
    def linears(self) -> list[PlannedLinear]:
        """All linears, in order."""
        return [linear for group in self.groups for linear in group]

    def weight_of(self, group: int) -> int:
        """Parameters of a group: how long its jobs take."""
        return sum(linear.rows * linear.columns for linear in self.groups[group])

    def matrix(self, checkpoint: Checkpoint, linear: PlannedLinear) -> Tensor:
        """W [N, K] of a linear, in the dtype of the model."""
        weight = checkpoint.tensor(linear.weight)
        if not weight.is_floating_point():
            raise BadInput(f"{linear.name}: the weight is {weight.dtype}, no floating-point matrix")
        return (weight.t() if linear.transposed else weight).to(getattr(torch, self.dtype))

    def write(self, work: Path) -> None:
        """Write plan.json, whole or not at all."""
        write_json(work / PLAN, asdict(self))

    @classmethod
    def read(cls, work: Path) -> Plan:
        """Read plan.json, which this program wrote into a private folder.

        Raises:
            BadInput: another version wrote it, or it is damaged.
        """
        try:
            record: dict[str, Any] = json.loads((work / PLAN).read_text(encoding="utf-8"))
            record["source"] = Tensors(**record["source"])
            record["base"] = Tensors(**record["base"]) if record["base"] else None
            record["adapter"] = PlannedAdapter(**record["adapter"]) if record["adapter"] else None
            record["groups"] = tuple(tuple(PlannedLinear(**linear) for linear in group) for group in record["groups"])
            record["config"] = SlipConfig(**record["config"])
            return cls(**record)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadInput(f"{work.parent}: holds an unfinished preparation that cannot be continued: remove it to start afresh") from error


def write_json(path: Path, record: Any) -> None:
    """Write a small file that is there complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(path)
