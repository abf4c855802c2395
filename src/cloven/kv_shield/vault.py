"""Sealing in the enclave: idle caches are encrypted with keys that never leave it.

    key   = HKDF-SHA256(session key, epoch)      a new epoch for every sealing: a nonce never meets the same key twice
    nonce = block number, 12 bytes
    AAD   = bundle, session, epoch, layer, part, block, shape, dtype

    open --seal 0, 1, …--> sealing --end--> sealed --unseal 0, 1, … all--> open
                           sealing --key, restore--> open       the sealing is given up: the rows are in use

Guarantee (AES-256-GCM): a block that was changed, swapped, left out, or that is of an earlier sealing is refused. In session mode nothing
is keyed or restored for a cache that is sealed or half resumed; permute mode's keys are the same for every cache, and know of no sealing.
The cache crosses the link once each way. A sealed cache can be resumed for 30 days (`enclave.SEALED_SECONDS`), while its enclave lives.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloven.field.prg import KEY_BYTES
from cloven.kv_shield.messages import Label
from cloven.wire.schema import MalformedMessage

_MAX_BLOCKS = 2**32


@dataclass
class Vault:
    """One session's sealing state.

    Args:
        bundle, session: part of what every block is bound to.
    """

    bundle: bytes
    session: bytes
    epoch: int = 0
    state: str = "open"
    _count: int = 0  # blocks sealed in this epoch
    _next: int = 0  # the block that may be unsealed next
    _key: bytearray = field(default_factory=lambda: bytearray(secrets.token_bytes(KEY_BYTES)), repr=False)

    def seal(self, label: Label, data: memoryview) -> bytes:
        """Encrypt the next block; block 0 begins a new epoch.

        Raises:
            MalformedMessage: sealed already, or not the next block.
        """
        if label.block == 0 and self.state in ("open", "sealing"):  # a sealing that was interrupted begins anew
            self.state, self.epoch, self._count = "sealing", self.epoch + 1, 0
        if self.state != "sealing" or label.block != self._count or self._count >= _MAX_BLOCKS:
            raise MalformedMessage("session", f"block {label.block} cannot be sealed now: the cache is {self.state}")
        self._count += 1
        return self._cipher().encrypt(label.block.to_bytes(12, "big"), data, self._bound(label))

    def end(self, blocks: int) -> int:
        """All blocks are there; returns the epoch. Asking again, as after an answer that was lost, does no harm.

        Raises:
            MalformedMessage: another number of blocks was sealed.
        """
        if self.state == "sealed" and blocks == self._count:
            return self.epoch
        if self.state != "sealing" or blocks != self._count:
            raise MalformedMessage("session", f"{blocks} blocks: the cache is {self.state}, {self._count} were sealed")
        self.state, self._next = "sealed", 0
        return self.epoch

    def unseal(self, label: Label, epoch: int, data: memoryview) -> bytes:
        """Decrypt the next block; after the last one the cache is open.

        Raises:
            MalformedMessage: not sealed, an older sealing's block, not the next block, or altered.
        """
        if self.state not in ("sealed", "resuming") or epoch != self.epoch:
            raise MalformedMessage("session", f"a block of sealing {epoch}: the cache is {self.state}, its last sealing was {self.epoch}")
        if label.block == 0:
            self.state, self._next = "resuming", 0
        if label.block != self._next:
            raise MalformedMessage("session", f"block {label.block}: the next one is {self._next}")
        try:
            plain = self._cipher().decrypt(label.block.to_bytes(12, "big"), data, self._bound(label))
        except InvalidTag as error:
            raise MalformedMessage("session", f"block {label.block} was altered, or is not this one: the cache stays sealed") from error
        self._next += 1
        if self._next == self._count:
            self.state = "open"
        return plain

    @property
    def left(self) -> int:
        """How many blocks are still sealed, while resuming."""
        return self._count - self._next

    def require_open(self) -> None:
        """Refuse to work on a sealed cache. A sealing that was not ended is given up: nothing has been overwritten."""
        if self.state == "sealing":
            self.state = "open"
        if self.state != "open":
            raise MalformedMessage("session", f"the cache is {self.state}: resume it first")

    def _cipher(self) -> AESGCM:
        info = b"cloven/kv-shield/seal/1/" + self.epoch.to_bytes(8, "big")
        return AESGCM(HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(bytes(self._key)))

    def _bound(self, label: Label) -> bytes:
        return bytes(
            msgpack.packb([self.bundle, self.session, self.epoch, label.layer, label.part, label.block, list(label.shape), label.dtype])
        )
