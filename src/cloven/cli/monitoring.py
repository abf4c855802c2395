"""What all servers' commands have in common: their log, and their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloven.metrics.catalog import Source
    from cloven.wire.server import Server

METRICS_HOST = "127.0.0.1"

LogLevel = Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR; default: what CLOVEN_LOG says, else WARNING.")]
LogFormat = Annotated[str, typer.Option(help="text, or json: one object a line, without secrets and contents.")]
MetricsPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Publish metrics for Prometheus and `cloven top` at http://HOST:PORT/metrics.")
]
MetricsHost = Annotated[str, typer.Option(help="Where they are published: anybody who can connect may read them.")]


def require_installed(what: str, *modules: str) -> None:
    """Fail before anything is loaded where what is wanted cannot be had.

    Raises:
        BadInput: one of the modules is not installed.
    """
    import importlib.util

    from cloven.errors import BadInput

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BadInput(f"{what} needs {module}: pip install 'cloven[serve]'")


def prepare_monitoring(level: str | None, form: str, metrics_port: int | None) -> None:
    """Set the log up, and see that metrics can be published, before anything is loaded.

    Raises:
        BadInput: wrong settings, or prometheus_client is not installed.
    """
    from cloven.metrics.structured_log import configure_log

    configure_log(level, form)
    if metrics_port is not None:
        require_installed("--metrics-port", "prometheus_client")


@contextlib.contextmanager
def published(service: Server, host: str, port: int | None) -> Iterator[None]:
    """Publish a server's metrics while it serves, or close it where they cannot be published: see `published_of`."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(published_of(service.role, service.samples, host, port))
        except BaseException:
            service.close()
            raise
        yield


@contextlib.contextmanager
def published_of(role: str, samples: Source, host: str, port: int | None) -> Iterator[None]:
    """Publish a process's metrics while it serves.

    Raises:
        BadInput, RunError: see `MetricsEndpoint`.
    """
    if port is None:
        yield
        return
    from cloven.metrics.endpoint import MetricsEndpoint

    with MetricsEndpoint(host, port, role, [samples]) as endpoint:
        if role != "serve":  # there, standard output says where the endpoint is
            typer.echo(f"metrics at {endpoint.address}")
        yield
