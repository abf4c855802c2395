"""What a trusted process can do against its own host's debris: no core dumps, no attaching debuggers of the same user.

Swap and the host's administrator (A9) are outside what cloven protects.
"""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Core dumps off; on Linux the process also becomes undumpable."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
