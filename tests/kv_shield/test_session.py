"""The accelerator's side: which session a cache has, how it is attached, and how it fails."""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import cloven
from cloven.errors import (
    BadBundle,
    BadInput,
    ClovenError,
    ForeignBundle,
    PeerRefused,
    RunError,
    SessionClosed,
    WorkerRefused,
    WorkerUnreachable,
)
from cloven.kv_shield import session as module
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.messages import ENCLAVE, Close, Key, Open
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.kv_shield.service import EnclaveServer
from cloven.model.cache_argument import cache_of, with_cache
from cloven.model.registration import ClovenConfig
from cloven.zoo.tiny import tiny_model
from tests.kv_bundles import (
    FLOAT32_TOLERANCE,
    MODES,
    Attached,
    RecordingServer,
    attached,
    deviation,
    enclave,
    enclave_at,
    ids_of,
    kv_bundle,
    load,
    padded,
)
from tests.split_models import logits, tiny

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # transformers says so of its own way
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def kinds(server: RecordingServer) -> list[type]:
    return [type(ENCLAVE.unpack(list(frames))[0]) for frames in server.received]


def address_in(folder: Path) -> str:
    return f"ipc://{folder}/s"


# --- attaching


@pytest.mark.parametrize("mode", MODES)
def test_attached_by_argument_and_by_environment(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(tiny("llama"), ids_of(1, 4))
    with enclave(kv_bundle("llama", mode) / "trusted") as (address, _):
        by_argument = load(kv_bundle("llama", mode), quantization_config=ClovenConfig(enclave=address, timeout=5))
        monkeypatch.setenv("CLOVEN_ENCLAVE", address)
        by_environment = load(kv_bundle("llama", mode))
        for model in (by_argument, by_environment):
            assert deviation(logits(model, ids_of(1, 4)), expected) < FLOAT32_TOLERANCE
            session = cloven.model.runtime.session_of(model)
            assert session is not None
            session.close()


def test_a_workers_address_is_not_the_enclaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_WORKER", "ipc:///nowhere/w")
    load(kv_bundle("llama", "permute"))  # nobody is asked


@pytest.mark.parametrize("mode", MODES)
def test_two_calls_per_layer(mode: str) -> None:
    with attached("llama", mode) as a:
        logits(a.model, ids_of(2, 5))
        statistics = a.session.statistics()
        expected = [
            "model.layers.0.self_attn",
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.self_attn",
            "model.layers.1.self_attn.o_proj",
        ]
        assert [name for name in statistics if name not in ("open", "step")] == expected
        assert ("open" in statistics) == (mode == "session")
        assert all(record.exchanges == 1 for record in statistics.values())


def test_gpt2_makes_no_rotary_call() -> None:
    with attached("gpt2", "permute") as a:
        logits(a.model, ids_of(2, 5))
        called = [name for name in a.session.statistics() if name != "step"]
        assert called == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]


def test_attaching_again_ends_the_first_session() -> None:
    with attached("llama", "session") as a:
        again = cloven.attach(a.model, str(a.session.channel.address), timeout=5)
        assert a.session.closed
        assert deviation(logits(a.model, ids_of(1, 4)), logits(a.plain, ids_of(1, 4))) < FLOAT32_TOLERANCE
        again.close()
        with pytest.raises(SessionClosed):
            logits(a.model, ids_of(1, 4))


def test_only_the_exposed_half_is_attached() -> None:
    with pytest.raises(BadInput):
        cloven.attach(tiny("llama"), "ipc:///nowhere/w")
    with pytest.raises((BadBundle, OSError, ValueError)):
        load(kv_bundle("llama", "permute").parent / "nowhere")


# --- another enclave


@pytest.mark.parametrize("mode", MODES)
def test_an_enclave_of_another_bundle(mode: str) -> None:
    with enclave(kv_bundle("qwen3", mode) / "trusted") as (address, _):
        model = load(kv_bundle("llama", mode))
        with pytest.raises(ForeignBundle, match="holds the keys of bundle"):
            cloven.attach(model, address, timeout=5)
        with pytest.raises(ForeignBundle):
            load(kv_bundle("llama", mode), quantization_config=ClovenConfig(enclave=address, timeout=5))


def test_two_bundles_of_one_model(tmp_path: Path) -> None:
    prepare_kv_shield(tiny("llama"), tmp_path / "out")
    with enclave(tmp_path / "out" / "trusted") as (address, _):
        with pytest.raises(ForeignBundle):
            cloven.attach(load(kv_bundle("llama", "permute")), address, timeout=5)
        with pytest.raises(ForeignBundle):
            cloven.attach(load(kv_bundle("llama", "session")), address, timeout=5)


def foreign(first: Any, second: Any, tmp_path: Path, **settings: Any) -> None:
    """The enclave of the second model's bundle must not serve the first one's."""
    prepare_kv_shield(first, tmp_path / "first", KvShieldConfig("session"))
    prepare_kv_shield(second, tmp_path / "second", KvShieldConfig("session", **settings))
    with enclave(tmp_path / "second" / "trusted") as (address, _):
        model = load(tmp_path / "first")
        with pytest.raises(ForeignBundle), cloven.attach(model, address, timeout=5):
            pass


ID = "bug: the bundle id covers layers and weight files, not what the enclave computes with: "


def test_models_that_differ_in_the_norms_only(tmp_path: Path) -> None:
    other = tiny_model("qwen3")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_norm.weight.add_(1)
    foreign(tiny("qwen3"), other, tmp_path)


def test_models_that_differ_in_the_rotation_only(tmp_path: Path) -> None:
    other = tiny_model("llama")
    other.model.rotary_emb.inv_freq.mul_(3)
    foreign(tiny("llama"), other, tmp_path)


def test_bundles_that_differ_in_the_noise_only(tmp_path: Path) -> None:
    foreign(tiny("llama"), tiny("llama"), tmp_path, noise_dims=8)


# --- sessions of caches


def test_every_cache_has_a_session_of_its_own() -> None:
    with attached("llama", "session") as a:
        caches = [cache_of(a.model(input_ids=ids_of(1, 5), use_cache=True)) for _ in range(3)]
        assert len(a.enclave._sessions) == 3
        values = [cache.layers[0].values for cache in caches]
        assert deviation(values[0], values[1]) > 0.1  # the same tokens
        for cache in caches:  # interleaved
            ours = logits(a.model, ids_of(1, 1, 1), **with_cache(cache))
            expected = logits(a.plain, torch.cat([ids_of(1, 5), ids_of(1, 1, 1)], 1))[:, -1:]
            assert deviation(ours, expected) < FLOAT32_TOLERANCE


def test_sessions_end_with_their_caches() -> None:
    with attached("llama", "session", RecordingServer) as a:
        for _ in range(4):
            a.model.generate(ids_of(1, 4), max_new_tokens=2, **GREEDY)
        gc.collect()
        logits(a.model, ids_of(1, 3), use_cache=False)
        logits(a.model, ids_of(1, 3), use_cache=False)
        assert len(a.enclave._sessions) == 1  # the last call's own, which ends with the next
        assert kinds(a.server).count(Open) == 6 and kinds(a.server).count(Close) == 5


def in_threads(a: Attached, count: int, until: threading.Event | None = None) -> list[threading.Thread]:
    """Calls without a cache, each in a thread of its own, that ends at once or waits; returns when all calls are made."""
    done = threading.Barrier(count + 1)

    def call(seed: int) -> None:
        logits(a.model, ids_of(1, 4, seed), use_cache=False)
        done.wait(20)
        if until is not None:
            until.wait(20)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    done.wait(20)
    return threads


def test_sessions_without_a_cache_end_with_their_threads() -> None:
    with attached("llama", "session") as a:
        for thread in in_threads(a, 5):
            thread.join(20)
        assert len(a.enclave._sessions) == 5
        gc.collect()
        logits(a.model, ids_of(1, 3), use_cache=False)
        assert len(a.enclave._sessions) == 1


def test_closing_ends_the_sessions_of_other_threads() -> None:
    with attached("llama", "session") as a:
        release = threading.Event()
        threads = in_threads(a, 3, release)
        logits(a.model, ids_of(1, 3), use_cache=False)
        assert len(a.enclave._sessions) == 4
        a.session.close()
        assert not a.enclave._sessions
        release.set()
        for thread in threads:
            thread.join(20)


def test_closing_drops_the_keys_in_the_enclave() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(1, 5), use_cache=True))
        a.session.close()
        assert cache is not None and not a.enclave._sessions


def test_one_session_for_a_batch_and_keys_for_every_row() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(1, 5).expand(3, 5), use_cache=True))
        assert len(a.enclave._sessions) == 1 and len(a.keys(0)) == 3
        values = cache.layers[0].values
        assert deviation(values[0], values[1]) > 0.1 and deviation(values[1], values[2]) > 0.1


def test_a_copied_cache_is_refused() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(1, 5), use_cache=True))
        with pytest.raises(WorkerRefused, match="each is keyed once"):
            logits(a.model, ids_of(1, 1), **with_cache(copy.deepcopy(cache)))
        logits(a.model, ids_of(1, 1), **with_cache(cache))  # the true one goes on


def test_a_cropped_cache_is_refused() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(1, 5), use_cache=True))
        cache.crop(-2)
        with pytest.raises(WorkerRefused, match="each is keyed once"):
            logits(a.model, ids_of(1, 1), **with_cache(cache))


@pytest.mark.parametrize("change", ["reorder", "select"])
def test_a_reordered_cache_is_refused(change: str) -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(2, 5), use_cache=True))
        with pytest.raises(ClovenError):
            if change == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
            else:
                cache.batch_select_indices(torch.tensor([1, 1]))
            logits(a.model, ids_of(2, 1), **with_cache(cache))


def test_another_batch_on_the_same_cache_is_refused() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(2, 5), use_cache=True))
        with pytest.raises(BadInput, match="no beam search"):
            cache.batch_repeat_interleave(2)
        for layer in cache.layers:  # behind the session's back
            layer.batch_repeat_interleave(2)
        with pytest.raises(WorkerRefused, match="the session was opened for 2"):
            logits(a.model, ids_of(4, 1), **with_cache(cache))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beam_search_in_permute_mode(family: str) -> None:
    with attached(family, "permute") as a:
        options = {**GREEDY, "num_beams": 3, "max_new_tokens": 10}
        assert torch.equal(a.model.generate(ids_of(2, 5), **options), a.plain.generate(ids_of(2, 5), **options))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beam_search_in_session_mode_is_a_clear_error(family: str) -> None:
    with attached(family, "session") as a, pytest.raises(ClovenError):
        a.model.generate(ids_of(1, 5), num_beams=3, max_new_tokens=8, **GREEDY)


def test_sampling_several_sequences_in_session_mode() -> None:
    with attached("llama", "session") as a:
        ids = ids_of(1, 5).expand(3, 5)
        assert torch.equal(a.model.generate(ids, max_new_tokens=6, **GREEDY), a.plain.generate(ids, max_new_tokens=6, **GREEDY))


def test_a_static_cache_in_session_mode_is_a_clear_error() -> None:
    with attached("llama", "session") as a:
        with pytest.raises(BadInput, match="mask"):
            a.model.generate(ids_of(1, 5), cache_implementation="static", max_new_tokens=4, **GREEDY)
        assert deviation(logits(a.model, ids_of(1, 5)), logits(a.plain, ids_of(1, 5))) < FLOAT32_TOLERANCE  # it lives on


def test_a_static_cache_given_by_hand_is_exact_or_refused() -> None:
    with attached("llama", "session") as a:
        ids, cache = ids_of(1, 8), StaticCache(a.model.config, max_cache_len=20)
        try:
            logits(a.model, ids[:, :5], **with_cache(cache))
            ours = logits(a.model, ids[:, 5:], **with_cache(cache))
        except ClovenError:
            return
        assert deviation(ours, logits(a.plain, ids)[:, 5:]) < FLOAT32_TOLERANCE


# --- masks


def in_pieces(model: Any, ids: Tensor, mask: Tensor, cache: Any, grows: bool = False) -> Tensor:
    """Logits of a prompt in three pieces, all with the whole mask (or, where it `grows`, with what stands there so far)."""
    rows = []
    for start, end in ((0, 5), (5, 8), (8, 10)):
        so_far = torch.where(torch.arange(mask.shape[1]) < end, mask, 0) if grows else mask
        rows.append(logits(model, ids[:, start:end], attention_mask=so_far, **with_cache(cache)))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("pads", ["left", "right", "behind"])
def test_a_mask_is_read_by_place(family: str, mode: str, pads: str) -> None:
    """A row's column is its place in the cache, however long the mask is."""
    ids, mask = ids_of(2, 10), torch.ones(2, 20 if pads == "behind" else 10, dtype=torch.long)
    mask[0, {"left": slice(0, 3), "right": slice(7, 10), "behind": slice(10, 20)}[pads]] = 0
    with attached(family, mode) as a:
        expected, ours = (in_pieces(model, ids, mask, DynamicCache(config=model.config)) for model in (a.plain, a.model))
        real = mask[:, :10].bool()
        assert deviation(ours[real], expected[real]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_static_cache_by_hand_with_a_mask_of_its_length(family: str) -> None:
    with attached(family, "session") as a:
        ids, mask = ids_of(2, 10), torch.ones(2, 20, dtype=torch.long)
        mask[0, :3] = 0
        caches = [StaticCache(config=model.config, max_cache_len=20) for model in (a.plain, a.model)]
        expected, ours = (in_pieces(m, ids, mask, cache, grows=True) for m, cache in zip((a.plain, a.model), caches, strict=True))
        real = mask[:, :10].bool()
        assert deviation(ours[real], expected[real]) < FLOAT32_TOLERANCE


def test_tokens_with_a_mask_of_the_whole_conversation_to_come() -> None:
    with attached("llama", "session") as a:
        chosen = []
        for model in (a.plain, a.model):
            cache, x, mask, tokens = DynamicCache(config=model.config), ids_of(1, 8, 3), torch.zeros(1, 24, dtype=torch.long), []
            mask[:, :8] = 1
            for place in range(8, 14):
                x = logits(model, x, attention_mask=mask, **with_cache(cache))[:, -1:].argmax(-1)
                mask[:, place] = 1
                tokens.append(int(x))
            chosen.append(tokens)
        assert chosen[0] == chosen[1]


def test_the_pads_of_every_piece_are_the_masks() -> None:
    ids, mask = ids_of(2, 10), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with attached("llama", "session", RecordingServer) as a:
        in_pieces(a.model, ids, mask, DynamicCache(config=a.model.config))
        told = []
        for frames in a.server.received:
            message, payload = ENCLAVE.unpack(list(frames))
            if isinstance(message, Key) and message.layer == 1:
                assert payload is not None
                told.append(torch.frombuffer(bytearray(payload[: 8 * message.rows]), dtype=torch.int32).view(2, -1) < 0)
        assert torch.equal(torch.cat(told, 1), mask[:, :10] == 0)


def test_a_mask_that_is_too_short_is_refused() -> None:
    with attached("llama", "session") as a:
        cache = cache_of(a.model(input_ids=ids_of(1, 5), use_cache=True))
        with pytest.raises(BadInput, match="a mask of 6 rows: the cache has 5 and the call 2 more"):
            logits(a.model, ids_of(1, 2), attention_mask=torch.ones(1, 6, dtype=torch.long), **with_cache(cache))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_layer_by_itself_has_its_own_positions(mode: str) -> None:
    with attached("llama", mode) as a:
        ids, positions, outputs = ids_of(2, 10), torch.arange(10)[None] * 7, []
        for model in (a.plain, a.model):
            model(input_ids=ids)  # of the same shape, at 0 to 9
            hidden = model.model.embed_tokens(ids)
            rotation = model.model.rotary_emb(hidden, positions)
            outputs.append(model.model.layers[0].self_attn(hidden, position_embeddings=rotation, attention_mask=None)[0])
        assert deviation(outputs[1], outputs[0]) < FLOAT32_TOLERANCE


def test_masks_of_four_dimensions_are_refused_in_session_mode() -> None:
    with attached("llama", "session") as a, pytest.raises(BadInput, match="mask"):
        logits(a.model, ids_of(1, 3), attention_mask=torch.zeros(1, 1, 3, 3))


# --- exchanges


@pytest.mark.parametrize("mode", MODES)
def test_long_prefills_are_cut_into_exchanges(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded(2, 21, (5, 0))
    with attached("qwen3", mode, RecordingServer) as a:
        monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 6000)
        expected = logits(a.plain, ids, attention_mask=mask)[mask.bool()]
        assert deviation(logits(a.model, ids, attention_mask=mask)[mask.bool()], expected) < FLOAT32_TOLERANCE
        assert kinds(a.server).count(Key) > 4
        assert all(sum(map(len, frames[1:])) <= 6000 for frames in a.server.received + a.server.sent)


@pytest.mark.parametrize("mode", MODES)
def test_two_threads(mode: str) -> None:
    with attached("llama", mode) as a:
        wrong: list[int] = []

        def run(seed: int) -> None:
            for i in range(3):
                ids = ids_of(1, 4 + seed, 10 * seed + i)
                ours = a.model.generate(ids, max_new_tokens=5, **GREEDY)
                if not torch.equal(ours, a.plain.generate(ids, max_new_tokens=5, **GREEDY)):
                    wrong.append(seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not wrong


def test_pads_and_positions_reach_the_enclave() -> None:
    ids, mask = padded(2, 6, (2, 0))
    for mode in MODES:
        with attached("llama", mode, RecordingServer) as a:
            logits(a.model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
            frames = next(f for f in a.server.received if isinstance(ENCLAVE.unpack(list(f))[0], Key))
            positions = torch.frombuffer(bytearray(frames[1][:48]), dtype=torch.int32).view(2, 6).tolist()
            pad = -1 if mode == "session" else 0
            assert positions == [[pad, pad, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


# --- bad input and bad days


def test_no_enclave() -> None:
    with tempfile.TemporaryDirectory(prefix="c-") as folder:
        with pytest.raises(WorkerUnreachable):
            cloven.attach(load(kv_bundle("llama", "session")), address_in(Path(folder)), timeout=0.3)
        with pytest.raises(WorkerUnreachable):
            load(kv_bundle("llama", "session"), quantization_config=ClovenConfig(enclave=address_in(Path(folder)), timeout=0.3))


def test_the_error_names_the_enclave(socket_folder: Path) -> None:
    with pytest.raises(WorkerUnreachable) as caught:
        cloven.attach(load(kv_bundle("llama", "session")), address_in(socket_folder), timeout=0.3)
    assert "enclave" in str(caught.value) and "cloven worker" not in str(caught.value)


def test_a_socket_folder_open_to_others(socket_folder: Path) -> None:
    socket_folder.chmod(0o755)
    with pytest.raises(PeerRefused, match="0700"):
        cloven.attach(load(kv_bundle("llama", "session")), address_in(socket_folder), timeout=0.3)


class Dying(EnclaveServer):
    """Stops after some answers."""

    most = 20

    def answer(self, frames: list[Any], peer: str) -> list[Any]:
        answer = super().answer(frames, peer)
        if self.answered >= self.most:
            self.stop()
        return answer


@pytest.mark.parametrize("mode", MODES)
def test_an_enclave_that_dies_while_generating(mode: str) -> None:
    with attached("llama", mode, Dying, timeout=1) as a, pytest.raises(RunError, match=r"no (worker|enclave) at|no answer from"):
        a.model.generate(ids_of(1, 5), max_new_tokens=30, **GREEDY)


def test_an_enclave_that_was_restarted_refuses_old_caches(socket_folder: Path) -> None:
    address, trusted = address_in(socket_folder), kv_bundle("llama", "session") / "trusted"
    with enclave_at(trusted, address):
        model = load(kv_bundle("llama", "session"))
        session = cloven.attach(model, address, timeout=5)
        cache = cache_of(model(input_ids=ids_of(1, 5), use_cache=True))
    with enclave_at(trusted, address), session:
        with pytest.raises(WorkerRefused, match="the enclave was restarted"):
            logits(model, ids_of(1, 1), **with_cache(cache))
        fresh = DynamicCache()  # a new conversation works
        assert deviation(logits(model, ids_of(1, 4), **with_cache(fresh)), logits(tiny("llama"), ids_of(1, 4))) < FLOAT32_TOLERANCE


def test_a_cache_that_ended_while_the_enclave_was_away(socket_folder: Path) -> None:
    address, trusted = address_in(socket_folder), kv_bundle("llama", "session") / "trusted"
    with enclave_at(trusted, address):
        model = load(kv_bundle("llama", "session"))
        session = cloven.attach(model, address, timeout=5)
        model.generate(ids_of(1, 4), max_new_tokens=3, **GREEDY)
        gc.collect()
    with enclave_at(trusted, address), session:
        logits(model, ids_of(1, 4))


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_longer_than_the_model_was_made_for(mode: str) -> None:
    with attached("llama", mode) as a:
        logits(a.model, ids_of(1, 128))
        with pytest.raises(WorkerRefused, match="position outside 0 to 127"):
            logits(a.model, ids_of(1, 129))


@pytest.mark.parametrize("mode", MODES)
def test_a_dtype_that_is_not_spoken(mode: str) -> None:
    with enclave(kv_bundle("llama", mode) / "trusted") as (address, _):
        model = load(kv_bundle("llama", mode), torch.float64)
        with cloven.attach(model, address, timeout=5), pytest.raises(BadInput, match=r"not torch\.float64"):
            logits(model, ids_of(1, 3))


def test_a_batch_larger_than_the_enclave_takes() -> None:
    with attached("llama", "session") as a:
        with pytest.raises(WorkerRefused, match="512 sequences here"):
            logits(a.model, ids_of(1025, 1))
        assert deviation(logits(a.model, ids_of(2, 3)), logits(a.plain, ids_of(2, 3))) < FLOAT32_TOLERANCE


def test_a_changed_exposed_half(tmp_path: Path) -> None:
    shutil.copytree(kv_bundle("llama", "permute"), tmp_path / "out")
    for name in ("config.json", "model-00001.safetensors", "manifest.json"):
        path = tmp_path / "out" / "exposed" / name
        before = path.read_bytes()
        path.write_bytes(
            before.replace(b'"rope_theta": 10000.0', b'"rope_theta": 10001.0') if name == "config.json" else before[:-9] + bytes(9)
        )
        assert path.read_bytes() != before
        with pytest.raises(ClovenError):
            load(tmp_path / "out")
        path.write_bytes(before)
    load(tmp_path / "out")


def test_repr_shows_nothing() -> None:
    with attached("llama", "session") as a:
        logits(a.model, ids_of(1, 3))
        name = next(iter(a.enclave._sessions))
        assert name.hex() not in repr(a.session) and "open" in repr(a.session)
