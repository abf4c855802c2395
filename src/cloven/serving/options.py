"""What `cloven serve` was told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloven.errors import BadInput
from cloven.local_host import LOCAL_HOSTS

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
        max_running: requests computed together; 1: one after the other.
        batch_rows: tokens of all of them in one pass of the model.
        cache_tokens: tokens of all of them in the cache; a request that needs more is computed by itself.
        max_queue: requests that may wait; the next one is refused (429).
        max_body: bytes of a request.
        fixed_length: compute every answer to its `max_tokens`, and drop what comes after its end: how long it is does not show in
            the number of exchanges. Not hidden: `max_tokens`, which the client chooses, and the prompt's length.
        constant_rows: rows of every exchange with the worker (SLIP), and of a pass of the model at most; 0: as many as there are.
            Sizes of exchanges then say nothing, and a pass over a piece of a prompt is the same exchanges as one over the next tokens
            of a batch. Not hidden: the number of passes and their times: without `fixed_length` prompt and answer together.
        page: serve the page for a browser; None: where only this machine can connect. Not hidden by it: whoever has an API key sees
            numbers of everybody's traffic (exchanges, bytes, tokens per second), from which the length of other clients' texts shows.
        compare: the directory of the unprotected original, which the page then compares with; it is loaded into this process.

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
    max_running: int = 16
    batch_rows: int = 256
    cache_tokens: int = 8192
    max_queue: int = 64
    max_body: int = 2**20
    fixed_length: bool = False
    constant_rows: int = 0
    page: bool | None = None
    compare: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise BadInput(f"port {self.port}: give 0 to 65535")
        if self.max_tokens < 1 or self.max_queue < 0 or not 0 < self.max_body <= _MOST_BODY:
            raise BadInput(f"max_tokens: give 1 or more; max_queue: 0 or more; max_body: 1 to {_MOST_BODY} bytes")
        if not 1 <= self.max_running <= 1024 or self.batch_rows < self.max_running or self.cache_tokens < 16:
            raise BadInput("max_running: 1 to 1024; batch_rows: at least max_running; cache_tokens: 16 or more")
        if self.constant_rows and self.constant_rows < self.max_running:
            raise BadInput(
                f"constant_rows {self.constant_rows}: at least one row for each of the {self.max_running} requests of max_running"
            )
        if self.compare is not None and not self.with_page:
            raise BadInput("compare: it is the page that compares, and there is none: give --page")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise BadInput("TLS needs both a certificate and its key: give --tls-certificate FILE and --tls-key FILE")
        if not self.local and self.api_key_file is None and not self.insecure_open:
            raise BadInput(
                f"{self.host} can be reached from the network: give --api-key-file FILE, or --insecure-open to let everybody use the model"
            )

    @property
    def rows(self) -> int:
        """Tokens of one pass of the model, at most."""
        return self.constant_rows or self.batch_rows

    @property
    def with_page(self) -> bool:
        """Whether there is a page for a browser."""
        return self.local if self.page is None else self.page

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOCAL_HOSTS

    @property
    def url(self) -> str:
        """Scheme and host, without the port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_certificate else 'http'}://{host}"
