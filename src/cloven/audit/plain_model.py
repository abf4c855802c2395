"""The model that a KV-Shield bundle was made of, put together again by whoever has both halves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cloven.errors import BadBundle
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.manifest import KEYS_FILE, read_halves
from cloven.kv_shield.prepare import row_order


@torch.no_grad()
def plain_model(out: Path) -> tuple[PreTrainedModel, KvShieldConfig]:
    """The public model, in float32, and the bundle's parameters.

    Raises:
        BadBundle, TamperedBundle, ForeignBundle: the halves.
    """
    trusted, exposed = read_halves(out, verify=True)
    config = AutoConfig.from_pretrained(out / "exposed", trust_remote_code=False)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    tensors: dict[str, Tensor] = {}
    for name in exposed.files:
        if name.endswith(".safetensors"):
            tensors |= load_file(out / "exposed" / name)
    stored = load_file(out / "trusted" / KEYS_FILE)
    state = model.state_dict()
    for index, layer in enumerate(exposed.layers):
        order = torch.arange(sum(layer.widths()))
        if trusted.config.mode == "permute":
            order = row_order(layer, stored[f"{index}.qk"], stored[f"{index}.v"])
        for projection, part in zip(layer.projections, layer.slices(), strict=True):
            name = f"{layer.name}.{projection}"
            back = torch.argsort(order[part])
            weight = tensors[f"{name}.weight"].view(state[f"{name}.weight"].shape)
            transposed = len(weight) != len(back)  # Conv1D
            tensors[f"{name}.weight"] = weight[:, back] if transposed else weight[back]
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"][back]
        for which in "qk":
            if f"{index}.{which}_norm" in stored:
                tensors[f"{layer.name}.{which}_norm.weight"] = stored[f"{index}.{which}_norm"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - set(getattr(model, "all_tied_weights_keys", None) or ()):  # tied tensors are stored once
        raise BadBundle(f"{out / 'exposed'}: the tensors are not those of its config.json; copy the bundle again")
    model.tie_weights()
    return model.eval(), trusted.config
