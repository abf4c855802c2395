"""The unprotected original, for comparison: loaded when it is first asked for, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from cloven.errors import BadInput
from cloven.serving.api_error import ApiError
from cloven.serving.model import ServedModel
from cloven.telemetry import logger

_SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


class Original:
    """The model of a directory.

    Args:
        folder: a model directory; nothing of it is loaded yet.
        served: what it is compared with.

    Raises:
        BadInput: no model, a bundle's half, or another model than the one that is served.

    Not hidden: its weights are in this process, whole, from the first comparison on: it is for the trusted side.
    """

    def __init__(self, folder: Path, served: ServedModel) -> None:
        if not (folder / "config.json").is_file():
            raise BadInput(f"{folder}: no model directory (config.json is missing); give the original's to --compare")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: its config.json cannot be read as a model's") from error
        if getattr(config, "quantization_config", None) is not None:
            raise BadInput(f"{folder}: half of a bundle, or a quantised model; give the unprotected original to --compare")
        own, others = (one.get_text_config() for one in (served.model.config, config))
        for name in _SAME:
            if getattr(own, name, None) != getattr(others, name, None):
                raise BadInput(f"{folder}: not the original of the model that is served: {name} is another one")
        self._folder, self._dtype = folder, served.model.dtype
        self._model: Any = None

    def model(self) -> Any:
        """The model; the first call loads it, in the dtype of the one that is served. In the engine's thread alone.

        Raises:
            ApiError: it cannot be loaded.
        """
        if self._model is None:
            try:
                self._model = AutoModelForCausalLM.from_pretrained(
                    self._folder, dtype=self._dtype, use_safetensors=True, trust_remote_code=False
                )
            except Exception as error:
                logger.error("%s: the original cannot be loaded: %s", self._folder, type(error).__name__)
                raise ApiError(500, "the unprotected original cannot be loaded", "original_failed", "server_error") from error
        return self._model
