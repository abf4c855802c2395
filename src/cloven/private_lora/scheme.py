"""Private LoRA as a scheme of `cloven.model.registration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cloven.errors import BadBundle
from cloven.model.registration import ClovenConfig, register_scheme
from cloven.model.runtime import RuntimeOptions
from cloven.private_lora.base import require_base, weight_files
from cloven.private_lora.manifest import ClientManifest, read_client, verify_client
from cloven.private_lora.session import LoraSession, base_folder, install, open_session


class PrivateLora:
    """Loads the base from its own directory, and makes adapted linears ask the adapter server."""

    peer = "server"
    places: tuple[str, ...] = ("cuda", "cpu")

    def manifest(self, folder: Path) -> ClientManifest:
        """See `Scheme.manifest`."""
        return ClientManifest.read(folder)

    def weights(self, folder: Path, config: ClovenConfig) -> list[Path]:
        """See `Scheme.weights`: the base's files, which must be those that the adapter was made for."""
        manifest = read_client(folder, config.given("pin"))
        verify_client(folder, manifest)
        base = base_folder(config.given("base") or manifest.base_name)
        require_base(base, manifest.base)
        return weight_files(base)

    def swap(self, model: Any, description: dict[str, Any]) -> None:
        """See `Scheme.swap`: nothing; the modules are the base's."""
        if description != {}:
            raise BadBundle("config.json: malformed (private LoRA's description)")

    def finish(self, model: Any) -> None:
        """See `Scheme.finish`: the groups are installed; they need a session before they run."""
        folder: Path = model.cloven_folder
        install(model, folder, ClientManifest.read(folder))

    def attach(self, model: nn.Module, options: RuntimeOptions) -> LoraSession:
        """See `Scheme.attach`."""
        return open_session(model, options)


register_scheme("private-lora", PrivateLora())
