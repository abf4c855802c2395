"""SLIP as a scheme of `cloven.model.registration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import verify_files
from cloven.errors import ForeignBundle
from cloven.model.registration import register_scheme
from cloven.model.runtime import RuntimeOptions
from cloven.slip.session import SlipSession, open_session
from cloven.slip.split_model import SplitModelShape, swap_modules


class Slip:
    """Swaps linears for `SplitLinear`s and opens SLIP sessions."""

    peer = "worker"
    places: tuple[str, ...] = ()

    def verify(self, folder: Path, bundle: object, checkpoint: list[Path]) -> None:
        """See `Scheme.verify`."""
        manifest = TrustedManifest.read(folder)
        if manifest.bundle != bundle:
            raise ForeignBundle(f"{folder}: config.json is of bundle {bundle}, manifest.json of {manifest.bundle}")
        verify_files(folder, {path.name: manifest.files.get(path.name, "") for path in checkpoint})
        verify_files(folder, {"config.json": manifest.files.get("config.json", "")})

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
