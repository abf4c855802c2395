"""KV-Shield as a scheme of `cloven.model.registration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloven.errors import BadBundle
from cloven.kv_shield.layer import KeyedAttention
from cloven.kv_shield.manifest import EXPOSED, KvManifest
from cloven.kv_shield.session import KvSession, open_session
from cloven.kv_shield.shapes import parse_attention
from cloven.model.registration import ClovenConfig, register_scheme
from cloven.model.runtime import RuntimeOptions

_ALIGNMENT = 64  # bytes


class KvShield:
    """Makes the projections of attention layers call the enclave."""

    peer = "enclave"
    places: tuple[str, ...] = ("cuda", "cpu")

    def manifest(self, folder: Path) -> KvManifest:
        """See `Scheme.manifest`."""
        return KvManifest.read(folder, EXPOSED)

    def weights(self, folder: Path, config: ClovenConfig) -> None:
        """See `Scheme.weights`: they are in the folder."""

    def swap(self, model: Any, description: dict[str, Any]) -> None:
        """See `Scheme.swap`: the projections' weights are stored flat."""
        if not isinstance(description, dict) or set(description) != {"mode", "noise_dims", "layers"}:
            raise BadBundle("config.json: malformed (KV-Shield's description)")
        noise = description["noise_dims"] if description["mode"] == "session" else 0
        attentions = []
        for index, record in enumerate(description["layers"]):
            shape = parse_attention(record, Path("config.json"))
            try:
                attention = model.get_submodule(shape.name)
                for name in shape.projections:
                    module = attention.get_submodule(name)
                    module.cloven_shape = tuple(module.weight.shape)
                    module.weight = nn.Parameter(torch.empty(module.weight.numel(), dtype=module.weight.dtype, device=module.weight.device))
                attentions.append(KeyedAttention(model, index, shape, noise))
            except AttributeError as error:
                raise BadBundle(f"config.json: this model has no {shape.name} as it describes it") from error
        model.cloven_attentions = attentions

    def finish(self, model: Any) -> None:
        """See `Scheme.finish`: the weights get their shape, and aligned memory (a mapped file is slower)."""
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        for module in model.modules():
            shape = getattr(module, "cloven_shape", None)
            if shape is not None:
                module.weight = nn.Parameter(module.weight.data.view(shape))
        for parameter in model.parameters():  # as in the stock model: PyTorch takes a slower path (measured: twice) where it is False
            parameter.requires_grad_(True)

    def attach(self, model: nn.Module, options: RuntimeOptions) -> KvSession:
        """See `Scheme.attach`."""
        return open_session(model, options)


register_scheme("kv-shield", KvShield())
