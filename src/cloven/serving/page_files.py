"""The page's own files: static, read once, with headers that let a browser do nothing else with them."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/api.js": "api.js", "/live.js": "live.js"}
PATHS = frozenset(_FILES)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # another version of cloven may stand at this port tomorrow
}


def page_routes() -> list[Route]:
    """A route for each file. They hold no secret, and no key is asked for them."""
    return [_route(path, name) for path, name in _FILES.items()]


def _route(path: str, name: str) -> Route:
    content = (files("cloven.serving") / "page" / name).read_bytes()
    kind = f"{_KINDS[name.rpartition('.')[2]]}; charset=utf-8"

    async def give(_request: Request) -> Response:
        return Response(content, headers={**HEADERS, "content-type": kind})

    return Route(path, give, methods=["GET"])
