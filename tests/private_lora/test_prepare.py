"""From a base and a PEFT adapter to OUT/client and OUT/server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cloven.errors import BadInput, ClovenError, LedgerUnusable
from cloven.field.gaussian import gaussians
from cloven.field.residues import P, is_residue
from cloven.masks.public_matrix import a_pub
from cloven.model.adapter import WEIGHTS, LoraModule, read_adapter
from cloven.private_lora import prepare as module
from cloven.private_lora.base import base_sha256
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import SERVER_FILE, ClientManifest, ServerManifest, fingerprint
from cloven.private_lora.names import CLIENT_FILE, basis_name, hint_name, scales_name
from cloven.private_lora.prepare import LEDGER_FILE, SIGNING_KEY, prepare_private_lora
from cloven.private_lora.witness import read_witness
from cloven.zoo.tiny import tiny_config
from tests.lora_bundles import FAMILIES, adapter_folder, base_model, client_manifest, lora_bundle, own_bundle, peft_adapter, plain, tensors
from tests.split_models import tiny, tiny_folder

CONFIG = PrivateLoraConfig(1000)
HINTS = ("lwe", "statistical")


def deltas(folder: Path) -> dict[str, Tensor]:
    """s·B A of every module."""
    return {m.name: m.scale * (m.b.double() @ m.a.double()) for m in read_adapter(folder).modules}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- what is written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_halves_make_the_adapter(family: str) -> None:
    """V · scales · W = s·B A for every adapted module; and every linear but the output is adapted."""
    out, expected = lora_bundle(family), deltas(adapter_folder(family))
    public, secret, found = tensors(out / "client" / CLIENT_FILE), tensors(out / "server" / SERVER_FILE), {}
    manifest = client_manifest(out)
    for index, group in enumerate(manifest.groups):
        w = secret[str(index)][:, manifest.parameters.pad_columns :].double() * public[scales_name(index)][:, None]
        both = w[: len(w) // 2] + w[len(w) // 2 :]
        for position, (module_, part) in enumerate(zip(group.modules, both.split([m.rank for m in group.modules]), strict=True)):
            found[module_.name] = public[basis_name(index, position)].double() @ part
    assert set(found) == set(expected)
    assert max(relative(found[name], expected[name]) for name in expected) < 5e-4


@pytest.mark.parametrize("hint", HINTS)
def test_the_hint_is_of_the_matrix(hint: str) -> None:
    out = lora_bundle(hint=hint)
    manifest = client_manifest(out)
    public, secret = tensors(out / "client" / CLIENT_FILE), tensors(out / "server" / SERVER_FILE)
    for index in range(len(manifest.groups)):
        w, h = secret[str(index)], public[hint_name(index)]
        assert is_residue(h) and h.shape == (manifest.groups[index].rows, 1280)
        a = a_pub(w.shape[1]).to(torch.int64)
        error = (h - w.to(torch.int64) @ a + P // 2) % P - P // 2
        if hint == "statistical":
            assert not error.any()
        else:
            assert int(error.abs().max()) <= 127 and 15 < float(error.double().std()) < 17
        pad = w[:, : manifest.parameters.pad_columns].double()
        deviation = 16 if hint == "lwe" else ((255**2 - 1) / 12) ** 0.5
        assert abs(float(pad.std()) / deviation - 1) < 0.05 and float(pad.norm(dim=1).max()) <= manifest.parameters.pad_norm


def test_groups_share_inputs_and_bounds_hold() -> None:
    out = lora_bundle()
    manifest, secret = client_manifest(out), tensors(out / "server" / SERVER_FILE)
    assert [group.name.replace("model.layers.0.", "") for group in manifest.groups[:4]] == [
        "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj+mlp.up_proj",
        "mlp.down_proj",
    ]
    for index, group in enumerate(manifest.groups):
        w = secret[str(index)][:, 1280:].double()
        assert w.shape == (group.rows, group.columns) and float(w.norm(dim=1).max()) <= group.l2 < 1.02 * float(w.norm(dim=1).max()) + 1


def test_what_each_half_says() -> None:
    out = lora_bundle()
    client, server = ClientManifest.read(out / "client"), ServerManifest.read(out / "server")
    assert client.bundle == server.bundle and client.base == base_sha256(tiny_folder("llama"))
    assert server.adapter == read_adapter(adapter_folder()).sha256 and server.ledger == LEDGER_FILE
    assert [group.name for group in server.groups] == [group.name for group in client.groups]
    assert {path.name for path in (out / "server").iterdir()} == {SERVER_FILE, SIGNING_KEY, LEDGER_FILE, "manifest.json"}
    assert server.adapter not in (out / "client" / "manifest.json").read_text(encoding="utf-8")
    config = json.loads((out / "client" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bundle"] == client.bundle and "ipc" not in str(config)


def test_modes() -> None:
    out = lora_bundle()
    for path in (out / "server").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert (out / "server").stat().st_mode & 0o777 == 0o700
    for path in (out / "client").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_the_result(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    made = prepare_private_lora(
        tiny_folder("llama"), adapter_folder(), out, PrivateLoraConfig(12), progress=lambda *stage: stages.append(stage)
    )
    assert made.manifest == ClientManifest.read(out / "client") and made.fingerprint == fingerprint(out / "client")
    assert 12 * 16 / (8 * 48) < made.revealed < 1.3 * 12 * 16 / (6 * 48)  # the narrowest matrix; its weights have 6 to 8 bits each
    assert stages[0] == ("hash base", 0, 1) and ("split", 7, 8) in stages
    ledger = Ledger(out / "server" / LEDGER_FILE, read_adapter(adapter_folder()).sha256)
    assert ledger.budget() == (12, 12) and ledger.accounts() == []
    ledger.close()


# --- what the client gets is not what the server keeps


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("hint", HINTS)
def test_nothing_secret_at_the_client(family: str, hint: str) -> None:
    """No tensor of OUT/client is A, B, C, W', R or what Gram–Schmidt makes of B; and V is a rotation of that."""
    out = lora_bundle(family, hint=hint)
    public = tensors(out / "client" / CLIENT_FILE)
    manifest, modules = client_manifest(out), {m.name: m for m in read_adapter(adapter_folder(family)).modules}
    secret: list[Tensor] = [*tensors(out / "server" / SERVER_FILE).values()]
    for module_ in modules.values():
        q, t = torch.linalg.qr(module_.b.double())
        u, s, v = torch.linalg.svd(module_.b.double() @ module_.a.double(), full_matrices=False)
        rank = module_.a.shape[0]
        secret += [module_.a, module_.b, q, t, t @ module_.a.double(), u[:, :rank], v[:rank], s[:rank], module_.b @ module_.a]
        secret += [torch.linalg.pinv(q) @ module_.b.double() @ module_.a.double()]
    for name, tensor in public.items():
        for other in secret:
            for turned in (other, other.t() if other.dim() == 2 else other):
                if turned.shape == tensor.shape and tensor.numel():
                    for sign in (1, -1):
                        assert relative(sign * tensor, turned) > 0.05, name
    for index, group in enumerate(manifest.groups):
        for position, described in enumerate(group.modules):
            v, b = public[basis_name(index, position)].double(), modules[described.name].b.double()
            assert float((v.t() @ v - torch.eye(described.rank)).abs().max()) < 1e-5  # orthonormal
            assert relative(v @ (v.t() @ b), b) < 1e-5  # and of B's columns
            q = torch.linalg.qr(b)[0]
            overlap = (q.t() @ v).abs()
            assert float(overlap.max(1).values.min()) < 0.999  # not its columns in another order


def test_no_bytes_of_the_adapter_in_the_clients_files() -> None:
    out = lora_bundle()
    factors = tensors(adapter_folder() / WEIGHTS)
    for path in (out / "client").iterdir():
        data = path.read_bytes()
        for tensor in factors.values():
            assert tensor.numpy().tobytes()[:16] not in data
        for matrix in tensors(out / "server" / SERVER_FILE).values():
            assert matrix[0, :24].numpy().tobytes() not in data


def test_two_preparations_share_the_rotation_and_nothing_else(tmp_path: Path) -> None:
    """One V and C, or several would give C Cᵀ; fresh R and E_h, or the hints of two versions would give their difference."""
    one = own_bundle(tmp_path / "one")
    two = own_bundle(tmp_path / "two", ledger=one / "server" / LEDGER_FILE)
    halves = [(tensors(o / "client" / CLIENT_FILE), tensors(o / "server" / SERVER_FILE)) for o in (one, two)]
    for name, tensor in halves[0][0].items():
        if name.endswith("hint"):
            assert relative(tensor, halves[1][0][name]) > 0.5, name
        else:
            assert torch.equal(tensor, halves[1][0][name]), name
    for name, matrix in halves[0][1].items():
        assert float((matrix[:, :1280] == halves[1][1][name][:, :1280]).double().mean()) < 0.1
    assert client_manifest(one).nonce != client_manifest(two).nonce and client_manifest(one).bundle != client_manifest(two).bundle
    assert client_manifest(one).signer != client_manifest(two).signer


def test_randomness_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 fresh bytes for every row of R and of E_h."""
    keys: list[bytes] = []
    original = gaussians
    monkeypatch.setattr(module, "gaussians", lambda given, *rest: (keys.extend(given), original(given, *rest))[1])
    parameters = CONFIG.parameters
    for _ in range(2):
        module.with_pad(torch.ones(5, 8, dtype=torch.int8), parameters, a_pub(1288).t().contiguous())
    assert len(keys) == 20 == len(set(keys)) and {len(key) for key in keys} == {32}


def test_a_pad_that_is_too_long_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([torch.full((2, 1280), 100, dtype=torch.int8), torch.ones(2, 1280, dtype=torch.int8)])
    monkeypatch.setattr(module, "_draw_pad", lambda *_: next(draws))
    matrix, _ = module.with_pad(torch.ones(2, 8, dtype=torch.int8), CONFIG.parameters, a_pub(1288).t().contiguous())
    assert (matrix == 1).all()


# --- what cannot be served is refused before anything is written


def refused(match: str, tmp_path: Path, base: Any, adapter: Path, **options: Any) -> None:
    with pytest.raises(ClovenError, match=match):
        prepare_private_lora(base, adapter, tmp_path / "out", CONFIG, **options)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def with_weights(tmp_path: Path, change: Any, family: str = "llama") -> Path:
    """A copy of the adapter with other tensors."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder(family), folder)
    save_file({name: value.contiguous() for name, value in change(tensors(folder / WEIGHTS)).items()}, folder / WEIGHTS)
    return folder


def test_a_module_that_the_base_lacks(tmp_path: Path) -> None:
    refused("gpt2 has no linear layer model.layers.0", tmp_path, tiny_folder("gpt2"), adapter_folder("llama"))


def test_a_module_of_another_shape(tmp_path: Path) -> None:
    def wider(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        return weights | {name: torch.ones(4, 49)}

    refused(r"up_proj is \[80, 48\], the adapter's product is \[80, 49\]", tmp_path, tiny_folder("llama"), with_weights(tmp_path, wider))


def test_an_adapter_of_another_size_of_the_family(tmp_path: Path) -> None:
    # head_dim 12 with 2 heads of keys against 4: k_proj is narrower
    refused("the adapter is for another base: .*_proj is", tmp_path, tiny_folder("llama"), adapter_of_mha(tmp_path))


def adapter_of_mha(tmp_path: Path) -> Path:
    peft_adapter(tmp_path / "mha", "llama-mha")
    return tmp_path / "mha"


def test_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    """As PEFT starts one: B is zero."""
    peft_adapter(tmp_path / "a", init_lora_weights=True)
    refused("changes nothing: every product of its factors is zero", tmp_path, tiny_folder("llama"), tmp_path / "a")


def test_modules_that_do_nothing_are_left_out(tmp_path: Path) -> None:
    def silent(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * 0 if "lora_B" in name and "q_proj" not in name else value for name, value in weights.items()}

    out = tmp_path / "out"
    prepare_private_lora(tiny_folder("llama"), with_weights(tmp_path, silent), out, CONFIG)
    assert [group.name for group in client_manifest(out).groups] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_a_module_whose_product_is_zero_is_left_out(tmp_path: Path) -> None:
    def crossed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
        a, b = weights[name.format("A")].clone(), weights[name.format("B")].clone()
        a[:2] = 0
        b[:, 2:] = 0
        return weights | {name.format("A"): a, name.format("B"): b}

    out = tmp_path / "out"
    prepare_private_lora(tiny_folder("llama"), with_weights(tmp_path, crossed), out, CONFIG)
    assert "model.layers.0.self_attn.o_proj" not in [group.name for group in client_manifest(out).groups]


def test_a_rank_above_the_outputs(tmp_path: Path) -> None:
    """k and v of the tiny Llama have 24 outputs: V of rank 32 has 24 columns."""
    peft_adapter(tmp_path / "a", r=32)
    out = tmp_path / "out"
    prepare_private_lora(tiny_folder("llama"), tmp_path / "a", out, CONFIG)
    public = tensors(out / "client" / CLIENT_FILE)
    for index, group in enumerate(client_manifest(out).groups):
        assert public[hint_name(index)].shape[0] == group.rows
        for position, described in enumerate(group.modules):
            assert public[basis_name(index, position)].shape == (described.outputs, described.rank)


def test_a_base_that_is_no_folder(tmp_path: Path) -> None:
    refused("the base must be a model directory", tmp_path, tiny("llama"), adapter_folder())


def test_a_base_without_safetensors(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused("no model.safetensors", tmp_path, tmp_path / "base", adapter_folder())


def test_a_model_that_is_not_supported(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    base.save_pretrained(tmp_path / "base")
    refused("mixtral", tmp_path, tmp_path / "base", adapter_folder())


def test_out_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(BadInput, match="exists already"):
        prepare_private_lora(tiny_folder("llama"), adapter_folder(), tmp_path / "out", CONFIG)
    assert read_witness(read_adapter(adapter_folder()).sha256) is None


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_state: Path) -> None:
    monkeypatch.setattr(module, "_write_configuration", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        prepare_private_lora(tiny_folder("llama"), adapter_folder(), tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == [] and not own_state.exists()


# --- the ledger


def test_a_new_bundle_of_the_same_adapter_does_not_reset_the_ledger(tmp_path: Path) -> None:
    one = own_bundle(tmp_path / "one", budget=500)
    place, adapter = one / "server" / LEDGER_FILE, read_adapter(adapter_folder()).sha256
    ledger = Ledger(place, adapter)
    ledger.charge("g", "c", 300)
    ledger.close()
    with pytest.raises(BadInput, match=f"has a ledger already: give --ledger {place}"):
        own_bundle(tmp_path / "two", budget=500)
    with pytest.raises(BadInput, match="has a ledger already"):
        own_bundle(tmp_path / "two", budget=500, ledger=tmp_path / "fresh.sqlite")
    assert not (tmp_path / "two").exists()
    two = own_bundle(tmp_path / "two", budget=600, ledger=place, bits=12, hint="statistical")
    server = ServerManifest.read(two / "server")
    assert server.ledger_path(two / "server") == place.resolve() and not (two / "server" / LEDGER_FILE).exists()
    ledger = Ledger(place, adapter)
    assert [account.rows for account in ledger.accounts()] == [300] and ledger.budget() == (600, 600)
    ledger.close()


def test_the_same_weights_for_another_base_have_the_same_ledger(tmp_path: Path) -> None:
    own_bundle(tmp_path / "one")
    with pytest.raises(BadInput, match="has a ledger already"):
        prepare_private_lora(tiny_folder("llama-tied"), adapter_folder(), tmp_path / "two", CONFIG)


def test_another_adapter_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    own_bundle(tmp_path / "one")
    own_bundle(tmp_path / "two", seed=1)
    with pytest.raises(LedgerUnusable, match="the ledger of another adapter"):
        own_bundle(tmp_path / "three", seed=2, ledger=tmp_path / "one" / "server" / LEDGER_FILE)
    assert not (tmp_path / "three").exists()


def test_a_ledger_elsewhere(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out", ledger=tmp_path / "l.sqlite")
    assert (tmp_path / "l.sqlite").stat().st_mode & 0o777 == 0o600
    assert ServerManifest.read(out / "server").ledger == str(tmp_path / "l.sqlite")


def test_a_bundle_without_a_ledger_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLOVEN_STATE", str(tmp_path / "file"))
    with pytest.raises(LedgerUnusable):
        own_bundle(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- signing keys


def pem(key: Any, encryption: Any = None) -> bytes:
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return data


def test_a_signing_key_of_ones_own(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    path.write_bytes(pem(key))
    out = own_bundle(tmp_path / "out", signing_key=path)
    assert client_manifest(out).signer == key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    assert str(client_manifest(out).signer) not in pem(key).decode()
    path.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        own_bundle(tmp_path / "out2", seed=1, signing_key=path)


@pytest.mark.parametrize("content", [b"", b"x", pem(ec.generate_private_key(ec.SECP256R1()))], ids=["empty", "garbage", "P-256"])
def test_no_signing_keys(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    path.write_bytes(content)
    refused("not an? (readable )?Ed25519", tmp_path, tiny_folder("llama"), adapter_folder(), signing_key=path)
    refused("not a readable Ed25519", tmp_path, tiny_folder("llama"), adapter_folder(), signing_key=tmp_path / "nowhere")


def test_the_key_that_prepare_makes_signs_again(tmp_path: Path) -> None:
    one = own_bundle(tmp_path / "one")
    two = own_bundle(tmp_path / "two", seed=1, signing_key=one / "server" / SIGNING_KEY)
    assert client_manifest(one).signer == client_manifest(two).signer


# --- other bases


def test_a_bf16_base_in_several_files(tmp_path: Path) -> None:
    model = base_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    out = tmp_path / "out"
    prepare_private_lora(tmp_path / "base", adapter_folder(), out, CONFIG)
    assert client_manifest(out).base == base_sha256(tmp_path / "base") != base_sha256(tiny_folder("llama"))
    assert json.loads((out / "client" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_generation_settings_are_copied(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "generation_config.json").read_text(encoding="utf-8")) | {"max_new_tokens": 7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "base" / "code.py").write_text("raise SystemExit")
    prepare_private_lora(tmp_path / "base", adapter_folder(), tmp_path / "out", CONFIG)
    copied = json.loads((tmp_path / "out" / "client" / "generation_config.json").read_text(encoding="utf-8"))
    assert copied["max_new_tokens"] == 7 and not (tmp_path / "out" / "client" / "code.py").exists()


def test_an_adapted_module_without_its_siblings(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "a", target_modules=["v_proj", "down_proj"])
    prepare_private_lora(tiny_folder("llama"), tmp_path / "a", tmp_path / "out", CONFIG)
    groups = [group.name.rpartition(".")[2] for group in client_manifest(tmp_path / "out").groups]
    assert groups == ["v_proj", "down_proj"] * 2


def test_modules_are_named_in_no_repr() -> None:
    assert "tensor" not in repr(LoraModule("m", torch.ones(1, 2), torch.ones(2, 1), 1.0))


def test_an_own_signing_key_stays_where_it_is(tmp_path: Path) -> None:
    """A copy at the server could sign in the owner's name."""
    key = tmp_path / "key.pem"
    made = own_bundle(tmp_path / "one")
    key.write_bytes((made / "server" / "signing-key.pem").read_bytes())
    key.chmod(0o600)
    out = own_bundle(tmp_path / "two", signing_key=key, ledger=made / "server" / LEDGER_FILE)
    assert client_manifest(out).signer == client_manifest(made).signer
    assert not (out / "server" / "signing-key.pem").exists()
