from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.kv_shield.messages import TAG_BYTES, Label
from cloven.kv_shield.vault import Vault
from cloven.wire.schema import MalformedMessage

BUNDLE, SESSION = bytes(range(16)), bytes(range(16, 32))
PLAIN = [b"first block", b"second", b"", b"fourth block of a sealing"]


def vault() -> Vault:
    """With a key that every run has."""
    made = Vault(BUNDLE, SESSION)
    made._key = bytearray(range(32, 64))
    return made


def label(block: int, part: str = "keys") -> Label:
    return Label(3, part, block, (1, 2, 5, 12), "bfloat16")


def sealed(made: Vault, blocks: list[bytes] | None = None) -> list[bytes]:
    """All blocks, sealed to the end."""
    plain = PLAIN if blocks is None else blocks
    ciphertext = [made.seal(label(number), memoryview(data)) for number, data in enumerate(plain)]
    made.end(len(plain))
    return ciphertext


def refused(made: Vault, one: Label, epoch: int, data: bytes, match: str) -> None:
    with pytest.raises(MalformedMessage, match=match):
        made.unseal(one, epoch, memoryview(data))


def resumed(made: Vault, ciphertext: list[bytes]) -> list[bytes]:
    return [made.unseal(label(number), made.epoch, memoryview(data)) for number, data in enumerate(ciphertext)]


# the construction


def test_vector() -> None:
    """Key, nonce and bound data are part of the format: they change together with its version."""
    made = vault()
    assert made.seal(label(0), memoryview(b"cloven")).hex() == "9fba459c8f2355ea36c2eaba14747ff60642218eed91"
    assert made.seal(label(1, "values"), memoryview(b"cloven")).hex() == "f464c3b663fdb7458b6bfaab9c7b77111f18f6e0e389"
    assert made.end(2) == 1
    made.unseal(label(0), 1, memoryview(bytes.fromhex("9fba459c8f2355ea36c2eaba14747ff60642218eed91")))
    made.unseal(label(1, "values"), 1, memoryview(bytes.fromhex("f464c3b663fdb7458b6bfaab9c7b77111f18f6e0e389")))
    assert made.seal(label(0), memoryview(b"cloven")).hex() == "7f05c83486a94c071b240ce1ebcfd1091b0e3815709a"  # the second sealing


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=6))
def test_what_was_sealed_comes_back(blocks: list[bytes]) -> None:
    made = Vault(BUNDLE, SESSION)
    ciphertext = sealed(made, blocks)
    assert [len(data) for data in ciphertext] == [len(data) + TAG_BYTES for data in blocks]
    assert resumed(made, ciphertext) == blocks and made.state == "open"


def test_every_vault_has_its_own_key_and_does_not_show_it() -> None:
    first, second = Vault(BUNDLE, SESSION), Vault(BUNDLE, SESSION)
    assert first._key != second._key and len(first._key) == 32
    assert sealed(first) != sealed(second)
    assert "_key" not in repr(first) and bytes(vault()._key).hex() not in repr(vault()) and str(vault()._key) not in repr(vault())


def test_a_nonce_never_meets_a_key_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through sealings that end, are interrupted, are resumed in part, and fail: every (key, nonce) is used once."""
    made, used = vault(), []
    cipher = Vault._cipher

    class Recorder:
        def __init__(self, of: Vault) -> None:
            self._of, self._inner = of, cipher(of)

        def encrypt(self, nonce: bytes, data: memoryview, bound: bytes) -> bytes:
            used.append((self._of.epoch, nonce))
            return self._inner.encrypt(nonce, data, bound)

        def decrypt(self, nonce: bytes, data: memoryview, bound: bytes) -> bytes:
            return self._inner.decrypt(nonce, data, bound)

    monkeypatch.setattr(Vault, "_cipher", lambda self: Recorder(self))
    for _ in range(3):
        made.seal(label(0), memoryview(b"interrupted"))
        made.seal(label(1), memoryview(b"interrupted"))
        ciphertext = sealed(made)
        made.unseal(label(0), made.epoch, memoryview(ciphertext[0]))
        for block in range(len(ciphertext)):
            with pytest.raises(MalformedMessage):
                made.seal(label(block), memoryview(b"now?"))
        resumed(made, ciphertext)
    assert len(used) == len(set(used)) == 3 * (2 + len(PLAIN))
    assert {nonce for _, nonce in used} == {block.to_bytes(12, "big") for block in range(len(PLAIN))}
    assert {epoch for epoch, _ in used} == set(range(1, 7))


def test_every_epoch_has_another_key() -> None:
    """The same block, the same label but for the epoch: nothing of the ciphertext is alike, not even without the bound data's tag."""
    made = vault()
    first = sealed(made)
    resumed(made, first)
    second = sealed(made)
    assert first[0][: len(PLAIN[0])] != second[0][: len(PLAIN[0])]


# the order of things


def test_a_fresh_vault_is_open_and_a_sealed_one_is_not() -> None:
    made = vault()
    made.require_open()
    made.seal(label(0), memoryview(b"x"))
    made.end(1)
    with pytest.raises(MalformedMessage, match="the cache is sealed: resume it first"):
        made.require_open()
    refused(made, label(0), 1, b"x" * 17, "altered")
    with pytest.raises(MalformedMessage, match="the cache is resuming: resume it first"):
        made.require_open()


def test_a_cache_that_is_used_gives_its_sealing_up() -> None:
    """The rows are in use, none were overwritten: what was sealed of them is worth nothing."""
    made = vault()
    old = made.seal(label(0), memoryview(b"x"))
    made.require_open()
    assert made.state == "open"
    with pytest.raises(MalformedMessage, match="the cache is open"):
        made.end(1)
    with pytest.raises(MalformedMessage, match="block 1 cannot be sealed now"):
        made.seal(label(1), memoryview(b"x"))
    refused(made, label(0), 1, old, "the cache is open")
    assert resumed(made, sealed(made)) == PLAIN and made.epoch == 2


def test_a_cache_that_is_half_resumed_is_not_open() -> None:
    made = vault()
    ciphertext = sealed(made)
    made.unseal(label(0), 1, memoryview(ciphertext[0]))
    with pytest.raises(MalformedMessage, match="the cache is resuming: resume it first"):
        made.require_open()


@pytest.mark.parametrize("block", [0, 1, 4])
def test_a_sealed_cache_is_not_sealed_again(block: int) -> None:
    made = vault()
    ciphertext = sealed(made)
    with pytest.raises(MalformedMessage, match=f"block {block} cannot be sealed now: the cache is sealed"):
        made.seal(label(block), memoryview(b"x"))
    assert resumed(made, ciphertext) == PLAIN and made.epoch == 1


@pytest.mark.parametrize("blocks", [(1,), (0, 2), (0, 1, 1), (0, 1, 3)])
def test_blocks_are_sealed_one_after_the_other(blocks: tuple[int, ...]) -> None:
    made = vault()
    for block in blocks[:-1]:
        made.seal(label(block), memoryview(b"x"))
    with pytest.raises(MalformedMessage, match=f"block {blocks[-1]} cannot be sealed now"):
        made.seal(label(blocks[-1]), memoryview(b"x"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_count_at_the_end_must_be_right(count: int) -> None:
    made = vault()
    for block in range(2):
        made.seal(label(block), memoryview(b"x"))
    with pytest.raises(MalformedMessage, match=f"{count} blocks: the cache is sealing, 2 were sealed"):
        made.end(count)
    assert made.end(2) == made.end(2) == 1  # asked again: its answer was lost
    with pytest.raises(MalformedMessage, match="3 blocks: the cache is sealed, 2 were sealed"):
        made.end(3)


def test_nothing_can_be_ended_that_was_not_begun() -> None:
    for count in (0, 1):
        with pytest.raises(MalformedMessage, match="the cache is open, 0 were sealed"):
            vault().end(count)


def test_an_interrupted_sealing_begins_anew() -> None:
    made = vault()
    old = [made.seal(label(number), memoryview(data)) for number, data in enumerate(PLAIN[:2])]
    ciphertext = sealed(made)
    assert made.epoch == 2
    refused(made, label(0), 1, old[0], "sealing 1: the cache is sealed, its last sealing was 2")
    refused(made, label(0), 2, old[0], "altered, or is not this one: the cache stays sealed")
    assert resumed(made, ciphertext) == PLAIN


def test_nothing_is_unsealed_before_it_is_sealed() -> None:
    made = vault()
    refused(made, label(0), 0, b"x" * 20, "the cache is open")
    first = made.seal(label(0), memoryview(b"x"))
    refused(made, label(0), 1, first, "the cache is sealing")
    made.end(1)
    made.unseal(label(0), 1, memoryview(first))
    refused(made, label(0), 1, first, "the cache is open")  # nor twice


@pytest.mark.parametrize("order", [(1,), (3,), (0, 2), (0, 0, 2), (0, 1, 1)])
def test_blocks_are_unsealed_one_after_the_other(order: tuple[int, ...]) -> None:
    made = vault()
    ciphertext = sealed(made)
    for block in order[:-1]:
        made.unseal(label(block), 1, memoryview(ciphertext[block]))
    refused(made, label(order[-1]), 1, ciphertext[order[-1]], rf"block {order[-1]}: the next one is \d")
    assert resumed(made, ciphertext) == PLAIN  # from the start again


def test_the_last_block_opens_and_no_earlier_one() -> None:
    made = vault()
    for number, data in enumerate(sealed(made)):
        assert made.state != "open"
        made.unseal(label(number), 1, memoryview(data))
    assert made.state == "open"


# what is refused


def test_an_older_sealing_is_refused() -> None:
    made = vault()
    old = sealed(made)
    resumed(made, old)
    sealed(made)
    for epoch in (0, 1, 3):
        refused(made, label(0), epoch, old[0], f"a block of sealing {epoch}: the cache is sealed, its last sealing was 2")
    refused(made, label(0), 2, old[0], "altered")  # the same bytes under the new number


def test_swapped_blocks_are_refused() -> None:
    made = vault()
    ciphertext = sealed(made)
    refused(made, label(0), 1, ciphertext[1], "block 0 was altered, or is not this one")
    made.unseal(label(0), 1, memoryview(ciphertext[0]))
    refused(made, label(1), 1, ciphertext[0], "block 1 was altered")


@pytest.mark.parametrize("place", [0, 5, -TAG_BYTES - 1, -TAG_BYTES, -1])
def test_altered_bytes_are_refused(place: int) -> None:
    made = vault()
    ciphertext = sealed(made)
    altered = bytearray(ciphertext[0])
    altered[place] ^= 1
    refused(made, label(0), 1, bytes(altered), "altered")
    assert resumed(made, ciphertext) == PLAIN  # the true ones still come back


@pytest.mark.parametrize("cut", [0, 1, TAG_BYTES - 1, TAG_BYTES, -1])
def test_truncated_blocks_are_refused(cut: int) -> None:
    made = vault()
    ciphertext = sealed(made)
    refused(made, label(0), 1, ciphertext[0][:cut], "altered")
    refused(made, label(0), 1, ciphertext[0] + b"\0", "altered")


@pytest.mark.parametrize(
    "other",
    [
        replace(label(0), layer=4),
        replace(label(0), part="values"),
        replace(label(0), shape=(1, 2, 12, 5)),
        replace(label(0), shape=(1, 2, 5)),
        replace(label(0), dtype="float16"),
    ],
)
def test_a_block_under_another_label_is_refused(other: Label) -> None:
    made = vault()
    ciphertext = sealed(made)
    refused(made, other, 1, ciphertext[0], "altered")


@pytest.mark.parametrize("which", ["bundle", "session"])
def test_blocks_of_another_session_or_bundle_are_refused_even_under_the_same_key(which: str) -> None:
    made, other = vault(), vault()
    setattr(other, which, bytes(16))
    ciphertext = sealed(made)
    sealed(other)
    refused(other, label(0), 1, ciphertext[0], "altered")
    assert resumed(made, ciphertext) == PLAIN
