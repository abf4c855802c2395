"""What the page shows beside the chat: what the session's exchanges cost, and what the worker sees.

The numbers are those of all clients together. What the worker sees is the last row that was sent to it, as the channel shows it: a pad or
an LWE sample lies over it, so that it is noise whatever the text is, and the worker has it anyway. KV-Shield sends its enclave plaintext:
nothing of that is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from cloven.model.attach import scheme_of
from cloven.model.runtime import Session
from cloven.serving.generation import Generation
from cloven.serving.model import READY, ServedModel

RESIDUES = 128  # the last ones of a row: a query of private LoRA begins with columns that carry no input
SHOWN = ("slip", "private-lora")  # whose queries are masked


class Live:
    """See the module. Nothing is watched until somebody has looked.

    Args:
        served: the model.
        running: the requests that are being computed.
        waiting: how many wait.
    """

    def __init__(self, served: ServedModel, running: Callable[[], Collection[Generation]], waiting: Callable[[], int]) -> None:
        self._served, self._running, self._waiting = served, running, waiting
        self._scheme = scheme_of(served.model) or "none"
        self._watched: Session | None = None
        self._sent: tuple[str, int, Tensor] | None = None
        self._last_rate: float | None = None

    def ended(self, generation: Generation) -> None:
        """A request is over: its rate is shown until the next one has one."""
        self._last_rate = generation.rate or self._last_rate

    def look(self) -> dict[str, Any]:
        """Everything, as JSON; numbers are of all clients, since the session began."""
        session = self._served.session
        if session is not self._watched:  # the first look, or the session was opened anew
            self._watch(session)
        total, rates = session.telemetry.total(), [rate for one in self._running() if (rate := one.rate)]
        return {
            "state": "ok" if self._served.state == READY else self._served.state,
            "scheme": self._scheme,
            "running": len(self._running()),
            "waiting": self._waiting(),
            "exchanges": total.exchanges,
            "rows": total.rows,
            "bytes_up": total.bytes_up,
            "bytes_down": total.bytes_down,
            "tokens_per_s": sum(rates) if rates else self._last_rate,
            "sent": self._row(),
        }

    def _watch(self, session: Session) -> None:
        self._watched, self._sent = session, None
        if self._scheme in SHOWN:
            session.channel.watcher = self._see

    def _see(self, layer: str, c: Tensor) -> None:
        self._sent = layer, c.shape[1], c[-1, -RESIDUES:].clone()  # c is the next exchange's, too

    def _row(self) -> dict[str, Any] | None:
        if self._sent is None:
            return None
        layer, width, residues = self._sent
        return {"layer": layer, "width": width, "residues": residues.tolist()}
