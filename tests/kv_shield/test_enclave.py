"""The enclave without a wire: its arithmetic, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cloven.bundle.manifest import MANIFEST
from cloven.bundle.verification import sha256_file
from cloven.errors import BadBundle, ClovenError, TamperedBundle
from cloven.kv_shield import enclave as module
from cloven.kv_shield.enclave import LEAST_BYTES, MAX_KEY_BYTES, Enclave
from cloven.kv_shield.manifest import KEYS_FILE
from cloven.kv_shield.messages import NO_SESSION, Label
from cloven.model.attention import rotary_module, rotation_function
from cloven.wire.schema import MalformedMessage
from tests.kv_bundles import FAMILIES, by_sequence, deviation, kv_bundle, positions_of, random_rows, small_enclave, stored_keys, tensors
from tests.kv_shield.sealing import sealing_bundle
from tests.split_models import tiny

H, G, D, RHO = 4, 2, 12, 16  # of the tiny llama
ME, YOU = "a" * 64, "b" * 64
LIMIT = 128


class Caller:
    """One peer's session."""

    def __init__(self, sequences: int = 1, family: str = "llama", enclave: Enclave | None = None) -> None:
        self.enclave = enclave or small_enclave("session", family)
        self.sequences = sequences
        self.name = self.enclave.open(sequences, ME)

    def key(self, rows: int = 3, first: int = 0, **change: Any) -> Tensor:
        layer = change.get("layer", 0)
        batch = change.get("batch", self.sequences)
        x = change.get("x", random_rows(batch, rows, self.enclave.widths_in(layer)))
        positions = change.get("positions", positions_of(batch, rows, first))
        return self.enclave.key(layer, x, positions, change.get("name", self.name), first, change.get("peer", ME))

    def restore(self, rows: int = 1, **change: Any) -> Tensor:
        layer = change.get("layer", 0)
        a = change.get("a", random_rows(change.get("batch", self.sequences), rows, self.enclave.width_keyed(layer)))
        return self.enclave.restore(layer, a, change.get("name", self.name), change.get("peer", ME))

    def drawn(self, layer: int = 0) -> Any:
        keys = self.enclave._sessions[self.name].keys[layer]
        return by_sequence(keys) if keys is not None else None


def refused(code: str, match: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(MalformedMessage, match=match) as caught:
        call(*arguments, **options)
    assert caught.value.code == code


def truly(family: str, qk: Tensor, positions: Tensor) -> Tensor:
    """q ‖ k normed and rotated by transformers: [B, S, W] -> [B, S, H + G, d]."""
    model = tiny(family)
    attention: Any = model.get_submodule(Enclave(kv_bundle(family, "session") / "trusted").manifest.layers[0].name)
    heads = qk.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q, k = heads[:, :H], heads[:, H:]
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    rotary: Any = rotary_module(model)
    if rotary is not None:
        q, k = rotation_function(attention)(q, k, *rotary(qk, positions.long()))
    return torch.cat([q, k], 1).transpose(1, 2)


# --- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
@torch.no_grad()
def test_permuted_rows_are_the_families_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    enclave, keys = small_enclave("permute", family), stored_keys(family)
    shape = enclave.manifest.layers[0]
    d, per_kv = shape.head_dim, shape.heads // shape.kv_heads
    pi = torch.cat([keys["0.qk"].repeat_interleave(per_kv, 0), keys["0.qk"]])
    x, positions = random_rows(2, 5, enclave.widths_in(0), dtype=dtype), positions_of(2, 5, 3)
    index = pi.expand(2, 5, *pi.shape)
    ours = enclave.key(0, torch.gather(x.unflatten(2, (-1, d)), 3, index).flatten(2), positions, NO_SESSION, 0, ME)
    expected = torch.gather(truly(family, x, positions).to(dtype), 3, index).flatten(2)
    tolerance = 0.0 if family != "qwen3" else (1e-6 if dtype == torch.float32 else 0.02)  # the sum in the norm runs in another order
    assert ours.dtype == dtype and deviation(ours, expected) <= tolerance


def test_restore_undoes_the_permutation_of_v() -> None:
    enclave, pi = small_enclave("permute"), stored_keys("llama")["0.v"]
    a = random_rows(2, 3, H, D)
    index = pi.repeat_interleave(H // G, 0).expand(2, 3, H, D)
    assert torch.equal(enclave.restore(0, torch.gather(a, 3, index).flatten(2), NO_SESSION, ME), a.flatten(2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_session_rows(family: str) -> None:
    """k' = [k, ν] F and v' = [v, ν] F_v of every sequence; q'·k' = q·k; restored attention output."""
    caller = Caller(2, family)
    shape = caller.enclave.manifest.layers[0]
    d, g, per_kv = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
    size = d + RHO
    x, positions = random_rows(2, 5, caller.enclave.widths_in(0)), positions_of(2, 5, 3)
    split = (shape.heads + g) * d
    true = truly(family, x[..., :split], positions)
    q, k, v = true[:, :, : shape.heads], true[:, :, shape.heads :], x[..., split:].unflatten(2, (g, d))
    keyed = caller.enclave.key(0, x, positions, caller.name, 0, ME).unflatten(2, (-1, size))
    keyed_q, keyed_k, keyed_v = keyed.split([shape.heads, g, g], 2)
    for row in range(2):
        key = caller.drawn()[row]
        for plain, hidden, matrix, inverse in ((k, keyed_k, key.k, key.k_inverse), (v, keyed_v, key.v, key.v_inverse)):
            opened = torch.einsum("sgi,gij->sgj", hidden[row], inverse)
            assert deviation(opened[..., :d], plain[row]) < 1e-5
            assert deviation(torch.einsum("sgi,gij->sgj", opened, matrix), hidden[row]) < 1e-5
            level = plain[row].pow(2).mean(-1).sqrt()
            noise = opened[..., d:].pow(2).mean(-1).sqrt() / level
            assert float(noise.min()) > 0.3 and float(noise.max()) < 2.5  # as large as the row it hides
            assert deviation(hidden[row][..., :d], plain[row]) > 0.1
    scores = torch.einsum("bshi,bthi->bhst", keyed_q, keyed_k.repeat_interleave(per_kv, 2))
    assert deviation(scores, torch.einsum("bshi,bthi->bhst", q, k.repeat_interleave(per_kv, 2))) < 1e-5
    p = torch.softmax(scores, -1)
    a = torch.einsum("bhst,bthi->bshi", p, keyed_v.repeat_interleave(per_kv, 2)).flatten(2)
    expected = torch.einsum("bhst,bthi->bshi", p, v.repeat_interleave(per_kv, 2)).flatten(2)
    assert deviation(caller.enclave.restore(0, a, caller.name, ME), expected) < 1e-5


def test_dtypes_come_back_as_they_were() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        caller = Caller()
        keyed = caller.key(x=random_rows(1, 3, caller.enclave.widths_in(0), dtype=dtype))
        assert keyed.dtype == dtype == caller.restore(a=random_rows(1, 1, H * (D + RHO), dtype=dtype)).dtype


def test_the_kept_tables_are_those_of_the_call() -> None:
    x = random_rows(1, 2, (H + G) * D)
    for mode_of_x in (torch.float32, torch.bfloat16):
        kept = small_enclave("permute")
        for first in (0, 5, 5, 0):
            for dtype in (torch.float32, mode_of_x):
                arguments = (0, x.to(dtype), positions_of(1, 2, first), NO_SESSION, 0, ME)
                assert torch.equal(kept.key(*arguments), small_enclave("permute").key(*arguments))


# --- keys are fresh


def test_two_sequences_of_a_batch_have_keys_of_their_own() -> None:
    caller = Caller(2)
    row = random_rows(1, 3, caller.enclave.widths_in(0))
    keyed = caller.key(x=row.expand(2, 3, -1).contiguous())
    one, two = caller.drawn()
    assert deviation(one.k, two.k) > 0.3 and deviation(one.v, two.v) > 0.3
    assert deviation(keyed[0], keyed[1]) > 0.3


def test_two_sessions_and_two_layers_have_keys_of_their_own() -> None:
    enclave = small_enclave()
    callers = [Caller(enclave=enclave) for _ in range(2)]
    assert callers[0].name != callers[1].name
    for caller in callers:
        caller.key()
        caller.key(layer=1)
    matrices = [m for caller in callers for layer in range(2) for key in caller.drawn(layer) for m in (key.k, key.v)]
    assert all(deviation(a, b) > 0.3 for i, a in enumerate(matrices) for b in matrices[:i])


def test_a_prefill_has_the_same_keys_as_its_decode() -> None:
    caller = Caller()
    caller.key(3)
    before = caller.drawn()[0].k.clone()
    caller.key(1, first=3)
    assert torch.equal(caller.drawn()[0].k, before)


def test_condition_of_the_keys_in_use() -> None:
    caller = Caller(3)
    caller.key()
    for key in caller.drawn():
        for matrix in (key.k, key.v):
            assert float(torch.linalg.cond(matrix.double()).max()) <= 10.01


def test_noise_is_fresh_for_every_row() -> None:
    caller = Caller()
    x = random_rows(1, 1, caller.enclave.widths_in(0)).expand(1, 2, -1).contiguous()
    keyed = caller.key(2, x=x, positions=torch.zeros(1, 2, dtype=torch.int32)).unflatten(2, (-1, D + RHO))[0]
    assert torch.allclose(keyed[0, :H], keyed[1, :H], atol=1e-5)  # q has none
    assert all(deviation(keyed[0, head], keyed[1, head]) > 0.1 for head in range(H, H + 2 * G))


def test_pad_rows_are_random() -> None:
    caller = Caller(2)
    x = random_rows(2, 40, caller.enclave.widths_in(0))
    x[:, :30] = x[:, :1]  # what a pad token gives
    positions = positions_of(2, 40)
    positions[0, :30] = -1
    keyed = caller.key(x=x, positions=positions).unflatten(2, (-1, D + RHO))
    opened = torch.einsum("sgi,gij->sgj", keyed[0, :, H : H + G], caller.drawn()[0].k_inverse)
    true = truly("llama", x[..., : (H + G) * D], positions.clamp_min(0))[0, :, H:]
    assert deviation(opened[30:, :, :D], true[30:]) < 1e-5
    assert deviation(opened[:30, :, :D], true[:30]) > 0.3
    pads = keyed[0, :30].flatten(1)
    assert float(torch.corrcoef(pads).fill_diagonal_(0).abs().max()) < 0.4  # no two alike
    assert torch.allclose(pads.std(), keyed[0, 30:].std(), rtol=0.5)
    opened_v = torch.einsum("sgi,gij->sgj", keyed[0, :30, H + G :], caller.drawn()[0].v_inverse)[..., :D]
    assert deviation(opened_v, x[0, :30, -G * D :].unflatten(1, (G, D))) > 0.3


def parts_of(keyed: Tensor) -> list[Tensor]:
    return list(keyed.split([H * (D + RHO), G * (D + RHO), G * (D + RHO)], -1))


def test_pads_are_as_large_as_their_sequences_own_rows_in_every_part() -> None:
    caller = Caller(3)
    x = random_rows(3, 60, caller.enclave.widths_in(0))
    x[..., -G * D :] *= 0.1  # v is smaller than k in every model
    x[1] *= 20
    positions = positions_of(3, 60).clone()
    positions[:2, :30] = -1
    for part in parts_of(caller.key(x=x, positions=positions)):
        for row in range(2):
            assert torch.allclose(part[row, :30].std(), part[row, 30:].std(), rtol=0.25)


def test_numbers_that_are_not_finite_stay_in_their_own_rows() -> None:
    caller = Caller(2)
    x = random_rows(2, 60, caller.enclave.widths_in(0))
    x[1, 5], x[0, 59] = float("inf"), float("nan")
    positions = positions_of(2, 60).clone()
    positions[0, :30] = -1
    keyed = caller.key(x=x, positions=positions)
    assert bool(keyed[0, :59].isfinite().all()) and not bool(keyed[1, 5].isfinite().all())
    for part in parts_of(keyed):
        assert torch.allclose(part[0, :30].std(), part[0, 30:59].std(), rtol=0.25)


def test_a_sequence_of_pads_beside_another() -> None:
    caller = Caller(2)
    x = 20 * random_rows(2, 40, caller.enclave.widths_in(0))
    positions = positions_of(2, 40).clone()
    positions[0] = -1
    for part in parts_of(caller.key(x=x, positions=positions)):
        assert torch.allclose(part[0].std(), part[1].std(), rtol=0.25)


def test_rows_that_are_all_pads() -> None:
    caller = Caller()
    keyed = caller.key(positions=torch.full((1, 3), -1, dtype=torch.int32))
    assert bool(keyed.isfinite().all()) and 0.7 < float(keyed.std()) < 1.3
    caller.key(1, first=3)  # their places count


# --- what is refused


def test_a_session_of_another_peer() -> None:
    caller = Caller()
    caller.key()
    for call in (caller.key, caller.restore):
        refused("session", "no such session of yours", call, peer=YOU)
    refused("session", "no such session of yours", caller.enclave.close, caller.name, YOU)
    caller.key(1, first=3)  # it still stands


def test_unknown_and_closed_sessions() -> None:
    caller = Caller()
    caller.key()
    for name in (bytes(16), b"\xff" * 16):
        refused("session", "no such session", caller.key, name=name)
        refused("session", "no such session", caller.restore, name=name)
        refused("session", "no such session", caller.enclave.close, name, ME)
    caller.enclave.close(caller.name, ME)
    refused("session", "no such session", caller.key, first=3)
    refused("session", "no such session", caller.restore)
    refused("session", "no such session", caller.enclave.close, caller.name, ME)


def test_each_place_is_keyed_once_and_in_order() -> None:
    caller = Caller()
    refused("session", "place 1 .* the next one is 0", caller.key, first=1)
    caller.key(3)
    for first in (0, 1, 2, 4, 100):
        refused("session", f"place {first} .* the next one is 3", caller.key, 1, first=first)
    caller.key(2, first=3)
    refused("session", "next one is 5", caller.key, 1, first=4)
    caller.key(1, layer=1)  # layers count for themselves
    refused("session", "next one is 1", caller.key, 1, layer=1)


def test_another_batch() -> None:
    caller = Caller(2)
    refused("session", "1 sequences, but .* 2", caller.key, batch=1)
    refused("session", "3 sequences", caller.key, batch=3)
    caller.key()
    refused("session", "other sequences, than were keyed", caller.restore, batch=1)


@pytest.mark.parametrize("mode", ["permute", "session"])
@pytest.mark.parametrize("position", [-2, LIMIT, LIMIT + 1, 2**31 - 1, -(2**31)])
def test_positions_out_of_range(mode: str, position: int) -> None:
    enclave = small_enclave(mode)
    name = enclave.open(1, ME) if mode == "session" else NO_SESSION
    x = random_rows(1, 2, enclave.widths_in(0))
    bad = torch.tensor([[0, position]], dtype=torch.int32)
    refused("size", "position outside 0 to 127", enclave.key, 0, x, bad, name, 0, ME)
    enclave.key(0, x, torch.tensor([[-1, LIMIT - 1]], dtype=torch.int32), name, 0, ME)  # nothing was keyed by the bad one


def test_layers_out_of_range() -> None:
    caller = Caller()
    x, a = random_rows(1, 1, caller.enclave.widths_in(0)), random_rows(1, 1, caller.enclave.width_keyed(0))
    for layer in (2, 2**63 - 1):
        refused("group", f"no layer {layer}: there are 2", caller.enclave.key, layer, x, positions_of(1, 1), caller.name, 0, ME)
        refused("group", "no layer", caller.enclave.restore, layer, a, caller.name, ME)


def test_restore_before_key() -> None:
    caller = Caller()
    refused("session", "than were keyed there", caller.restore)
    caller.key()
    refused("session", "than were keyed there", caller.restore, layer=1)
    caller.restore()
    refused("session", "more rows", caller.restore, rows=4)  # three were keyed


def test_keys_have_no_more_than_their_memory() -> None:
    """All peers together, and each half of it; small keys count for a mebibyte."""
    enclave, most = small_enclave(), MAX_KEY_BYTES // LEAST_BYTES
    names = [enclave.open(most // 4, ME) for _ in range(2)]
    refused("session", f"1 more sequences: one peer's keys may take 512 MiB, {most // 2} sequences here: close some", enclave.open, 1, ME)
    enclave.open(most // 2 - 1, YOU)
    refused("session", f"2 more sequences: all peers' keys may take 1024 MiB, {most} sequences here", enclave.open, 2, "c" * 64)
    enclave.open(1, "c" * 64)
    enclave.close(names[0], ME)
    refused("session", "one peer's", enclave.open, most // 4 + 1, ME)
    enclave.open(most // 4, ME)


def test_the_memory_of_keys_is_that_of_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller()
    caller.key()
    caller.key(layer=1)
    keys = [key for layer in range(2) for key in caller.drawn(layer)]
    size = sum(getattr(key, name).nbytes for key in keys for name in ("k", "k_inverse", "v", "v_inverse"))
    monkeypatch.setattr(module, "LEAST_BYTES", 1)
    monkeypatch.setattr(module, "MAX_KEY_BYTES", 6 * size)
    enclave = small_enclave()
    enclave.open(3, ME)
    refused("session", "3 sequences here", enclave.open, 1, ME)
    monkeypatch.setattr(module, "MAX_KEY_BYTES", 1)
    small_enclave().open(1, ME)  # a large model's only sequence


def test_sealing_in_permute_mode_is_bounded_too() -> None:
    enclave = Enclave(sealing_bundle("llama", "permute") / "trusted")
    enclave.open(512, ME)
    refused("session", "one peer's", enclave.open, 1, ME)


def test_a_session_has_no_more_rows_than_the_model_positions() -> None:
    caller = Caller()
    start = torch.zeros(1, LIMIT - 1, dtype=torch.int32)
    caller.key(LIMIT - 1, positions=start)
    refused("size", "129 rows in a cache: the model has 128 positions", caller.key, 2, LIMIT - 1, positions=start[:, :2])
    caller.key(1, LIMIT - 1)
    refused("size", "129 rows", caller.key, 1, LIMIT, positions=start[:, :1])


def test_no_sessions_in_permute_mode() -> None:
    refused("session", "no sessions", small_enclave("permute").open, 1, ME)


def test_idle_sessions_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    enclave = small_enclave()
    idle, used = Caller(enclave=enclave), Caller(enclave=enclave)
    idle.key()
    now[0] += module.IDLE_SECONDS - 1
    used.key()
    enclave.open(1, YOU)
    assert len(enclave._sessions) == 3  # not yet
    now[0] += 2
    enclave.open(1, YOU)
    refused("session", "no such session", idle.key, 1, first=3)
    used.key(1, first=3)


@pytest.mark.parametrize("mode", ["permute", "session"])
@pytest.mark.parametrize("state", ["sealed", "resuming"])
def test_sealed_caches_are_kept_for_thirty_days(mode: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    enclave = Enclave(sealing_bundle("llama", mode) / "trusted")
    name, label = enclave.open(1, ME), Label(0, "keys", 0, (4,), "uint8")
    blocks = [enclave.vault(name, ME).seal(replace(label, block=number), memoryview(b"rows")) for number in range(2)]
    enclave.vault(name, ME).end(2)
    if state == "resuming":
        enclave.vault(name, ME).unseal(label, 1, memoryview(blocks[0]))
    assert enclave.vault(name, ME).state == state
    now[0] += module.SEALED_SECONDS - 1
    enclave.open(1, YOU)
    vault = enclave.vault(name, ME)  # counts as use
    assert [vault.unseal(replace(label, block=number), 1, memoryview(block)) for number, block in enumerate(blocks)] == [b"rows"] * 2
    now[0] += module.IDLE_SECONDS + 1
    enclave.open(1, YOU)
    refused("session", "no such session", enclave.vault, name, ME)  # open again: an hour is enough
    assert module.SEALED_SECONDS == 30 * 24 * 3600


def test_a_sealed_cache_that_nobody_resumed_is_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    enclave = Enclave(sealing_bundle("llama", "session") / "trusted")
    name = enclave.open(1, ME)
    enclave.vault(name, ME).seal(Label(0, "keys", 0, (4,), "uint8"), memoryview(b"rows"))
    enclave.vault(name, ME).end(1)
    now[0] += module.SEALED_SECONDS + 1
    enclave.open(1, YOU)
    refused("session", "no such session", enclave.vault, name, ME)


def test_what_sealing_stops() -> None:
    """In session mode keying and restoring; permute mode's restoring knows of no session, as docs/threat-model.md says."""
    enclave = Enclave(sealing_bundle("llama", "session") / "trusted")
    caller = Caller(enclave=enclave)
    caller.key()
    enclave.vault(caller.name, ME).seal(Label(0, "keys", 0, (4,), "uint8"), memoryview(b"rows"))
    enclave.vault(caller.name, ME).end(1)
    refused("session", "the cache is sealed", caller.key, 1, first=3)
    refused("session", "the cache is sealed", caller.restore)
    permute = Enclave(sealing_bundle("llama", "permute") / "trusted")
    name = permute.open(1, ME)
    permute.vault(name, ME).seal(Label(0, "keys", 0, (4,), "uint8"), memoryview(b"rows"))
    permute.vault(name, ME).end(1)
    assert permute.restore(0, random_rows(1, 1, H * D), NO_SESSION, YOU).shape == (1, 1, H * D)


def test_repr_shows_nothing() -> None:
    caller = Caller()
    caller.key()
    assert repr(caller.enclave) == "Enclave(<secret>)"
    session = caller.enclave._sessions[caller.name]
    assert "tensor" not in repr(session) and "keys=" not in repr(session)


# --- files


def copied(tmp_path: Path, mode: str = "permute") -> Path:
    folder = tmp_path / "trusted"
    shutil.copytree(kv_bundle("qwen3", mode) / "trusted", folder)
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Other tensors, with the hash that the manifest promises."""
    stored = tensors(folder / KEYS_FILE)
    change(stored)
    save_file(stored, folder / KEYS_FILE)
    record = json.loads((folder / MANIFEST).read_text())
    record["files"][KEYS_FILE] = sha256_file(folder / KEYS_FILE)
    (folder / MANIFEST).write_text(json.dumps(record))


@pytest.mark.parametrize("place", [0, 7, 8, 50, -1, -100])
def test_a_changed_byte_of_the_keys(tmp_path: Path, place: int) -> None:
    folder = copied(tmp_path)
    content = bytearray((folder / KEYS_FILE).read_bytes())
    content[place] ^= 1
    (folder / KEYS_FILE).write_bytes(content)
    with pytest.raises(TamperedBundle, match=KEYS_FILE):
        Enclave(folder)


def test_no_keys(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / KEYS_FILE).unlink()
    with pytest.raises(BadBundle, match=KEYS_FILE):
        Enclave(folder)


def test_keys_of_another_bundle(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    shutil.copyfile(kv_bundle("llama", "permute") / "trusted" / KEYS_FILE, folder / KEYS_FILE)
    with pytest.raises(TamperedBundle):
        Enclave(folder)


@pytest.mark.parametrize("name", ["0.qk", "1.v", "0.q_norm", "rotary.sign", "rotary.scaling"])
def test_missing_tensors(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path)
    rewrite(folder, lambda stored: stored.pop(name))
    with pytest.raises(BadBundle, match="not the keys of this bundle"):
        Enclave(folder)


def test_a_keys_file_that_is_none(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / KEYS_FILE).write_bytes(b"\xff" * 100)
    record = json.loads((folder / MANIFEST).read_text())
    record["files"][KEYS_FILE] = sha256_file(folder / KEYS_FILE)
    (folder / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(BadBundle, match="not the keys of this bundle"):
        Enclave(folder)


@pytest.mark.parametrize(("name", "value"), [("frequency", -1), ("frequency", 99), ("sign", 2), ("frequency", "beyond")])
def test_a_rotation_that_looks_beside_its_tables(tmp_path: Path, name: str, value: int | str) -> None:
    folder = copied(tmp_path)

    def change(stored: dict[str, Tensor]) -> None:
        stored[f"rotary.{name}"][0] = len(stored["rotary.frequencies"]) if isinstance(value, str) else value

    rewrite(folder, change)
    with pytest.raises(BadBundle, match="not the keys of this bundle"):
        Enclave(folder)


def test_missing_rotation(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    rewrite(folder, lambda stored: stored.pop("rotary.frequencies"))
    with pytest.raises(BadBundle, match="not the keys of this bundle"):
        Enclave(folder)


@pytest.mark.parametrize("kind", ["short", "long", "not a permutation", "float"])
def test_permutations_that_are_none(tmp_path: Path, kind: str) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        pi = stored["0.qk"]
        stored["0.qk"] = {
            "short": pi[:, :-1].contiguous(),
            "long": torch.cat([pi, pi]),
            "not a permutation": torch.zeros_like(pi),
            "float": pi + 0.5,
        }[kind]

    folder = copied(tmp_path)
    rewrite(folder, change)
    with pytest.raises(ClovenError):
        Enclave(folder)


def test_the_exposed_half_is_no_enclave() -> None:
    with pytest.raises(BadBundle, match="half"):
        Enclave(kv_bundle("llama", "permute") / "exposed")
