"""The enclave: holds the keys, rotates, keys, and restores. No weights, no cache, no transformers.

For layer l and rows x = q ‖ k (‖ v) of positions p:

    permute   q', k' arrive permuted by the weights; norm and rotation on permuted vectors; restore: a_i = a'_{π_v⁻¹(i)}
    session   q, k, v arrive plain; norm, rotation, then q' = [q, 0] F⁻ᵀ, k' = [k, ν] F, v' = [v, ν] F_v; restore: (a' F_v⁻¹)[: d]

Guarantee: no answer to an honest accelerator holds a key. In session mode a session belongs to the peer that opened it, and keys are fresh
for every sequence: a thief who has only the cache, or who is another peer, can have nothing undone.
Not withstood: whoever holds a live session (its peer's connection and its name) keys and restores unit vectors, and the answers are F⁻¹
and F_v⁻¹: about (d + ρ)·G / H rows undo all that was keyed before. A place is keyed once, as many rows are restored as were keyed, and a
session keys no more rows than the model has positions: that bounds the rows and does not prevent this. In permute mode restoring needs no
session.
Not hidden from the accelerator: hidden states, q, k, v as they pass, attention scores. It is the cache at rest that is protected.
Forgotten: sessions that were not used for an hour, or for 30 days where their cache is sealed or half resumed.
Source: KV-Shield as corrected in docs/architecture.md.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.kv_shield.enclave_step import EnclaveStep, StepTemplate, library
from cloven.kv_shield.keyed_rows import cover, keyed, normed, restored
from cloven.kv_shield.keys import SessionKeys, session_keys
from cloven.kv_shield.manifest import KEYS_FILE, TRUSTED, KvManifest
from cloven.kv_shield.messages import SESSION_BYTES, STEP_DTYPES
from cloven.kv_shield.rotary import Rotary, RotaryGather, gather_columns
from cloven.kv_shield.shapes import AttentionShape, fits_step
from cloven.kv_shield.vault import Vault
from cloven.wire.schema import MalformedMessage

MAX_KEY_BYTES = 2**30  # of the keys of all sessions, drawn or still to be drawn; one peer may have half of it
LEAST_BYTES = 2**20  # what a sequence counts for at least, so that sessions of small or no keys are bounded too
AHEAD_BYTES = 2**26  # of keys drawn before anybody has asked
IDLE_SECONDS = 3600.0
SEALED_SECONDS = 30 * 86_400.0  # of a sealed cache, whose rows are lost with its session
_FLOAT_BYTES, _MATRICES = 4, 4  # of `SessionKeys`


@dataclass
class _Session:
    """The sequences of one cache. `keyed[l]` and `restored[l]` count the rows of layer l: what was keyed is restored once."""

    peer: str
    sequences: int
    stream: SecretStream
    keyed: list[int]
    restored: list[int]
    keys: list[SessionKeys | None] = field(repr=False)  # by layer; drawn when a layer first keys
    used: float
    vault: Vault
    steps: list[EnclaveStep] = field(default_factory=list)  # passes under way, whose rows are counted already


@dataclass(frozen=True, repr=False)  # its indices are the permutations
class _Layer:
    shape: AttentionShape
    norms: Tensor | None  # weights of the norms of the heads of q ‖ k [H + G, d]
    gather: RotaryGather | None
    restore: Tensor | None  # π_v⁻¹ over all heads, int64 [H·d]; None in session mode


@dataclass(frozen=True, repr=False)
class _Tables:
    """cos and ± sin for the positions asked for last; in float32 too, for C++."""

    places: bytes
    shape: torch.Size
    dtype: torch.dtype
    tables: tuple[Tensor, Tensor] | None
    floats: tuple[Tensor, Tensor] | None


class Enclave:
    """The keys of one bundle.

    Args:
        folder: OUT/trusted.

    Raises:
        BadBundle, TamperedBundle: not a trusted half, or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = KvManifest.read(folder, TRUSTED)
        verify_files(folder, self.manifest.files)
        self.bundle = bytes.fromhex(self.manifest.bundle)
        self.config = self.manifest.config
        try:
            stored = load_file(folder / KEYS_FILE)
            self._rotary = _rotary_of(stored)
            self._layers = [self._layer(shape, index, stored) for index, shape in enumerate(self.manifest.layers)]
        except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
            raise BadBundle(f"{folder / KEYS_FILE}: not the keys of this bundle ({type(error).__name__})") from error
        sizes = [shape.kv_heads * (shape.head_dim + self.noise) ** 2 for shape in self.manifest.layers] if self.noise else []
        self._sequence_bytes = max(LEAST_BYTES, _FLOAT_BYTES * _MATRICES * sum(sizes))
        self._most_bytes = max(MAX_KEY_BYTES, 2 * self._sequence_bytes)  # one sequence is never too many
        self._sessions: dict[bytes, _Session] = {}
        self._tables: _Tables | None = None
        self._ahead: list[list[SessionKeys | None]] = []  # keys of sequences to come, whoever opens them; the last may lack layers
        self._templates: dict[torch.dtype, StepTemplate] = {}

    def __repr__(self) -> str:
        return "Enclave(<secret>)"

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self._layers)

    @property
    def noise(self) -> int:
        """ρ: dimensions added to every head; 0 in permute mode."""
        return self.config.noise_dims if self.config.mode == "session" else 0

    @property
    def sessions(self) -> int:
        """How many there are now; those that were forgotten end when another one is opened."""
        return len(self._sessions)

    def widths_in(self, layer: int) -> int:
        """Width of the rows that `key` takes: q ‖ k, and v in session mode."""
        q, k, v = self._layer_at(layer).shape.widths()
        return q + k + (v if self.noise else 0)

    def width_keyed(self, layer: int) -> int:
        """Width of the rows that `restore` takes."""
        return self._layer_at(layer).shape.widths(self.noise)[0]

    def open(self, sequences: int, peer: str) -> bytes:
        """A session with fresh keys for that many sequences, for this peer alone; returns its name.

        Raises:
            MalformedMessage: no sessions here, or no room for so many keys.
        """
        if not self.noise and not self.config.seal_idle:
            raise MalformedMessage("session", "this bundle's keys are in its weights, and it was prepared without --seal-idle: no sessions")
        now = time.monotonic()
        for name in [name for name, session in self._sessions.items() if now - session.used > _idle_limit(session)]:
            del self._sessions[name]
        self._require_room(sequences, peer)
        name = secrets.token_bytes(SESSION_BYTES)
        stream = SecretStream(secrets.token_bytes(KEY_BYTES), "kv-shield/session")
        vault = Vault(self.bundle, name)
        none: list[SessionKeys | None] = [None] * self.layers
        keys = self._ahead.pop(0) if sequences == 1 and self._ahead else none  # handed out once
        self._sessions[name] = _Session(peer, sequences, stream, [0] * self.layers, [0] * self.layers, keys, now, vault)
        return name

    def draw_ahead(self) -> bool:
        """Draw the keys of one more layer for a session to come, of one sequence; drawing all of them takes long enough to be noticed.

        Returns:
            Whether there is room for more.
        """
        if not self.noise or any(session.steps for session in self._sessions.values()):  # somebody is in the middle of a token
            return False
        if not self._ahead or None not in self._ahead[-1]:
            if (len(self._ahead) + 1) * self._sequence_bytes > AHEAD_BYTES:
                return False
            self._ahead.append([None] * self.layers)
        keys = self._ahead[-1]
        layer = keys.index(None)
        keys[layer] = self._drawn(SecretStream(secrets.token_bytes(KEY_BYTES), "kv-shield/ahead"), layer, 1)
        return True

    def vault(self, name: bytes, peer: str) -> Vault:
        """Where a session's idle cache is sealed.

        Raises:
            MalformedMessage: no such session of this peer, or a bundle without sealing.
        """
        if not self.config.seal_idle:
            raise MalformedMessage("session", "this bundle was prepared without --seal-idle")
        session = self._session(name, peer)
        if session.steps:
            raise MalformedMessage("session", "a pass over the model is under way: its rows would be keyed after the sealing")
        return session.vault

    def close(self, name: bytes, peer: str) -> None:
        """Drop a session's keys: what was keyed with them stays keyed for ever."""
        for step in self._session(name, peer).steps:
            step.cancel()
        del self._sessions[name]

    @torch.no_grad()
    def key(self, layer: int, x: Tensor, positions: Tensor, name: bytes, first: int, peer: str) -> Tensor:
        """Norm, rotate and key rows.

        Args:
            x: q ‖ k (‖ v) [B, S, W], in the model's dtype.
            positions: int32 [B, S]; −1 for a pad.
            name, first, peer: the session, the place of the first row in its caches, who asks.

        Returns:
            q' ‖ k' (‖ v'), [B, S, W'].

        Raises:
            MalformedMessage: no such layer, session or position; a place that was keyed before, or is not the next one.
        """
        shape = self._layer_at(layer).shape
        tables = self._tables_for(positions, x.dtype)
        if not self.noise:
            return self._keyed(layer, x, tables, None, None)
        session = self._next(layer, x.shape, name, first, peer)
        random = session.stream.noise(x.shape[0], 2, shape.kv_heads, x.shape[1], self.noise)
        rows = self._keyed(layer, x, tables, self._keys(session, layer), random)
        if int(positions.min()) < 0:
            cover(rows, positions < 0, shape.widths(self.noise), session.stream)
        session.keyed[layer] += x.shape[1]  # only now: the answer exists
        return rows

    @torch.no_grad()
    def restore(self, layer: int, a: Tensor, name: bytes, peer: str) -> Tensor:
        """The true attention output: a' [B, S, H·(d + ρ)] -> a [B, S, H·d]."""
        place, native = self._layer_at(layer), self._template(a.dtype)
        if place.restore is not None:
            return native.compute(layer, False, a, None, None, None) if native is not None else gather_columns(a, place.restore)
        session = self._session(name, peer)
        session.vault.require_open()
        if a.shape[0] != session.sequences or session.restored[layer] + a.shape[1] > session.keyed[layer]:
            raise MalformedMessage("session", "more rows, or other sequences, than were keyed there")
        session.restored[layer] += a.shape[1]
        keys = self._keys(session, layer)
        return native.compute(layer, False, a, None, keys, None) if native is not None else restored(a, keys, place.shape, self.noise)

    def begin(self, name: bytes, first: int, positions: Tensor, dtype: torch.dtype, peer: str) -> EnclaveStep | None:
        """Authorise a pass over all layers: every row is counted as keyed and restored before the first one is.

        Args:
            name, first, peer: as for `key`; the place is the same in every layer's cache.
            positions: int32 [B, S].

        Returns:
            None where C++ cannot serve it: more rows than a lane carries or noise is drawn for, pads, another type, or no library.

        Raises:
            MalformedMessage: as `key` and `restore` do.
        """
        template, rows = self._template(dtype), positions.numel()
        if template is None or (self.noise and int(positions.min()) < 0):
            return None
        if not fits_step(self.manifest.layers, self.noise, rows, dtype.itemsize):
            return None
        tables = self._tables_for(positions, dtype).floats
        if not self.noise:
            return template.step(name, first, positions.shape, tables, (), ())
        session = self._session(name, peer)
        for layer in range(self.layers):
            self._next(layer, positions.shape, name, first, peer)
        keys = [self._keys(session, layer) for layer in range(self.layers)]
        b, s = positions.shape
        sizes = [b * 2 * layer.shape.kv_heads * s * self.noise for layer in self._layers]
        step = template.step(
            name, first, positions.shape, tables, [(key.kv, key.inverse) for key in keys], session.stream.noise(sum(sizes)).split(sizes)
        )
        for count in (session.keyed, session.restored):
            count[:] = [rows + s for rows in count]
        session.steps.append(step)
        return step

    def end(self, step: EnclaveStep) -> None:
        """A pass has ended: rows that no call was made for were neither keyed nor restored."""
        session = self._sessions.get(step.name)
        if session is None or not self.noise:
            return
        session.steps.remove(step)
        kept = set()  # layers where another pass went on from there: a place could be keyed twice, or a row restored that never was
        for layer, key in step.calls[step.state.call :]:
            if key and session.keyed[layer] != step.first + step.rows:
                kept.add(layer)
            elif key:
                session.keyed[layer] -= step.rows
            elif layer not in kept:
                session.restored[layer] -= step.rows

    def _template(self, dtype: torch.dtype) -> StepTemplate | None:
        """The layers for C++; None where it cannot compute."""
        if library() is None or dtype not in STEP_DTYPES:
            return None
        if dtype not in self._templates:
            self._templates[dtype] = StepTemplate(self._layers, self.noise, dtype)
        return self._templates[dtype]

    def _keyed(self, layer: int, x: Tensor, tables: _Tables, keys: SessionKeys | None, random: Tensor | None) -> Tensor:
        """Rows normed, rotated and, where there are keys, keyed: in C++, or in PyTorch where it was not built."""
        native, place = self._template(x.dtype), self._layers[layer]
        if native is not None:
            return native.compute(layer, True, x, tables.floats, keys, random)
        q, k, _ = place.shape.widths()
        qk, v = x[..., : q + k], x[..., q + k :]
        if place.norms is not None:
            qk = normed(qk, place.norms, place.shape)
        if place.gather is not None and tables.tables is not None:
            qk = place.gather.rotate(qk, place.gather.columns(tables.tables))
        return qk if keys is None or random is None else keyed(qk, v, keys, place.shape, random)

    def _layer(self, shape: AttentionShape, index: int, stored: dict[str, Tensor]) -> _Layer:
        per_kv, d = shape.heads // shape.kv_heads, shape.head_dim
        identity = torch.arange(d).expand(shape.kv_heads, d)
        pi = _permutation(stored[f"{index}.qk"], shape) if not self.noise else identity
        # π of every head of q ‖ k; where none is permuted, one head stands for all
        of_heads = torch.cat([pi.repeat_interleave(per_kv, 0), pi]) if not self.noise else identity[:1]
        if shape.rotary and self._rotary is None:
            raise ValueError("no frequencies for a layer that rotates")
        gather = self._rotary.gather(of_heads) if shape.rotary and self._rotary is not None else None
        restore = None
        if not self.noise:
            inverse = torch.argsort(_permutation(stored[f"{index}.v"], shape), dim=1).repeat_interleave(per_kv, 0)
            restore = (inverse + d * torch.arange(shape.heads)[:, None]).flatten()
        norms = None
        if shape.norm_epsilon is not None:
            weights = [stored[f"{index}.{name}_norm"] for name in "qk"]
            norms = torch.cat([weights[0][pi].repeat_interleave(per_kv, 0), weights[1][pi]])
        return _Layer(shape, norms, gather, restore)

    def _layer_at(self, layer: int) -> _Layer:
        if layer >= self.layers:
            raise MalformedMessage("group", f"no layer {layer}: there are {self.layers}")
        return self._layers[layer]

    def _session(self, name: bytes, peer: str) -> _Session:
        session = self._sessions.get(name)
        if session is None or session.peer != peer:
            raise MalformedMessage("session", "no such session of yours: it was never opened, has ended, or the enclave was restarted")
        session.used = time.monotonic()
        return session

    def _require_room(self, sequences: int, peer: str) -> None:
        held = [(session.peer, session.sequences) for session in self._sessions.values()]
        for whose, count, limit in (
            ("one peer's", sum(count for owner, count in held if owner == peer), self._most_bytes // 2),
            ("all peers'", sum(count for _, count in held), self._most_bytes),
        ):
            if (count + sequences) * self._sequence_bytes > limit:
                most = limit // self._sequence_bytes
                raise MalformedMessage(
                    "session", f"{sequences} more sequences: {whose} keys may take {limit >> 20} MiB, {most} sequences here: close some"
                )

    def _next(self, layer: int, shape: torch.Size, name: bytes, first: int, peer: str) -> _Session:
        session = self._session(name, peer)
        session.vault.require_open()
        if shape[0] != session.sequences:
            raise MalformedMessage("session", f"{shape[0]} sequences, but the session was opened for {session.sequences}")
        if first != session.keyed[layer]:
            raise MalformedMessage("session", f"place {first} of the cache: the next one is {session.keyed[layer]}, each is keyed once")
        if first + shape[1] > self.manifest.limit:  # bounds what the holder of a session can learn; an honest cache is no longer
            raise MalformedMessage("size", f"{first + shape[1]} rows in a cache: the model has {self.manifest.limit} positions")
        return session

    def _keys(self, session: _Session, layer: int) -> SessionKeys:
        keys = session.keys[layer]
        if keys is None:
            keys = session.keys[layer] = self._drawn(session.stream, layer, session.sequences)
        return keys

    def _drawn(self, stream: SecretStream, layer: int, sequences: int) -> SessionKeys:
        shape = self._layers[layer].shape
        return session_keys(stream, shape.kv_heads, shape.head_dim + self.noise, sequences)

    def _tables_for(self, positions: Tensor, dtype: torch.dtype) -> _Tables:
        """The tables of the last positions are kept: every layer of a token asks for the same ones."""
        places = positions.numpy().tobytes()
        kept = self._tables
        if kept is None or (kept.places, kept.shape, kept.dtype) != (places, positions.shape, dtype):
            if int(positions.min()) < -1 or int(positions.max()) >= self.manifest.limit:
                raise MalformedMessage("size", f"a position outside 0 to {self.manifest.limit - 1}")
            tables = self._rotary.tables(positions.clamp_min(0), dtype) if self._rotary is not None else None
            floats = (tables[0].float(), tables[1].float()) if tables is not None else None
            kept = self._tables = _Tables(places, positions.shape, dtype, tables, floats)
        return kept


def _idle_limit(session: _Session) -> float:
    return SEALED_SECONDS if session.vault.state in ("sealed", "resuming") else IDLE_SECONDS


def _rotary_of(stored: dict[str, Tensor]) -> Rotary | None:
    if "rotary.frequencies" not in stored:
        return None
    frequency, partner, sign = (stored[f"rotary.{name}"].long() for name in ("frequency", "partner", "sign"))
    frequencies = stored["rotary.frequencies"]
    if not (int(frequency.min()) >= 0 and int(frequency.max()) <= len(frequencies) and bool((sign.abs() <= 1).all())):
        raise ValueError("not a rotation")  # C++ would look beside the tables
    if bool((frequency == len(frequencies)).logical_and(sign != 0).any()):
        raise ValueError("not a rotation")
    return Rotary(frequencies, float(stored["rotary.scaling"]), frequency, partner, sign)


def _permutation(stored: Tensor, shape: AttentionShape) -> Tensor:
    """π of every kv head, int64 [G, d]."""
    expected = torch.arange(shape.head_dim).expand(shape.kv_heads, shape.head_dim)
    if stored.dtype != torch.int64 or stored.shape != expected.shape or not torch.equal(stored.sort(1).values, expected):
        raise ValueError("not permutations of the heads")
    return stored
