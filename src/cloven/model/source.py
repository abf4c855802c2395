"""The model to be prepared: a local directory, a model on the Hub, or a model in memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from cloven.errors import BadInput, UnsupportedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.jinja")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
_MAX_COPIED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Source:
    """A causal language model to prepare: its configuration, and where its files are if it has any."""

    config: PretrainedConfig
    folder: Path | None = None
    loaded: PreTrainedModel | None = None
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """What to call the model in a README: never a path."""
        if self.hub_id is not None:
            return self.hub_id
        return self.folder.resolve().name if self.folder is not None else str(self.config.model_type)

    def load(self) -> PreTrainedModel:
        """The model in the dtype of its checkpoint, on the CPU; its tensors stay memory-mapped until they are read."""
        if self.loaded is not None:
            return self.loaded
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder, config=self.config, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BadInput(f"{self.folder}: the weights cannot be loaded: {_first_line(error)}") from error
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise BadInput(f"{self.folder}: the checkpoint lacks the weight {min(report['missing_keys'])}")
        return model

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        with torch.device("meta"):
            config = copy.deepcopy(self.config)  # from_config notes the dtype in it
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if self.folder is not None and (self.folder / "generation_config.json").is_file():
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            except (OSError, ValueError, TypeError) as error:
                raise BadInput(f"{self.folder}: generation_config.json cannot be used: {_first_line(error)}") from error
        return model

    def files(self, licences: bool = False) -> Iterator[Path]:
        """The tokenizer's files, or the licence files, of a model directory. Never code, never weights, nothing by a link to elsewhere."""
        if self.folder is None:
            return
        homes = [self.folder.resolve()]
        if self.hub_id is not None:
            homes.append(self.folder.resolve().parents[1] / "blobs")  # the Hub's cache links its snapshots to them
        for pattern in _LICENCES if licences else _COPIED:
            for path in sorted(self.folder.glob(pattern)):
                if not any(path.resolve().is_relative_to(home) for home in homes):
                    continue
                if path.is_file() and path.suffix not in (".py", ".safetensors") and path.stat().st_size <= _MAX_COPIED_BYTES:
                    yield path

    def copy_files(self, folder: Path, licences: bool = False) -> None:
        """Copy those files to a folder; a tokenizer's configuration loses what names code."""
        for path in self.files(licences):
            if path.name == "tokenizer_config.json":
                record = without_code(json.loads(path.read_text(encoding="utf-8")))
                (folder / path.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, folder / path.name)

    def licence(self) -> str:
        """The licence that the source's model card states, or "not stated"."""
        card = self.folder / "README.md" if self.folder is not None else None
        if card is None or not card.is_file():
            return "not stated"
        start = card.read_text(encoding="utf-8", errors="replace")[:4096]
        match = re.search(r"^licen[sc]e:\s*[\"']?([\w.+-]+)[\"']?\s*$", start, re.MULTILINE)
        return match[1] if match else "not stated"


def open_source(model: str | Path | PreTrainedModel) -> Source:
    """Find a model and read its configuration; code in the repository is never run.

    Raises:
        BadInput: there is no such directory or Hub model, or it has no configuration.
        UnsupportedModel: it is already quantised.
    """
    if isinstance(model, PreTrainedModel):
        return _checked(Source(model.config, loaded=model))
    folder, hub_id = Path(model).expanduser(), None
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(str(model)):
            raise BadInput(f"{model}: no such model directory")
        try:
            folder, hub_id = Path(snapshot_download(str(model), allow_patterns=_HUB_FILES)), str(model)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise BadInput(f"{model}: no such directory, and the Hub gives no such model ({type(error).__name__})") from error
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json: not a model directory")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: config.json cannot be used: {_first_line(error)}") from error
    return _checked(Source(config, folder, hub_id=hub_id))


def _checked(source: Source) -> Source:
    classes = source.config.architectures or []
    if classes and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise UnsupportedModel(f"{source.name}: {classes[0]} is not a causal language model")
    if getattr(source.config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{source.name}: is already quantised or split; prepare the original model")
    return source


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def without_code(record: Any) -> Any:
    """A configuration without `auto_map`, at any depth: a bundle never names code to run."""
    if isinstance(record, dict):
        return {name: without_code(value) for name, value in record.items() if name != "auto_map"}
    return [without_code(value) for value in record] if isinstance(record, list) else record


def write_configuration(model: PreTrainedModel, folder: Path, description: dict[str, Any], **changes: Any) -> None:
    """Write config.json of a bundle, and the generation configuration where there is one.

    Args:
        description: scheme, version, bundle and model: see `cloven.model.registration`.
        changes: other fields to set.
    """
    record: dict[str, Any] = without_code(model.config.to_dict())
    record.pop("_name_or_path", None)
    record |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch."), **changes}
    record["quantization_config"] = {"quant_method": "cloven", **description}
    (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
