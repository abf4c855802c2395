"""What a split kept secret, per kind of layer, and what quantisation cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Kind:
    """Totals for all layers of one kind (q_proj, down_proj, …); `without_secret` counts matrices that got rank 0 of the budget."""

    layers: int = 0
    parameters: int = 0
    secret_parameters: int = 0
    without_secret: int = 0
    secret_energy: float = 0.0
    energy: float = 0.0


@dataclass
class Summary:
    """Collected while the bundle is written."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    _error: float = 0.0
    _exposed_energy: float = 0.0

    def add(self, name: str, rows: int, columns: int, rank: int, secret_energy: float, energy: float) -> None:
        """Count one matrix [rows, columns] whose secret part has `rank` and carries `secret_energy` of `energy`, squared Frobenius norms:
        of the matrix, or of its difference from the public base."""
        kind = self.kinds.setdefault(name.rpartition(".")[2], Kind())
        kind.layers += 1
        kind.parameters += rows * columns
        kind.without_secret += rank == 0
        kind.secret_parameters += rank * (rows + columns)
        kind.secret_energy += secret_energy
        kind.energy += energy

    def add_quantisation(self, error: float, energy: float) -> None:
        """Count the squared error and the squared norm of a group's exposed matrix."""
        self._error += error
        self._exposed_energy += energy

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        parameters = sum(kind.parameters for kind in self.kinds.values())
        return {
            "secret_fraction": sum(kind.secret_parameters for kind in self.kinds.values()) / parameters,
            "secret_energy": _rounded(
                sum(kind.secret_energy for kind in self.kinds.values()), sum(kind.energy for kind in self.kinds.values())
            ),
            "quantisation_error": math.sqrt(_rounded(self._error, self._exposed_energy)),
            "kinds": {
                name: {
                    "layers": kind.layers,
                    "parameters": kind.parameters,
                    "secret_parameters": kind.secret_parameters,
                    "layers_without_secret": kind.without_secret,
                    "secret_energy": _rounded(kind.secret_energy, kind.energy),
                }
                for name, kind in self.kinds.items()
            },
        }


def _rounded(part: float, whole: float) -> float:
    """part / whole to nine digits: in which order a library sums may depend on where in memory a tensor lies; the manifest should not."""
    return float(f"{part / max(whole, 1e-300):.9g}")
