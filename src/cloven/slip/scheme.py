"""SLIP as a scheme of `cloven.model.registration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.model.registration import ClovenConfig, register_scheme
from cloven.model.runtime import RuntimeOptions
from cloven.slip.session import SlipSession, open_session
from cloven.slip.split_model import SplitModelShape, swap_modules


class Slip:
    """Swaps linears for `SplitLinear`s and opens SLIP sessions."""

    peer = "worker"
    places: tuple[str, ...] = ()

    def manifest(self, folder: Path) -> TrustedManifest:
        """See `Scheme.manifest`."""
        return TrustedManifest.read(folder)

    def weights(self, folder: Path, config: ClovenConfig) -> None:
        """See `Scheme.weights`: they are in the folder."""

    def swap(self, model: Any, description: dict[str, Any]) -> None:
        """See `Scheme.swap`."""
        swap_modules(model, SplitModelShape.from_dict(description))
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}

    def finish(self, model: nn.Module) -> None:
        """See `Scheme.finish`: split weights cannot be trained."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def attach(self, model: nn.Module, options: RuntimeOptions) -> SlipSession:
        """See `Scheme.attach`."""
        return open_session(model, options)


register_scheme("slip", Slip())
