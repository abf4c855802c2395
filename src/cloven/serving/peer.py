"""Whether the other half's process is there: asked over a connection of its own, so that no session is touched."""

from __future__ import annotations

from cloven.errors import ClovenError, RunError
from cloven.model.runtime import RuntimeOptions, open_channel
from cloven.serving.half import Half
from cloven.slip.workers import seat_addresses
from cloven.telemetry import Telemetry, logger

_PROBE_SECONDS = 1.0


def peer_is_there(half: Half, options: RuntimeOptions) -> bool:
    """Whether somebody answers for every part of the bundle, within a second each."""
    seats = seat_addresses(options.address, options.placement) if half.scheme == "slip" else [[half.address]]
    return all(any(_answers(half, options, address) for address in seat) for seat in seats)


def _answers(half: Half, options: RuntimeOptions, address: str) -> bool:
    try:
        channel = open_channel(
            options.with_timeout(_PROBE_SECONDS), half.bundle, Telemetry(), address=address, schema=half.schema, peer=half.peer
        )
    except ClovenError as error:  # its folder is gone, say
        logger.debug("%s cannot be asked: %s", address, error)
        return False
    try:
        channel.hello()
    except RunError:
        return False
    except ClovenError as error:  # somebody else's server stands there now
        logger.warning("%s answers, but is not who is needed: %s", address, error)
        return False
    finally:
        channel.close()
    return True
