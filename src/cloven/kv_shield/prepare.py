"""`prepare kv-shield`: from a model to OUT/exposed, a Hugging Face directory, and OUT/trusted, the enclave's keys.

    1. find the attention layers; learn how the family rotates, from its own code, and check it by numbers
    2. draw the permutations (permute mode)
    3. write the weights: rows of W_q, W_k, W_v and their biases permuted (permute mode), the norms of q and k left out
    4. write the keys, the manifests, the configuration; then one rename makes OUT appear, complete

The weights of the projections are stored flat: a directory opened without `import cloven` then fails with a size mismatch, instead of
running with a scrambled head, or, in session mode, without protection.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cloven.bundle.partial_folder import partial_folder, require_new
from cloven.bundle.shards import ShardWriter
from cloven.bundle.verification import sha256_file
from cloven.errors import UnsupportedModel
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.keys import permutations
from cloven.kv_shield.manifest import EXPOSED, KEYS_FILE, SCHEME, TRUSTED, KvManifest, bundle_id
from cloven.kv_shield.rotary import Rotary
from cloven.kv_shield.shapes import AttentionShape
from cloven.model.attention import attention_modules, head_counts, output_of, projections_of, rotary_module, rotation_matrices
from cloven.model.linears import matrix_of
from cloven.model.source import open_source, write_configuration

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm", "gpt2")
VERSION = 1
Progress = Callable[[str, int, int], None]
_CHECKED_POSITIONS = torch.tensor([0, 1, 2, 3, 5, 17, 100])


def prepare_kv_shield(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    config: KvShieldConfig | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> KvManifest:
    """Make a KV-Shield bundle of a causal language model.

    Args:
        model: a model directory, a Hub id, or a model in memory (which is not changed).
        out: a folder that does not exist yet, or is empty.
        config: parameters.
        progress: called with (stage, done, total).

    Returns:
        The trusted half's manifest.

    Raises:
        BadInput, UnsupportedModel: before anything is written.

    Guarantee: OUT/exposed holds no key; in permute mode it holds permuted weights, from which the permutations follow for whoever has the
    public ones (a test shows it). Keys come from the operating system.
    """
    config = config or KvShieldConfig()
    out = Path(out).expanduser().absolute()
    source = open_source(model)
    require_new(out)
    if source.config.model_type not in FAMILIES:
        raise UnsupportedModel(f"{source.config.model_type}: KV-Shield supports {', '.join(FAMILIES)}")
    loaded = source.load()
    layers = attention_shapes(loaded)
    rotary = learn_rotary(loaded, layers)
    with partial_folder(out) as partial, torch.no_grad():
        exposed, trusted = partial / "exposed", partial / "trusted"
        exposed.mkdir(mode=0o755)
        trusted.mkdir(mode=0o700)
        stream = SecretStream(secrets.token_bytes(KEY_BYTES), "kv-shield")
        stored = _rotary_tensors(rotary)
        shards = ShardWriter(exposed, "model", secret=False)
        changed = _projections(loaded, layers, config, stream, stored)
        tied = set(getattr(loaded, "all_tied_weights_keys", None) or ())
        tensors = [(name, tensor) for name, tensor in loaded.state_dict().items() if name not in tied and not _is_norm(name, layers)]
        for done, (name, tensor) in enumerate(tensors):
            progress("write", done, len(tensors))
            shards.add(name, changed.get(name, tensor))
        shards.close()
        shards.write_index()
        weights = {name: digest for name, digest in shards.files.items() if name.endswith(".safetensors")}
        nonce = secrets.token_hex(16)
        bundle = bundle_id(layers, config, weights, nonce)
        _write_configuration(loaded, exposed, bundle, layers, config)
        source.copy_files(exposed)
        source.copy_files(exposed, licences=True)
        for path in exposed.iterdir():
            path.chmod(0o644)
        KvManifest(EXPOSED, bundle, nonce, config, layers, {p.name: sha256_file(p) for p in sorted(exposed.iterdir())}).write(exposed)
        (trusted / KEYS_FILE).touch(mode=0o600)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, trusted / KEYS_FILE)
        limit = int(getattr(loaded.config, "max_position_embeddings", 0) or 2**20)
        manifest = KvManifest(TRUSTED, bundle, nonce, config, layers, {KEYS_FILE: sha256_file(trusted / KEYS_FILE)}, limit)
        manifest.write(trusted)
    return manifest


def attention_shapes(model: PreTrainedModel) -> tuple[AttentionShape, ...]:
    """The attention layers of a model.

    Raises:
        UnsupportedModel: projections of other sizes than the configuration says, or norms that are not RMS norms per head.
    """
    rotated = rotary_module(model) is not None
    shapes = []
    for name, attention in attention_modules(model).items():
        heads, kv_heads, head_dim = head_counts(attention, model.config)
        norms = [getattr(attention, f"{which}_norm", None) for which in "qk"]
        epsilon = None
        if any(norm is not None for norm in norms):
            epsilon = _epsilon_of(norms, head_dim, model.config.model_type)
        projections = projections_of(attention)
        shape = AttentionShape(name, heads, kv_heads, head_dim, projections, output_of(attention), rotated, epsilon)
        widths = [len(matrix_of(attention.get_submodule(projection))) for projection in projections]
        if widths != (list(shape.widths()) if len(projections) == 3 else [sum(shape.widths())]):
            raise UnsupportedModel(f"{model.config.model_type}: {name} has projections of unexpected sizes")
        shapes.append(shape)
    return tuple(shapes)


@torch.no_grad()
def learn_rotary(model: PreTrainedModel, layers: tuple[AttentionShape, ...]) -> Rotary | None:
    """The model's rotary embedding as a signed gather, from what the family's own code does to unit vectors.

    Raises:
        UnsupportedModel: it is no such gather.
    """
    module = rotary_module(model)
    if module is None:
        return None
    attention, d = model.get_submodule(layers[0].name), layers[0].head_dim
    kind = model.config.model_type
    matrices = rotation_matrices(attention, module, _CHECKED_POSITIONS, d)  # [S, d, d]
    frequencies = torch.as_tensor(module.inv_freq).float().cpu()
    scaling = float(getattr(module, "attention_scaling", 1.0))
    angles = _CHECKED_POSITIONS[:, None].float() * frequencies
    cos, sin = angles.cos() * scaling, angles.sin() * scaling  # [S, F]
    frequency, partner, sign = torch.full((d,), len(frequencies)), torch.arange(d), torch.zeros(d, dtype=torch.long)
    for j in range(d):
        column = matrices[:, :, j]
        others = [i for i in range(d) if i != j and bool(column[:, i].any())]
        if not others:  # not rotated, as the check below shows
            continue
        other = column[:, others[0]]
        same = (column[:, j, None] == cos).all(0) & (other.abs()[:, None] == sin.abs()).all(0)  # [F]
        matching = same.nonzero().flatten().tolist()
        if len(others) > 1 or not matching:
            raise UnsupportedModel(f"{kind}: its rotation is not one that KV-Shield can do on permuted vectors")
        frequency[j], partner[j] = matching[0], others[0]
        sign[j] = 1 if torch.equal(other, sin[:, matching[0]]) else -1
    rotary = Rotary(frequencies, scaling, frequency, partner, sign)
    x = torch.randn(1, len(_CHECKED_POSITIONS), d, generator=torch.Generator().manual_seed(0))
    gather = rotary.gather(torch.arange(d)[None])
    ours = gather.rotate(x, gather.columns(rotary.tables(_CHECKED_POSITIONS[None], x.dtype)))
    if not torch.allclose(ours[0], torch.einsum("sd,sde->se", x[0], matrices), atol=1e-5):
        raise UnsupportedModel(f"{kind}: its rotation is not one that KV-Shield can do on permuted vectors")
    return rotary


def _epsilon_of(norms: list[Any], head_dim: int, kind: str) -> float:
    x = torch.randn(3, head_dim, generator=torch.Generator().manual_seed(0))
    for norm in norms:
        epsilon = getattr(norm, "variance_epsilon", None)
        if epsilon is not None and norm.weight.shape == (head_dim,):
            with torch.no_grad():
                ours = norm.weight.float() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
                if torch.allclose(copy.deepcopy(norm).float()(x).float(), ours, atol=1e-5):
                    continue
        raise UnsupportedModel(f"{kind}: its norms of q and k are not RMS norms per head")
    return float(norms[0].variance_epsilon)


def _rotary_tensors(rotary: Rotary | None) -> dict[str, Tensor]:
    if rotary is None:
        return {}
    return {
        "rotary.frequencies": rotary.inverse_frequencies,
        "rotary.scaling": torch.tensor(rotary.scaling, dtype=torch.float64),
        "rotary.frequency": rotary.frequency,
        "rotary.partner": rotary.partner,
        "rotary.sign": rotary.sign,
    }


def _is_norm(name: str, layers: tuple[AttentionShape, ...]) -> bool:
    return any(name == f"{layer.name}.{which}_norm.weight" for layer in layers for which in "qk")


def _projections(
    model: PreTrainedModel, layers: tuple[AttentionShape, ...], config: KvShieldConfig, stream: SecretStream, stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the projections as they are exposed, by name; what the enclave needs goes to `stored`."""
    changed: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        attention = model.get_submodule(layer.name)
        if layer.norm_epsilon is not None:
            for which in "qk":
                stored[f"{index}.{which}_norm"] = attention.get_submodule(f"{which}_norm").weight.detach().clone()
        order = torch.arange(sum(layer.widths()))
        if config.mode == "permute":
            pi, pi_v = (permutations(stream, layer.kv_heads, layer.head_dim) for _ in range(2))
            stored[f"{index}.qk"], stored[f"{index}.v"] = pi, pi_v
            order = row_order(layer, pi, pi_v)
        for name, part in zip(layer.projections, layer.slices(), strict=True):
            rows = order[part] - part.start
            module = attention.get_submodule(name)
            weight: Any = module.weight.detach()
            weight = weight[:, rows] if isinstance(module, Conv1D) else weight[rows]
            changed[f"{layer.name}.{name}.weight"] = weight.flatten()
            if getattr(module, "bias", None) is not None:
                changed[f"{layer.name}.{name}.bias"] = module.bias.detach()[rows]
    return changed


def row_order(layer: AttentionShape, pi: Tensor, pi_v: Tensor) -> Tensor:
    """Which row of W_q ‖ W_k ‖ W_v stands where: every head permuted within itself, query heads like their kv head."""
    of_heads = torch.cat([pi.repeat_interleave(layer.heads // layer.kv_heads, 0), pi, pi_v])
    return (of_heads + layer.head_dim * torch.arange(len(of_heads))[:, None]).flatten()


def _write_configuration(
    model: PreTrainedModel, exposed: Path, bundle: str, layers: tuple[AttentionShape, ...], config: KvShieldConfig
) -> None:
    shape = {"mode": config.mode, "noise_dims": config.noise_dims, "layers": [layer.to_dict() for layer in layers]}
    write_configuration(model, exposed, {"scheme": SCHEME, "version": VERSION, "bundle": bundle, "model": shape})
