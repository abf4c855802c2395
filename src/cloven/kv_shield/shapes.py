"""What the enclave knows of a model: the shapes of its attention layers and its rotary embedding. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloven.errors import BadBundle
from cloven.wire.lane import CAPACITY

STEP_NOISE = 2**22  # numbers, for all layers of a pass


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer.

    Args:
        name: the attention module's name in the model.
        heads, kv_heads, head_dim: H, G and d. Query head h belongs to kv head h // (H / G).
        projections: names of the modules that make q ‖ k ‖ v, in this order; one of them where they are fused.
        output: name of the module that takes the attention output.
        rotary: whether q and k are rotated.
        norm_epsilon: ε of the RMS norms of q and k; None where there are none.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    projections: tuple[str, ...]
    output: str
    rotary: bool
    norm_epsilon: float | None

    def widths(self, extra: int = 0) -> tuple[int, int, int]:
        """Widths of q, k and v with `extra` dimensions per head."""
        size = self.head_dim + extra
        return self.heads * size, self.kv_heads * size, self.kv_heads * size

    def slices(self) -> list[slice]:
        """The rows of W_q ‖ W_k ‖ W_v that each projection makes."""
        q, k, v = self.widths()
        return [slice(0, q), slice(q, q + k), slice(q + k, q + k + v)] if len(self.projections) == 3 else [slice(0, q + k + v)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def fits_step(layers: Sequence[AttentionShape], noise: int, rows: int, element_size: int) -> bool:
    """Whether a pass over so many rows can be a step: a lane carries every call, either way, and not too much noise is drawn at once."""
    widest = max(sum(shape.widths(noise)) for shape in layers)
    return rows * widest * element_size <= CAPACITY and rows * sum(2 * shape.kv_heads * noise for shape in layers) <= STEP_NOISE


def calls_of(layers: Sequence[AttentionShape], noise: int) -> list[tuple[int, bool]]:
    """Layer and kind (whether it keys) of every call to the enclave in a pass over the model, in order."""
    return [(index, key) for index, shape in enumerate(layers) for key in ((True, False) if noise or shape.rotary else (False,))]


def parse_attention(record: object, path: Path) -> AttentionShape:
    """One layer of a manifest.

    Raises:
        BadBundle: malformed.
    """
    if not isinstance(record, dict) or set(record) != set(AttentionShape.__dataclass_fields__):
        raise BadBundle(f"{path}: malformed (an attention layer)")
    sizes = [record[name] for name in ("heads", "kv_heads", "head_dim")]
    names = [record["name"], record["output"]]
    projections, epsilon = record["projections"], record["norm_epsilon"]
    valid = (
        all(type(size) is int and 0 < size < 2**16 for size in sizes)
        and all(isinstance(name, str) for name in names)
        and isinstance(projections, list)
        and len(projections) in (1, 3)
        and all(isinstance(name, str) for name in projections)
        and type(record["rotary"]) is bool
        and (epsilon is None or (type(epsilon) is float and 0 <= epsilon < 1))
    )
    if not valid or record["heads"] % record["kv_heads"]:
        raise BadBundle(f"{path}: malformed (an attention layer)")
    return AttentionShape(**{**record, "projections": tuple(projections)})
