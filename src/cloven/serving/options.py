"""What `cloven serve` was told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloven.errors import BadInput

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_MOST_BODY = 64 * 2**20


@dataclass(frozen=True)
class ServeOptions:
    """How the endpoint serves; `cloven.model.runtime.RuntimeOptions` says how it reaches the worker.

    Args:
        host, port: where to listen; port 0: any free one.
        api_key_file: keys that clients must give; None: nobody is asked.
        tls_certificate, tls_key: PEM files; None: plain HTTP.
        insecure_open: allow an address of the network without API keys.
        max_tokens: tokens that one answer may have at most, and has where the request does not say.
        max_queue: requests that may wait; the next one is refused (429).
        max_body: bytes of a request.
        fixed_length: compute every answer to its `max_tokens`.

    Raises:
        BadInput: they contradict each other, or would serve the network without asking anybody for a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure_open: bool = False
    max_tokens: int = 1024
    max_queue: int = 64
    max_body: int = 2**20
    fixed_length: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise BadInput(f"port {self.port}: give 0 to 65535")
        if self.max_tokens < 1 or self.max_queue < 0 or not 0 < self.max_body <= _MOST_BODY:
            raise BadInput(f"max_tokens: give 1 or more; max_queue: 0 or more; max_body: 1 to {_MOST_BODY} bytes")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise BadInput("TLS needs both a certificate and its key: give --tls-certificate FILE and --tls-key FILE")
        if not self.local and self.api_key_file is None and not self.insecure_open:
            raise BadInput(
                f"{self.host} can be reached from the network: give --api-key-file FILE, or --insecure-open to let everybody use the model"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOCAL_HOSTS

    @property
    def url(self) -> str:
        """Scheme and host, without the port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_certificate else 'http'}://{host}"
