"""SLIP as a scheme of `cloven.model.registration`."""

from __future__ import annotations

from typing import Any

from torch import nn

from cloven.model.registration import register_scheme
from cloven.model.runtime import RuntimeOptions
from cloven.slip.session import SlipSession, open_session
from cloven.slip.split_model import SplitModelShape, swap_modules


class Slip:
    """Swaps linears for `SplitLinear`s and opens SLIP sessions."""

    def swap(self, model: nn.Module, description: dict[str, Any]) -> None:
        """See `Scheme.swap`."""
        swap_modules(model, SplitModelShape.from_dict(description))

    def attach(self, model: nn.Module, options: RuntimeOptions) -> SlipSession:
        """See `Scheme.attach`."""
        return open_session(model, options)


register_scheme("slip", Slip())
