"""A checkpoint's tensors, straight from its safetensors files, one at a time; and where a model's tensors are in it.

Jobs read checkpoints without transformers and without the model: memory is that of the tensors in use, whatever the model's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cloven.errors import BadInput

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 * 2**20


class Checkpoint:
    """The tensors of a model directory, by name.

    Raises:
        BadInput: no safetensors checkpoint, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files(folder)

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._file_of)

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of modification of every file: another checkpoint in the same place is noticed."""
        places = sorted(set(self._file_of.values()))
        return {name: ((self.folder / name).stat().st_size, (self.folder / name).stat().st_mtime_ns) for name in places}

    def tensor(self, name: str) -> Tensor:
        """A tensor, in the dtype of the checkpoint."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: the weights cannot be loaded: {name}: {error}") from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: the weights cannot be loaded: {name}: {error}") from error

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise BadInput(f"{self.folder}: the checkpoint lacks the weight {name}")
        return self.folder / self._file_of[name]


def _files(folder: Path) -> dict[str, str]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{single}: the weights cannot be loaded: {error}") from error
    try:
        record = json.loads(index.read_text(encoding="utf-8")) if index.stat().st_size <= _MAX_INDEX_BYTES else None
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: no {_SINGLE} and no {_INDEX}: the weights cannot be loaded (pickled weights are never read)") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{index}: not readable as JSON") from error
    places = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(places, dict) or not places or not all(_plain(name) for name in places.values()):
        raise BadInput(f"{index}: malformed (weight_map)")
    missing = sorted(name for name in set(places.values()) if not (folder / name).is_file())
    if missing:
        raise BadInput(f"{folder}: the checkpoint lacks the file {missing[0]}")
    return places


def _plain(name: object) -> bool:
    """A file beside the index, not somewhere else."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def locate(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Where each tensor of a model's state dict is in a checkpoint.

    Args:
        model: on the meta device, with the attributes of a `PreTrainedModel`.

    Returns:
        Names in the checkpoint by names in the state dict; None if some cannot be told: transformers then has to load it.
    """
    names, prefix = checkpoint.names, f"{getattr(model, 'base_model_prefix', '')}."
    state = model.state_dict()
    found: dict[str, str] = {}
    for key in state:
        choices = [key, key.removeprefix(prefix), prefix + key]
        place = next((choice for choice in choices if choice in names), None)
        if place is not None:
            found[key] = place
    for key, other in _ties(model).items():
        if key in state and key not in found and other in found:
            found[key] = found[other]
    if set(found) != set(state):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for key, place in found.items():
        shape = shapes.setdefault(place, checkpoint.shape(place))
        if shape != tuple(state[key].shape):
            return None
    return found


def _ties(model: nn.Module) -> Mapping[str, str]:
    """Tied names, each with the one that the checkpoint holds instead."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return {}
    tied = getattr(model, "all_tied_weights_keys", None)
    return tied if isinstance(tied, Mapping) else {}
