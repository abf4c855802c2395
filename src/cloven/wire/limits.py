"""Size limits of the wire, the same constants on both sides; there is no negotiation."""

from __future__ import annotations

MAX_PAYLOAD_BYTES = 64 * 2**20  # of one tensor frame, either way; longer batches are cut into several exchanges
MAX_HEADER_BYTES = 2048  # MAX_TEXT characters of 4 bytes, and the rest
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 1024  # as ZeroMQ counts: CURVE adds 33 bytes to a frame
MAX_FRAMES = 2  # header and payload
MAX_TEXT = 300  # characters of an error message
QUEUED_MESSAGES = 4  # high-water mark, per connection and direction
MAX_CONNECTIONS = 256  # admitted at a time by a server that checks its peers
HANDSHAKE_MILLISECONDS = 5_000
LINGER_MILLISECONDS = 500
DEFAULT_TIMEOUT = 30.0  # seconds


def rows_per_exchange(columns_in: int, columns_out: int) -> int:
    """How many rows of int32 residues fit in one exchange of a group [columns_out, columns_in]."""
    return max(1, MAX_PAYLOAD_BYTES // (4 * max(columns_in, columns_out)))
