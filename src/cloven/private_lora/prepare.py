"""`prepare private-lora`: from a public base and a PEFT adapter to OUT/server, which is secret, and OUT/client, for every client.

    1. read the adapter; hash the base; find which adapted linears share an input
    2. per module:  s·B A = V C, V orthonormal with a secret rotation       (`factors`)
    3. per group:   C of all its modules -> two int8 terms W;  W' = [R | W];  H = W' A_pub + E_h, R and E_h fresh
    4. write W' for the server; V, scales and H for the client; sign what the client gets; one rename makes OUT appear
    5. create the ledger, or go on with the adapter's

R and E_h are one-time keys of W: two hints with the same ones would give away the difference of two versions. They come from the operating
system for every preparation, and E_h is not kept.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloven.bundle.partial_folder import partial_folder, require_new
from cloven.bundle.verification import sha256_file
from cloven.errors import BadInput
from cloven.field.gaussian import gaussians
from cloven.field.prg import KEY_BYTES
from cloven.field.products import multiply
from cloven.field.residues import add
from cloven.field.selection import select_backend
from cloven.masks.lwe_parameters import LweParameters
from cloven.masks.public_matrix import a_pub
from cloven.model.adapter import Adapter, LoraModule, read_adapter
from cloven.model.groups import trace_groups
from cloven.model.linears import linears_of, matrix_of
from cloven.model.source import Source, open_source, write_configuration
from cloven.private_lora.base import base_sha256, weight_files
from cloven.private_lora.config import PrivateLoraConfig, revealed_share
from cloven.private_lora.factors import Core, Quantised, factor, quantise
from cloven.private_lora.ledger import before, create_ledger, require_ledger_place
from cloven.private_lora.manifest import (
    SCHEME,
    SERVER_FILE,
    ClientGroup,
    ClientManifest,
    ClientModule,
    ServerGroup,
    ServerManifest,
    client_bundle_id,
)
from cloven.private_lora.names import CLIENT_FILE, basis_name, hint_name, scales_name

VERSION = 1
LEDGER_FILE = "ledger.sqlite"
SIGNING_KEY = "signing-key.pem"
_LIMITS = 127
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What a preparation made.

    Args:
        manifest, fingerprint: the client's manifest, and what clients pin.
        revealed: the largest share of a matrix that the budget gives away.
        quantisation_error: the largest relative error of a group's C in two int8 terms.
        earlier_budget: what the adapter's ledger allowed until now, for every bundle of the adapter; None where it is new.
    """

    manifest: ClientManifest
    fingerprint: str
    revealed: float
    quantisation_error: float
    earlier_budget: int | None


def prepare_private_lora(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    config: PrivateLoraConfig,
    *,
    ledger: str | Path | None = None,
    signing_key: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Prepared:
    """Make a private-LoRA bundle.

    Args:
        base: the public base: a model directory or a Hub id.
        adapter: a PEFT directory of a LoRA for that base.
        out: a folder that does not exist yet, or is empty.
        config: bits, hint and budget.
        ledger: the adapter's ledger; one that exists is gone on with. OUT/server/ledger.sqlite if not given.
        signing_key: Ed25519 private key in PEM, mode 0600, to sign OUT/client with; a fresh one in OUT/server if not given.
        progress: called with (stage, done, total).

    Raises:
        BadInput, UnsupportedModel: before anything is written.

    Guarantee: OUT/client holds the column space of every B, the norms of the rows of C, and hints that hide C under LWE (or statistically);
    what the answers give away is metered by the ledger, not hidden.
    """
    out = Path(out).expanduser().absolute()
    require_new(out)
    source = open_source(base)
    if source.folder is None:
        raise BadInput("the base must be a model directory or a Hub id: clients compare its files' hash")
    weight_files(source.folder)
    lora = read_adapter(Path(adapter).expanduser())
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(source.config, trust_remote_code=False)
    groups = _groups(skeleton, lora)
    place = Path(ledger).expanduser().absolute() if ledger is not None else out / "server" / LEDGER_FILE
    require_ledger_place(place, lora.sha256)
    rotation, earlier = before(place, lora.sha256)
    key = _signing_key(Path(signing_key).expanduser()) if signing_key is not None else Ed25519PrivateKey.generate()
    with partial_folder(out) as partial, torch.no_grad():
        client, server = partial / "client", partial / "server"
        client.mkdir(mode=0o755)
        server.mkdir(mode=0o700)
        progress("hash base", 0, 1)
        base_hash = base_sha256(source.folder)
        described, matrices, public, quantised = split_groups(groups, config.parameters, rotation, progress)
        if signing_key is None:
            _write_key(server / SIGNING_KEY, key)
        # A name that the base has: OUT/client then fails to load without `import cloven`, instead of running on random weights.
        public[next(iter(skeleton.state_dict()))] = torch.empty(0)
        save_file(public, client / CLIENT_FILE)
        manifest = ClientManifest(
            bundle="",
            nonce=secrets.token_hex(16),
            bits=config.bits,
            hint=config.hint,
            base=base_hash,
            base_name=source.hub_id or "",
            groups=described,
            signer=key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex(),
            files={CLIENT_FILE: sha256_file(client / CLIENT_FILE)},
        )
        manifest = replace(manifest, bundle=client_bundle_id(manifest))
        _write_configuration(source, skeleton, client, manifest)
        manifest = replace(manifest, files={path.name: sha256_file(path) for path in sorted(client.iterdir())})
        mark = manifest.write(client, key)
        for path in client.iterdir():
            path.chmod(0o644)
        write_server(server, manifest, matrices, quantised, lora.sha256, LEDGER_FILE if ledger is None else str(place))
    try:
        create_ledger(place, lora.sha256, config.budget_tokens, config.client_share, rotation)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # nothing can be served without a ledger
        raise
    pairs = zip(described, quantised, strict=True)
    shares = [revealed_share(config.budget_tokens, group.columns, config.bits, one.entropy) for group, one in pairs]
    return Prepared(manifest, mark, max(shares), max(one.error for one in quantised), earlier)


def _groups(skeleton: PreTrainedModel, adapter: Adapter) -> list[list[LoraModule]]:
    """The adapted modules by shared input; checked against the base's shapes. Modules whose product B A is zero are left out.

    Raises:
        BadInput: a module that the base lacks, or of another shape; nothing that has an effect.
    """
    config, linears = skeleton.config, linears_of(skeleton)
    adapted: dict[str, LoraModule] = {}
    for module in adapter.modules:
        if module.name not in linears:
            raise BadInput(f"the adapter is for another base: {config.model_type} has no linear layer {module.name}")
        outputs, inputs = matrix_of(linears[module.name]).shape
        if (module.b.shape[0], module.a.shape[1]) != (outputs, inputs):
            made_for = f"[{module.b.shape[0]}, {module.a.shape[1]}]"
            raise BadInput(f"the adapter is for another base: {module.name} is [{outputs}, {inputs}], the adapter's product is {made_for}")
        if (module.b @ module.a).any():
            adapted[module.name] = module
    if not adapted:
        raise BadInput("the adapter changes nothing: every product of its factors is zero")
    groups = [[adapted[name] for name in names if name in adapted] for names in trace_groups(config)]
    return [group for group in groups if group]


def split_groups(
    groups: list[list[LoraModule]], parameters: LweParameters, rotation: bytes, progress: Progress
) -> tuple[tuple[ClientGroup, ...], list[Tensor], dict[str, Tensor], list[Quantised]]:
    """Steps 2 and 3: what the client is told of every group, W' of every group, the client's tensors, and how C was quantised."""
    described: list[ClientGroup] = []
    matrices: list[Tensor] = []
    public: dict[str, Tensor] = {}
    all_quantised: list[Quantised] = []
    largest = parameters.pad_columns + max(group[0].a.shape[1] for group in groups)
    transposed = a_pub(largest).t().contiguous()  # [n, D]
    for index, group in enumerate(groups):
        progress("split", index, len(groups))
        cores = [factor(module, rotation) for module in group]
        quantised = quantise(torch.cat([core.rows for core in cores]))
        matrix, hint = with_pad(quantised.codes, parameters, transposed)
        matrices.append(matrix)
        all_quantised.append(quantised)
        public[hint_name(index)] = hint
        described.append(_describe(group, cores, quantised))
        public |= _client_tensors(index, cores, quantised)
    return tuple(described), matrices, public, all_quantised


def _describe(group: list[LoraModule], cores: list[Core], quantised: Quantised) -> ClientGroup:
    modules = tuple(ClientModule(core.name, *core.basis.shape) for core in cores)
    return ClientGroup(group[0].a.shape[1], quantised.l2, modules)


def _client_tensors(index: int, cores: list[Core], quantised: Quantised) -> dict[str, Tensor]:
    tensors = {scales_name(index): quantised.scales}
    for position, core in enumerate(cores):
        tensors[basis_name(index, position)] = core.basis.contiguous()
    return tensors


def with_pad(codes: Tensor, parameters: LweParameters, transposed: Tensor) -> tuple[Tensor, Tensor]:
    """W' = [R | W] and H = W' A_pub + E_h for int8 codes W [N, K], with fresh R and E_h.

    Args:
        transposed: A_pubᵀ, residues int32 [n, ≥ D].

    Returns:
        W' int8 [N, D], H residues int32 [N, n].
    """
    rows = codes.shape[0]
    pad = _draw_pad(rows, parameters)
    while float(pad.float().norm(dim=1).max()) > parameters.pad_norm:
        pad = _draw_pad(rows, parameters)
    matrix = torch.cat([pad, codes], dim=1).contiguous()
    backend = select_backend("cpu")
    hint = multiply(backend, transposed[:, : matrix.shape[1]].contiguous(), backend.place(matrix)).t().contiguous()
    if parameters.hint == "lwe":
        errors = gaussians([os.urandom(KEY_BYTES) for _ in range(rows)], parameters.n, parameters.sigma_hint)
        hint = add(hint, torch.from_numpy(errors.astype(np.int32)))
    return matrix, hint


def _draw_pad(rows: int, parameters: LweParameters) -> Tensor:
    """R: int8 [rows, pad_columns]."""
    if parameters.hint == "lwe":
        return torch.from_numpy(gaussians([os.urandom(KEY_BYTES) for _ in range(rows)], parameters.pad_columns, parameters.sigma_hint))
    words = np.frombuffer(secrets.token_bytes(8 * rows * parameters.pad_columns), "<u8")
    return torch.from_numpy((words % np.uint64(2 * _LIMITS + 1)).astype(np.int16) - _LIMITS).to(torch.int8).view(rows, -1)


def write_server(
    server: Path, client: ClientManifest, matrices: list[Tensor], quantised: list[Quantised], adapter: str, ledger: str
) -> None:
    """Write the server's half of a bundle: W' of every group, and the manifest; mode 0600."""
    (server / SERVER_FILE).touch(mode=0o600)
    save_file({str(index): matrix for index, matrix in enumerate(matrices)}, server / SERVER_FILE)
    ServerManifest(
        bundle=client.bundle,
        bits=client.bits,
        hint=client.hint,
        adapter=adapter,
        ledger=ledger,
        groups=tuple(
            ServerGroup(group.name, matrix.shape[0], matrix.shape[1], round(one.entropy, 3))
            for group, matrix, one in zip(client.groups, matrices, quantised, strict=True)
        ),
        files={SERVER_FILE: sha256_file(server / SERVER_FILE)},
    ).write(server)


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _signing_key(path: Path) -> Ed25519PrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise BadInput(f"{path}: a signing key must be closed to others: run chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not a readable Ed25519 private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path}: not an Ed25519 key")
    return key


def _write_configuration(source: Source, skeleton: PreTrainedModel, client: Path, manifest: ClientManifest) -> None:
    description: dict[str, Any] = {"scheme": SCHEME, "version": VERSION, "bundle": manifest.bundle, "model": {}}
    write_configuration(skeleton, client, description, dtype=str(source.config.dtype or torch.float32).removeprefix("torch."))
    assert source.folder is not None
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, client / generation.name)
    source.copy_files(client)
    source.copy_files(client, licences=True)
