"""Making the plan of a preparation: groups by tracing, tensors by name, the public relative checked against the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cloven.bundle.shards import ShardWriter
from cloven.errors import BadInput
from cloven.model.adapter import read_adapter
from cloven.model.checkpoint import Checkpoint, locate
from cloven.model.groups import trace_groups
from cloven.model.linears import bias_of, linears_of, matrix_of
from cloven.model.source import Source, open_source
from cloven.slip.config import SlipConfig
from cloven.slip.plan import Plan, PlannedAdapter, PlannedLinear, Tensors


def make_plan(
    source: Source, config: SlipConfig, adapter: str | Path | None, public_base: str | Path | None, device: str, calibration: str
) -> Plan | None:
    """The plan for a model directory; None where transformers has to load the model first (see `stored_copy`).

    Raises:
        BadInput, UnsupportedModel: the model, the adapter or the base cannot be used.
    """
    groups = trace_groups(source.config)
    if source.loaded is not None or source.folder is None:
        _planned_relatives(source, [], adapter, public_base)
        return None
    checkpoint = Checkpoint(source.folder)
    dtype = _dtype(source, checkpoint)
    skeleton = source.skeleton(dtype)
    places = locate(skeleton, checkpoint)
    if places is None:
        return None
    modules = linears_of(skeleton)
    linears = []
    for group in groups:
        members = []
        for name in group:
            module, transposed = modules[name], type(modules[name]) is Conv1D
            rows, columns = matrix_of(module).shape
            bias = places[f"{name}.bias"] if bias_of(module) is not None else None
            members.append(PlannedLinear(name, rows, columns, places[f"{name}.weight"], transposed, bias))
        linears.append(tuple(members))
    split = {name for group in groups for name in group}
    others = {name: place for name, place in places.items() if name.rpartition(".")[0] not in split}
    base, lora = _planned_relatives(source, [linear for group in linears for linear in group], adapter, public_base)
    return Plan(Tensors.of(checkpoint), base, lora, tuple(linears), others, str(dtype).removeprefix("torch."), config, device, calibration)


def stored_copy(source: Source, folder: Path) -> Source:
    """The model loaded by transformers and written to a folder under the names that it has in memory: for a model in memory, and for
    checkpoints whose names transformers changes. Needs the memory and the disk that the whole model takes."""
    model: PreTrainedModel = source.load()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shards = ShardWriter(folder, "model", secret=True)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            shards.add(name, tensor)
    shards.close()
    shards.write_index()
    return replace(source, folder=folder, loaded=None, config=model.config)


def fingerprint(plan: Plan, hashes: list[list[str]]) -> str:
    """A hash of all matrices: names, shapes and their own hashes."""
    listed = [
        [linear.name, linear.rows, linear.columns, digest]
        for group, digests in zip(plan.groups, hashes, strict=True)
        for linear, digest in zip(group, digests or [""] * len(group), strict=True)
    ]
    return hashlib.sha256(json.dumps(["cloven/slip/model/1", listed]).encode()).hexdigest()


def _dtype(source: Source, checkpoint: Checkpoint) -> torch.dtype:
    """What `from_pretrained(dtype="auto")` takes: the configuration's, or that of the first floating-point tensor."""
    stated = getattr(source.config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    for name in sorted(checkpoint.names):
        tensor = checkpoint.tensor(name)
        if tensor.is_floating_point():
            return tensor.dtype
    raise BadInput(f"{checkpoint.folder}: the checkpoint holds no floating-point tensor")


def _planned_relatives(
    source: Source, linears: list[PlannedLinear], adapter: str | Path | None, public_base: str | Path | None
) -> tuple[Tensors | None, PlannedAdapter | None]:
    """The public base's checkpoint and the adapter, checked against the model's linears."""
    if adapter is not None:
        folder = Path(adapter).expanduser().absolute()
        of_name = {linear.name: linear for linear in linears}
        read = read_adapter(folder)
        for module in read.modules:
            linear = of_name.get(module.name)
            if linears and linear is None:
                raise BadInput(f"{folder}: adapts {module.name}, which is no linear layer of {source.name}")
            if linear is not None and (linear.rows, linear.columns) != (module.b.shape[0], module.a.shape[1]):
                raise BadInput(f"{folder}: the factors of {module.name} do not fit its matrix {linear.rows} x {linear.columns}")
        return None, PlannedAdapter(str(folder), read.sha256)
    if public_base is None:
        return None, None
    base = open_source(public_base)
    if base.folder is None:
        raise BadInput("the public base: give a model directory or a Hub id")
    checkpoint = Checkpoint(base.folder)
    for linear in linears:
        shape = checkpoint.shape(linear.weight)
        if shape != ((linear.columns, linear.rows) if linear.transposed else (linear.rows, linear.columns)):
            raise BadInput(f"{base.name}: {linear.weight} has shape {list(shape)}: it is no base of {source.name}")
    return Tensors.of(checkpoint), None
