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
            "secret_energy": sum(kind.secret_energy for kind in self.kinds.values())
            / max(sum(k.energy for k in self.kinds.values()), 1e-300),
            "quantisation_error": math.sqrt(self._error / max(self._exposed_energy, 1e-300)),
            "kinds": {
                name: {
                    "layers": kind.layers,
                    "parameters": kind.parameters,
                    "secret_parameters": kind.secret_parameters,
                    "layers_without_secret": kind.without_secret,
                    "secret_energy": kind.secret_energy / max(kind.energy, 1e-300),
                }
                for name, kind in self.kinds.items()
            },
        }
