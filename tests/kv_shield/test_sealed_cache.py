from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import cloven
from cloven.errors import BadInput, ClovenError, RunError, WorkerRefused
from cloven.kv_shield import sealed_cache
from cloven.kv_shield.messages import ENCLAVE, TAG_BYTES, Label, Seal, SealEnd
from cloven.kv_shield.preallocated import PreallocatedCache
from cloven.kv_shield.sealed_cache import SealedCache
from cloven.kv_shield.service import EnclaveServer
from cloven.kv_shield.session import KvSession
from tests.kv_bundles import Attached, attached, enclave, enclave_at, ids_of, load
from tests.kv_shield.sealing import KINDS, PROMPT, ROOM, attached_sealing, greedy_ids, sealing_bundle
from tests.split_models import run_python, tiny

Change = Callable[[tuple[Any, ...]], tuple[Any, ...]]


@pytest.fixture(scope="module", params=["permute", "session"])
def keyed(request: pytest.FixtureRequest) -> Iterator[Attached]:
    """The tiny Llama in both modes."""
    with attached_sealing("llama", request.param) as it:
        yield it


@pytest.fixture(scope="module")
def permuted() -> Iterator[Attached]:
    with attached_sealing("llama", "permute") as it:
        yield it


def filled(it: Attached, kind: str, tokens: int = 6) -> tuple[Any, Tensor]:
    """A cache after a prompt and a few tokens, and the text."""
    cache = KINDS[kind](it.model.config)
    return cache, greedy_ids(it.model, ids_of(1, PROMPT), tokens, cache)


def storages(cache: Any) -> list[Tensor]:
    """All bytes of a cache's memory, shared with it: uint8 [n] per tensor."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in tensors]


def kinds_of(mode: str) -> list[str]:
    return [kind for kind in KINDS if kind != "static" or mode == "permute"]


# there and back


def test_the_text_goes_on_as_if_nothing_had_been(keyed: Attached) -> None:
    expected = greedy_ids(keyed.plain, ids_of(1, PROMPT), 16)
    for kind in kinds_of(keyed.mode):
        cache, text = filled(keyed, kind)
        for _ in range(2):  # sealed, resumed, continued, twice
            sealed = keyed.session.seal(cache)
            assert keyed.session.resume(sealed) is cache
            text = greedy_ids(keyed.model, text, 5, cache)
        assert torch.equal(text, expected), kind


@pytest.mark.parametrize("mode", ["permute", "session"])
@pytest.mark.parametrize("family", ["mistral", "gpt2", "phi3"])
def test_other_families(family: str, mode: str) -> None:
    with attached_sealing(family, mode) as it:
        expected = greedy_ids(it.plain, ids_of(1, PROMPT), 12)
        for kind in kinds_of(mode):
            cache, text = filled(it, kind)
            it.session.resume(it.session.seal(cache))
            assert torch.equal(greedy_ids(it.model, text, 6, cache), expected), kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_comes_back_in_other_dtypes(dtype: torch.dtype, permuted: Attached) -> None:
    cache = DynamicCache(config=permuted.model.config)
    for number, layer in enumerate(cache.layers):
        rows = torch.randn(1, 2, 5, 12, generator=torch.Generator().manual_seed(number)).to(dtype)
        layer.update(rows, -rows)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    permuted.session.resume(permuted.session.seal(cache))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert layer.keys.dtype == dtype and torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_tensors_larger_than_a_block_are_cut(permuted: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_cache, "MAX_BLOCK_BYTES", 100)
    cache, text = filled(permuted, "dynamic")
    sealed = permuted.session.seal(cache)
    assert all(len(data) <= 100 + TAG_BYTES for _, data in sealed.blocks) and len(sealed.blocks) > 4
    assert [label.block for label, _ in sealed.blocks] == list(range(len(sealed.blocks)))
    permuted.session.resume(sealed)
    assert torch.equal(greedy_ids(permuted.model, text, 10, cache), greedy_ids(permuted.plain, ids_of(1, PROMPT), 16))


def test_a_batch_is_sealed_whole(keyed: Attached) -> None:
    ids = ids_of(3, PROMPT)
    cache = DynamicCache(config=keyed.model.config)
    text = greedy_ids(keyed.model, ids, 4, cache)
    keyed.session.resume(keyed.session.seal(cache))
    assert torch.equal(greedy_ids(keyed.model, text, 4, cache), greedy_ids(keyed.plain, ids, 8))


# while it is sealed


def test_the_old_memory_is_zeros(keyed: Attached) -> None:
    for kind in kinds_of(keyed.mode):
        cache, _ = filled(keyed, kind)
        memory = storages(cache)
        assert len(memory) == 4 and all(bool(part.any()) for part in memory)
        keyed.session.seal(cache)
        assert not any(bool(part.any()) for part in memory), kind
        assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in cache.layers), kind


def test_what_is_left_is_ciphertext(keyed: Attached) -> None:
    cache, _ = filled(keyed, "dynamic")
    rows = [tensor.contiguous().numpy().tobytes() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    sealed = keyed.session.seal(cache)
    assert [len(data) for _, data in sealed.blocks] == [len(data) + TAG_BYTES for data in rows]
    everything = b"".join(data for _, data in sealed.blocks)
    assert not any(data[start : start + 16] in everything for data in rows for start in range(0, len(data) - 16, 16))
    total = sum(len(data) for _, data in sealed.blocks)
    assert repr(sealed) == f"SealedCache(epoch=1, 4 blocks, {total:,} bytes)"


def test_a_sealed_cache_cannot_be_used(keyed: Attached) -> None:
    for kind in kinds_of(keyed.mode):
        cache, text = filled(keyed, kind)
        sealed = keyed.session.seal(cache)
        for _ in range(2):
            with pytest.raises(RunError, match="this cache is sealed: resume it first"):
                greedy_ids(keyed.model, text, 2, cache)
        with pytest.raises(BadInput, match="sealed already, or empty"):
            keyed.session.seal(cache)
        keyed.session.resume(sealed)
        assert torch.equal(greedy_ids(keyed.model, text, 10, cache), greedy_ids(keyed.plain, ids_of(1, PROMPT), 16)), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_sealed_cache_cannot_be_used_without_rotary(kind: str) -> None:
    """GPT-2 asks the enclave for no keys in permute mode: the cache must not be touched all the same."""
    with attached_sealing("gpt2", "permute") as it:
        cache, text = filled(it, kind)
        it.session.seal(cache)
        with pytest.raises(RunError, match="this cache is sealed: resume it first"):
            greedy_ids(it.model, text, 2, cache)


def test_other_caches_go_on(keyed: Attached) -> None:
    expected = greedy_ids(keyed.plain, ids_of(1, PROMPT), 12)
    one, first = filled(keyed, "dynamic")
    two, second = filled(keyed, "preallocated")
    sealed = keyed.session.seal(one)
    assert torch.equal(greedy_ids(keyed.model, second, 6, two), expected)
    keyed.session.resume(sealed)
    assert torch.equal(greedy_ids(keyed.model, first, 6, one), expected)


# connections that are lost on the way


class Twice(EnclaveServer):
    """Gets every message of one kind twice, as after a reconnect; the first answer is the one that arrives."""

    kind: type = Seal
    times = 1

    def answer(self, frames: list[Any], peer: str) -> list[Any]:
        """See `Server.answer`."""
        answer = super().answer(frames, peer)
        message, _ = ENCLAVE.unpack(list(frames))
        if isinstance(message, self.kind) and self.times:
            self.times -= 1
            super().answer(frames, peer)
        return answer


@pytest.mark.parametrize("mode", ["permute", "session"])
@pytest.mark.parametrize("used", [False, True])
def test_a_sealing_whose_first_block_arrives_twice(mode: str, used: bool) -> None:
    """The enclave begins a second sealing: nothing is overwritten, and the cache can be used and sealed."""
    out = sealing_bundle("llama", mode)
    with enclave(out / "trusted", Twice) as (address, _):
        model = load(out)
        with cloven.attach(model, address, timeout=10) as session:
            assert isinstance(session, KvSession)
            cache = KINDS["preallocated"](model.config)
            text = greedy_ids(model, ids_of(1, PROMPT), 6, cache)
            before = [part.clone() for part in storages(cache)]
            with pytest.raises(RunError, match="the cache is as it was, seal it again"):
                session.seal(cache)
            assert all(torch.equal(now, then) for now, then in zip(storages(cache), before, strict=True))
            if used:
                text = greedy_ids(model, text, 3, cache)
            sealed = session.seal(cache)
            assert sealed.epoch == 3 and cache.layers[0].keys.numel() == 0
            session.resume(sealed)
            text = greedy_ids(model, text, 3, cache)
            assert torch.equal(text, greedy_ids(tiny("llama"), ids_of(1, PROMPT), text.shape[1] - PROMPT))


def test_a_sealing_of_one_block_that_arrives_twice(permuted: Attached) -> None:
    """The enclave's last word decides, where no second block tells."""

    class Sealer:
        def seal_block(self, label: Label, data: memoryview) -> tuple[bytes, int]:
            return bytes(data), 1

        def end_seal(self, blocks: int) -> int:
            return 2

    cache, _ = filled(permuted, "dynamic")
    with pytest.raises(RunError, match="seal it again"):
        sealed_cache.seal(Sealer(), cache)  # type: ignore[arg-type]
    assert all(bool(part.any()) for part in storages(cache))


def test_the_end_of_a_sealing_that_arrives_twice() -> None:
    out = sealing_bundle("llama", "session")

    class TwiceEnded(Twice):
        kind = SealEnd

    with enclave(out / "trusted", TwiceEnded) as (address, server):
        model = load(out)
        with cloven.attach(model, address, timeout=10) as session:
            assert isinstance(session, KvSession)
            cache = KINDS["dynamic"](model.config)
            text = greedy_ids(model, ids_of(1, PROMPT), 6, cache)
            session.resume(session.seal(cache))
            assert server.refused == 0
            assert torch.equal(greedy_ids(model, text, 3, cache), greedy_ids(tiny("llama"), ids_of(1, PROMPT), 9))


# what is refused


def flipped(data: bytes, place: int = -1) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


CHANGES: dict[str, Change] = {
    "swapped": lambda blocks: (blocks[1], blocks[0], *blocks[2:]),
    "ciphertext swapped, labels not": lambda blocks: ((blocks[0][0], blocks[1][1]), (blocks[1][0], blocks[0][1]), *blocks[2:]),
    "altered": lambda blocks: tuple((label, flipped(data)) for label, data in blocks),
    "one bit of the last": lambda blocks: (*blocks[:-1], (blocks[-1][0], flipped(blocks[-1][1], 3))),
    "the first left out": lambda blocks: blocks[1:],
    "one in the middle left out": lambda blocks: (*blocks[:1], *blocks[2:]),
    "a block cut": lambda blocks: (*blocks[:-1], (blocks[-1][0], blocks[-1][1][:-8])),
    "another layer": lambda blocks: ((replace(blocks[0][0], layer=1), blocks[0][1]), *blocks[1:]),
    "another part": lambda blocks: ((replace(blocks[0][0], part="values"), blocks[0][1]), *blocks[1:]),
    "another shape": lambda blocks: ((replace(blocks[0][0], shape=(1, 2, 12, 16)), blocks[0][1]), *blocks[1:]),
    "one twice": lambda blocks: (blocks[0], *blocks),
    "another dtype": lambda blocks: ((replace(blocks[0][0], dtype="int32"), blocks[0][1]), *blocks[1:]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_blocks_are_refused(change: str, keyed: Attached) -> None:
    cache, text = filled(keyed, "preallocated")
    sealed = keyed.session.seal(cache)
    with pytest.raises(WorkerRefused, match=r"stays sealed|session"):
        keyed.session.resume(SealedCache(cache, sealed.epoch, CHANGES[change](sealed.blocks)))
    with pytest.raises(RunError, match="this cache is sealed"):
        greedy_ids(keyed.model, text, 1, cache)
    keyed.session.resume(sealed)  # the true ones, all the same
    assert torch.equal(greedy_ids(keyed.model, text, 2, cache), greedy_ids(keyed.plain, ids_of(1, PROMPT), 8))


@pytest.mark.parametrize("kept", [0, 2, 3])
def test_a_sealing_that_was_cut_short_is_refused(kept: int, keyed: Attached) -> None:
    cache, text = filled(keyed, "dynamic")
    sealed = keyed.session.seal(cache)
    try:
        with pytest.raises(ClovenError):
            keyed.session.resume(SealedCache(cache, sealed.epoch, sealed.blocks[:kept]))
        with pytest.raises(RunError, match="this cache is sealed"):
            greedy_ids(keyed.model, text, 1, cache)
    finally:
        keyed.session.resume(sealed)


def test_an_older_sealing_is_refused(keyed: Attached) -> None:
    cache, text = filled(keyed, "dynamic")
    old = keyed.session.seal(cache)
    keyed.session.resume(old)
    with pytest.raises(WorkerRefused, match="the cache is open"):
        keyed.session.resume(old)  # twice
    text = greedy_ids(keyed.model, text, 2, cache)
    new = keyed.session.seal(cache)
    assert (old.epoch, new.epoch) == (1, 2)
    for sealing in (old, replace(old, epoch=2)):
        with pytest.raises(WorkerRefused, match=r"sealing 1|altered"):
            keyed.session.resume(sealing)
    keyed.session.resume(new)
    assert torch.equal(greedy_ids(keyed.model, text, 2, cache), greedy_ids(keyed.plain, ids_of(1, PROMPT), 10))


def test_blocks_of_another_cache_are_refused(keyed: Attached) -> None:
    (one, _), (two, _) = filled(keyed, "dynamic"), filled(keyed, "dynamic")
    first, second = keyed.session.seal(one), keyed.session.seal(two)
    with pytest.raises(WorkerRefused, match="altered"):
        keyed.session.resume(replace(first, cache=two))
    with pytest.raises(WorkerRefused, match="the cache is open"):
        keyed.session.resume(replace(first, cache=DynamicCache(config=keyed.model.config)))
    keyed.session.resume(first)
    keyed.session.resume(second)


def test_an_empty_cache_is_not_sealed(keyed: Attached) -> None:
    for kind in kinds_of(keyed.mode):
        with pytest.raises(BadInput, match="sealed already, or empty"):
            keyed.session.seal(KINDS[kind](keyed.model.config))


def test_a_quantised_cache_works_and_is_not_sealed() -> None:
    """Its rows are tuples: refused with a clear error, and left as they are. fp8 is the back end that needs no extra package."""
    with attached_sealing("llama", "permute") as it:
        ids = ids_of(1, PROMPT)
        cache = QuantizedCache("fp8", it.model.config)
        text = greedy_ids(it.model, ids, 4, cache)
        with pytest.raises(BadInput, match="Fp8QuantizedLayer cannot be sealed: it keeps _quantized_keys as tuple"):
            it.session.seal(cache)
        text = greedy_ids(it.model, text, 4, cache)
        assert torch.equal(text, greedy_ids(it.plain, ids, 8, QuantizedCache("fp8", it.plain.config)))


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_a_bundle_without_seal_idle_refuses(mode: str) -> None:
    with attached("llama", mode) as it:
        cache, text = filled(it, "dynamic")
        with pytest.raises(WorkerRefused, match="prepared without --seal-idle"):
            it.session.seal(cache)
        assert torch.equal(greedy_ids(it.model, text, 2, cache), greedy_ids(it.plain, ids_of(1, PROMPT), 8))  # nothing was overwritten


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_an_enclave_that_was_restarted_has_lost_the_keys(mode: str, socket_folder: Any) -> None:
    out, address = sealing_bundle("llama", mode), f"ipc://{socket_folder}/s"
    model = load(out)
    with enclave_at(out / "trusted", address), cloven.attach(model, address, timeout=5) as session:
        assert isinstance(session, KvSession)
        cache = DynamicCache(config=model.config)
        greedy_ids(model, ids_of(1, PROMPT), 2, cache)
        sealed = session.seal(cache)
    with enclave_at(out / "trusted", address), cloven.attach(model, address, timeout=5) as session:
        assert isinstance(session, KvSession)
        with pytest.raises(ClovenError, match=r"open|restarted|no such session"):
            session.resume(sealed)
        assert all(layer.keys.numel() == 0 for layer in cache.layers)
        assert torch.equal(greedy_ids(model, ids_of(1, PROMPT), 4), greedy_ids(tiny("llama"), ids_of(1, PROMPT), 4))


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_an_enclave_that_was_restarted_under_a_session(mode: str, socket_folder: Any) -> None:
    out, address = sealing_bundle("llama", mode), f"ipc://{socket_folder}/s"
    model = load(out)
    with enclave_at(out / "trusted", address):
        session = cloven.attach(model, address, timeout=5)
        assert isinstance(session, KvSession)
        cache = DynamicCache(config=model.config)
        text = greedy_ids(model, ids_of(1, PROMPT), 2, cache)
        sealed = session.seal(cache)
    with session, enclave_at(out / "trusted", address):
        with pytest.raises(RunError, match="no such session of yours: it was never opened, has ended, or the enclave was restarted"):
            session.resume(sealed)
        with pytest.raises(RunError):
            greedy_ids(model, text, 1, cache)


# the process's memory

SCAN = """
import json, sys, torch
from cloven.model.cache_argument import with_cache
from transformers import AutoModelForCausalLM
import cloven
from cloven.kv_shield.preallocated import PreallocatedCache

exposed, address = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(exposed, dtype=torch.float32)
window = bytearray(2**22)
flipped = torch.frombuffer(window, dtype=torch.uint8)
place = flipped.data_ptr()


def copies(needles):
    # {needle: addresses}; needles are kept with all bits flipped, so that the search does not find itself
    found = [[] for _ in needles]
    maps = open("/proc/self/maps").read().splitlines()
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if not rights.startswith("rw") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            first, last = (int(end, 16) for end in span.split("-"))
            while first < last:
                size = min(len(window), last - first)
                try:
                    memory.seek(first)
                    size = memory.readinto(memoryview(window)[:size])
                except OSError:
                    break
                if not size:
                    break
                torch.bitwise_not(flipped, out=flipped)
                for needle, addresses in zip(needles, found):
                    at = window.find(needle, 0, size)
                    while at >= 0:
                        if not place <= first + at < place + len(window):
                            addresses.append(first + at)
                        at = window.find(needle, at + 1, size)
                first += max(size - 4096, 1) if size == len(window) else size
    flipped.zero_()
    return [sorted(set(addresses)) for addresses in found]


with cloven.attach(model, address, timeout=20) as session:
    cache = PreallocatedCache(model.config, 64)
    ids = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(0))
    text = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **with_cache(cache), pad_token_id=0)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = [tensor.untyped_storage() for tensor in tensors]  # kept: what is freed can be used again
    own = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    needles = []
    for tensor in tensors:
        for row in (9, 27):  # one of the prompt, one of the generated tokens
            needles.append(bytes(torch.bitwise_not(tensor[0, 1, row : row + 3].view(torch.uint8)).flatten().tolist()))
    del tensors, tensor

    def counted():
        found = copies(needles)
        inside = [sum(any(a <= address < b for a, b in own) for address in addresses) for addresses in found]
        return {"inside": inside, "outside": [len(addresses) - n for addresses, n in zip(found, inside)]}

    before = counted()
    sealed = session.seal(cache)
    after = counted()
    session.resume(sealed)
    again = model.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False, **with_cache(cache), pad_token_id=0)
    print(json.dumps({"before": before, "after": after, "text": again[0].tolist(), "ids": ids[0].tolist()}))
"""


@pytest.mark.parametrize("mode", ["permute", pytest.param("session", marks=pytest.mark.long)])
def test_a_scan_of_the_process_finds_no_row_in_the_caches_memory(mode: str) -> None:
    """Three whole rows in a run, of every layer and part, of the prompt and of generated tokens.

    Asserted for the cache's own memory alone: freed temporaries and message buffers that rows passed through may still hold them, and do.
    """
    out = sealing_bundle("llama", mode)
    with enclave(out / "trusted") as (address, _):
        done = run_python(SCAN, str(out / "exposed"), address)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"{mode}: copies outside the cache: {report['before']['outside']} -> {report['after']['outside']}")
    assert report["before"]["inside"] == [1] * 8  # the search works
    assert report["after"]["inside"] == [0] * 8
    assert report["text"] == greedy_ids(tiny("llama"), torch.tensor([report["ids"]]), 12)[0].tolist()


def test_preallocated_rows_are_found_by_the_seal_even_after_a_resume(keyed: Attached) -> None:
    """Resumed rows move into new memory once, and what held them is overwritten."""
    cache = PreallocatedCache(keyed.model.config, ROOM)
    text = greedy_ids(keyed.model, ids_of(1, PROMPT), 3, cache)
    keyed.session.resume(keyed.session.seal(cache))
    resumed = storages(cache)
    text = greedy_ids(keyed.model, text, 3, cache)
    assert not any(bool(part.any()) for part in resumed)
    memory = storages(cache)
    sealed = keyed.session.seal(cache)
    assert not any(bool(part.any()) for part in memory)
    keyed.session.resume(sealed)
    assert torch.equal(greedy_ids(keyed.model, text, 4, cache), greedy_ids(keyed.plain, ids_of(1, PROMPT), 10))


class Holder:
    """Something that is no tensor, tuple, list or dict, and holds rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@pytest.mark.parametrize("more", [lambda rows: Holder(rows), lambda rows: rows.flatten(0, 2), lambda rows: rows.flatten()])
def test_a_layer_that_keeps_rows_elsewhere_is_refused_or_sealed(more: Callable[[Tensor], Any], permuted: Attached) -> None:
    cache, _ = filled(permuted, "dynamic")
    layer: Any = cache.layers[0]
    layer.packed = more(layer.keys.clone())
    try:
        permuted.session.seal(cache)
    except BadInput:
        return
    left = layer.packed.rows if isinstance(layer.packed, Holder) else layer.packed
    assert not left.any()
