"""By which names this machine alone is reached.

A server that listens on the loopback address is out of everybody else's reach, but not of a web page in a browser of this machine, whose
own name resolves to it: what such a page asks says that name.
"""

from __future__ import annotations

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def named(host: str) -> str:
    """The name in a Host header, without a port and brackets, in lower case."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.lower().removeprefix("[").removesuffix("]")
