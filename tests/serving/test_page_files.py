"""The page's files and what goes with them; what they do in a browser is in end_to_end/test_page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from cloven.serving.api_keys import ApiKeys
from cloven.serving.page_files import PATHS
from tests.served import endpoint, run

KEY = "one-0123456789abcdefghij"
FOLDER = files("cloven.serving") / "page"
SCRIPTS = ("api.js", "live.js", "page.js")


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags with their attributes, and what stands in scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inside.append(data)


def elements() -> Elements:
    parser = Elements()
    parser.feed(text("index.html"))
    return parser


def test_every_file_has_a_route_and_every_route_a_file() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {path.removeprefix("/") or "index.html" for path in PATHS}


def test_nothing_comes_from_elsewhere() -> None:
    for name in ("index.html", "page.css", *SCRIPTS):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text(name)), name
    sources = [value for _, attributes in elements().tags for name, value in attributes.items() if name in ("src", "href", "action")]
    assert sources and set(sources) <= PATHS | {"data:,"}
    for name in SCRIPTS:
        assert set(re.findall(r'from "([^"]+)"', text(name))) <= PATHS


def test_nothing_in_the_page_itself_runs() -> None:
    """A policy without 'unsafe-inline' would stop it: then it must not be needed."""
    found = elements()
    assert found.inside == []
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_stays_text_and_keys_in_memory(name: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text(name))
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie|\.style\b", text(name))


def test_every_field_has_a_label() -> None:
    tags = elements().tags
    labelled = {attributes["for"] for tag, attributes in tags if tag == "label"}
    fields = {attributes["id"] for tag, attributes in tags if tag in ("input", "textarea", "select")}
    assert fields == labelled and len(fields) == 4
    named = {attributes.get("id"): attributes for _, attributes in tags}
    assert named["log"]["role"] == "log" and named["log"]["aria-live"] == "polite"
    assert named["error"]["role"] == named["key-error"]["role"] == "alert" and named["state"]["role"] == "status"


def test_what_the_scripts_look_for_is_there() -> None:
    present = {attributes["id"] for _, attributes in elements().tags if "id" in attributes}
    for name in SCRIPTS:
        wanted = set(re.findall(r'element\("([a-z-]+)"\)', text(name)))
        assert wanted <= present, name


def policy(response: Any) -> dict[str, str]:
    """Directive by directive."""
    parts = [part.strip().partition(" ") for part in response.headers["content-security-policy"].split(";")]
    return {name: value for name, _, value in parts}


def test_headers_and_keys() -> None:
    async def scenario() -> None:
        async with endpoint(ApiKeys([KEY]), max_running=1) as (client, _, _):
            for path in PATHS:
                answer = await client.get(path)  # without a key: it holds nothing
                assert answer.status_code == 200 and KEY not in answer.text
                kind = "html" if path == "/" else path.rpartition(".")[2].replace("js", "javascript")
                assert answer.headers["content-type"] == f"text/{kind}; charset=utf-8"
                rules = policy(answer)
                assert rules["default-src"] == rules["form-action"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
                assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'" and rules["img-src"] == "data:"
                assert "unsafe" not in str(rules) and "http" not in str(rules) and "*" not in str(rules)
                assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
                assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            for method, path in (("GET", "/live"), ("POST", "/compare")):
                assert (await client.request(method, path, json={})).status_code == 401
            live = await client.get("/live", headers={"authorization": f"Bearer {KEY}"})
            assert live.status_code == 200 and live.headers["cache-control"] == "no-store"
            assert (await client.get("/", headers={"host": "evil.example"})).status_code == 421
            assert (await client.post("/", json={}, headers={"authorization": f"Bearer {KEY}"})).status_code == 405

    run(scenario)


def test_without_the_page() -> None:
    async def scenario() -> None:
        async with endpoint(page=False, max_running=1) as (client, _, _):
            for method, path in (*(("GET", path) for path in PATHS), ("GET", "/live"), ("POST", "/compare")):
                assert (await client.request(method, path, json={})).status_code == 404
        async with endpoint(ApiKeys([KEY]), page=False, max_running=1) as (client, _, _):
            assert (await client.get("/")).status_code == 401

    run(scenario)
