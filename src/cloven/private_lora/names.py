"""Names of the client's tensors."""

from __future__ import annotations

CLIENT_FILE = "model.safetensors"


def hint_name(group: int) -> str:
    """H, residues int32 [N, n]."""
    return f"cloven.{group}.hint"


def scales_name(group: int) -> str:
    """Scales of the integer rows, float64 [N]."""
    return f"cloven.{group}.scales"


def basis_name(group: int, position: int) -> str:
    """V of a module, float32 [outputs, r]."""
    return f"cloven.{group}.{position}.basis"
