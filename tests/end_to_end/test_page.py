"""The page in a real browser, over a real endpoint and a real worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.cluster.worker_process import WorkerProcess
from cloven.serving.live import RESIDUES
from cloven.worker.transcript import read_transcript
from cloven.zoo.demo import demo_model_path
from tests.end_to_end.browser import WANTED, Tab, at_most, chromium, running
from tests.end_to_end.endpoint import TEMPLATE, EndpointProcess, endpoint, kv_demo, lora_demo, written
from tests.lora_bundles import copied
from tests.split_models import demo_bundle, demo_model, demo_tokenizer, greedy, scratch

F32 = ("--dtype", "float32")
KEY = "page-key-0123456789abcdef"
MARKUP = "<img src=x onerror=\"document.title='hit'\">"


def expected(prompt: str, tokens: int) -> str:
    """What the unsplit model writes."""
    return str(demo_tokenizer().decode(greedy(demo_model(), prompt, tokens, pad_token_id=0), skip_special_tokens=True))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    with at_most(240):
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip(WANTED)
    with running(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(demo_worker: WorkerProcess) -> Iterator[EndpointProcess]:
    """The demo model, int8x2, whose greedy texts are those of the unsplit one, and that to compare with."""
    arguments = ("--worker", demo_worker.address, *F32, "--model-name", "bard", "--compare", str(demo_model_path()))
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as (process, _):
        yield process


def test_a_prompt_is_answered_and_what_it_costs_is_shown(browser: Any, served: EndpointProcess) -> None:
    with Tab(browser, served.root) as tab:
        tab.page.get_by_role("heading", name="What the worker sees").wait_for()
        assert tab.text("model") == "bard" and tab.text("state") == "ready" and tab.page.title().startswith("bard")
        before = tab.number("rounds-all")
        tab.send("ROMEO:", 24)
        assert tab.answer() == expected("ROMEO:", 24)
        rounds, first, pixels = tab.number("rounds"), tab.text("bytes"), tab.strip()
        assert rounds == 24 * 21 and tab.number("rounds-all") == before + rounds  # 21 exchanges for every pass of this model
        assert tab.text("up").endswith("KB") and tab.text("down").endswith("B") and float(tab.text("rate")) > 0
        assert len(set(zip(*[iter(pixels)] * 4, strict=True))) > 50  # colours: it is no picture of anything
        tab.send("My lord,", 5)
        assert tab.answer() == expected("My lord,", 5)
        assert tab.text("bytes") != first and tab.strip() != pixels and tab.number("rounds") == 5 * 21
        assert tab.complaints == [] and tab.asked and all(url.startswith(f"{served.root}/") for url in tab.asked)
        tab.page.get_by_role("button", name="New").click()
        assert tab.page.locator(".turn").count() == 0


def test_tokens_come_one_by_one_and_can_be_stopped(browser: Any, served: EndpointProcess) -> None:
    from playwright.sync_api import expect

    with Tab(browser, served.root) as tab:
        tab.send("ROMEO:", 200)
        expect(tab.page.locator(".turn.model p")).to_contain_text("tell thee")
        expect(tab.page.locator("#state")).to_have_text("computing")
        seen, bytes_seen = tab.page.locator(".turn.model p").text_content(), tab.text("bytes")
        expect(tab.page.locator("#bytes")).not_to_have_text(bytes_seen)  # while it writes
        tab.page.get_by_role("button", name="Stop").click()
        expect(tab.page.locator("#status")).to_have_text("Stopped.")
        text = tab.page.locator(".turn.model p").text_content()
        assert seen and text.startswith(seen) and len(seen) < len(text) < len(expected("ROMEO:", 200))
        expect(tab.page.locator("#state")).to_have_text("ready")  # nothing goes on
        tab.send("ROMEO:", 3)
        assert tab.answer() == expected("ROMEO:", 3) and tab.complaints == []


def test_the_comparison(browser: Any, served: EndpointProcess) -> None:
    with Tab(browser, served.root) as tab:
        tab.page.get_by_role("button", name="Compare").click()
        assert "Write something first" in tab.text("compared")
        tab.send("ROMEO:", 12)
        tab.answer()
        tab.page.get_by_role("button", name="Compare").click()
        tab.page.get_by_text("The same 12 tokens.").wait_for()
        assert tab.text("compared").count("tokens/s") == 2 and tab.page.get_by_role("meter").count() == 2
        assert tab.number("rounds") == 12 * 21  # the answer's, without the comparison's
        assert tab.complaints == []


def test_text_is_never_markup_and_errors_are_words(browser: Any, served: EndpointProcess) -> None:
    with Tab(browser, served.root) as tab:
        tab.send(MARKUP, 5)
        tab.answer()
        assert tab.page.locator(".turn.you p").text_content() == MARKUP
        assert tab.page.locator("img").count() == 0 and tab.page.title() != "hit" and tab.complaints == []
        tab.send("thou " * 600, 5)
        tab.page.get_by_role("alert").filter(has_text="the model takes").wait_for()
        assert tab.page.locator(".turn").last.get_attribute("class") == "turn model cut"
        assert tab.page.locator("#prompt").input_value() == "thou " * 600  # nothing that was typed is lost
        tab.page.route("**/v1/completions", lambda route: route.abort())
        tab.send("ROMEO:", 5)
        tab.page.get_by_role("alert").filter(has_text="The server cannot be reached").wait_for()


def test_keys(browser: Any, demo_worker: WorkerProcess, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    arguments = ("--worker", demo_worker.address, *F32, "--api-key-file", str(keys))
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as (process, _), Tab(browser, process.root) as tab:
        field = tab.page.get_by_label("API key")
        for wrong, why in (("wrong-key-0123456789abcdef", "The server does not know this key."), ("ключ", "A key has")):
            field.fill(wrong)
            field.press("Enter")
            expect(tab.page.locator("#key-error")).to_contain_text(why)
            assert tab.page.locator("#main").is_hidden()
        field.fill(KEY)
        field.press("Enter")
        tab.page.locator("#main").wait_for()
        assert field.is_hidden() and field.input_value() == ""
        tab.send("ROMEO:", 5)
        assert tab.answer() == expected("ROMEO:", 5)
        assert "--compare MODEL_DIR" in tab.text("compare-how") and tab.page.get_by_role("button", name="Compare").count() == 0
        kept = tab.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert kept == '[{},{},""]' and KEY not in tab.page.content() and not any(KEY in url for url in tab.asked)
        tab.page.reload()
        field.wait_for()  # it was in memory


def test_a_conversation_by_a_chat_template(browser: Any, demo_worker: WorkerProcess) -> None:
    template = scratch() / "page.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    arguments = ("--worker", demo_worker.address, *F32, "--chat-template", str(template), "--compare", str(demo_model_path()))
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as (process, _), Tab(browser, process.root) as tab:
        tab.page.get_by_label("Message").wait_for()
        tab.send("Good morrow.", 6)
        first = tab.answer()
        assert first == expected("USER:\nGood morrow.\nROMEO:", 6)
        tab.send("And thou?", 6)
        assert tab.answer() == expected(f"USER:\nGood morrow.\nASSISTANT:\n{first}\nUSER:\nAnd thou?\nROMEO:", 6)
        tab.page.get_by_role("button", name="Compare").click()
        tab.page.get_by_text("The same 6 tokens.").wait_for()
        assert tab.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_narrow_and_wide_light_and_dark(browser: Any, served: EndpointProcess, width: int, scheme: str) -> None:
    """Nothing sticks out, text can be told from its ground, and the keyboard reaches everything."""
    with Tab(browser, served.root, width, color_scheme=scheme) as tab:
        tab.send("ROMEO:", 5)
        tab.answer()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        colours = (
            "(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor].map(c => c.match(/\\d+/g).map(Number)))"
        )
        for name in ("seen", "status", "model", "shared"):
            ink, paper = tab.page.locator(f"#{name}").evaluate(colours)
            assert contrast(ink, paper) > 4.5, (name, ink, paper)
        tab.page.locator("#log").focus()
        reached = []
        for _ in range(7):
            tab.page.keyboard.press("Tab")
            reached.append(tab.page.evaluate("document.activeElement.id"))
        assert reached == [
            "prompt",
            "send",
            "clear",
            "tokens",
            "temperature",
            "compare",
            *reached[6:],
        ]  # Stop only while there is something


def contrast(*colours: list[int]) -> float:
    """WCAG's ratio of two colours."""
    linear = [[c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]] for colour in colours]
    light, dark = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# --- the same without a browser


def sent(process: EndpointProcess) -> Any:
    return httpx.get(f"{process.root}/live", timeout=20).json()


def test_what_is_shown_is_what_the_worker_received(tmp_path: Path) -> None:
    recording, bundle = tmp_path / "seen", demo_bundle("int8x2")
    with (
        WorkerProcess(bundle.exposed, None, "--record", str(recording)) as worker,
        endpoint(bundle.trusted, "--worker", worker.address, *F32) as (process, client),
    ):
        assert sent(process)["sent"] is None and sent(process)["scheme"] == "slip"
        shown = []
        for prompt in ("ROMEO:", "ROMEO:"):
            written(client, prompt, 4)
            shown.append(sent(process)["sent"]["residues"])
            time.sleep(0.1)
            (*_, (_, last)) = read_transcript(recording)
            assert shown[-1] == last[-1, -RESIDUES:].tolist()
        assert not set(shown[0]) & set(shown[1])  # the same text again, and nothing of it is the same
        together = torch.tensor(shown).double()
        assert 0.4 < float((together > 0).double().mean()) < 0.6 and float(together.abs().max()) > 0.9 * 2**30


@pytest.mark.long
def test_private_lora_and_kv_shield(tmp_path: Path) -> None:
    """The encrypted query of the one is shown; of the other, whose enclave gets plaintext, nothing."""
    out = copied(lora_demo(), tmp_path / "out")
    with (
        AdapterServerProcess(out / "server") as server,
        endpoint(out / "client", "--server", server.address, "--base", str(demo_model_path()), *F32) as (process, client),
    ):
        assert sent(process)["sent"] is None
        shown = []
        for _ in range(2):
            written(client, "ROMEO:", 2)
            shown.append(sent(process))
        assert shown[0]["scheme"] == "private-lora" and shown[0]["exchanges"] > 0
        assert not set(shown[0]["sent"]["residues"]) & set(shown[1]["sent"]["residues"])
    out = kv_demo("permute")
    with EnclaveProcess(out / "trusted") as peer, endpoint(out / "exposed", "--enclave", peer.address, *F32) as (process, client):
        sent(process)
        written(client, "ROMEO:", 2)
        seen = sent(process)
        assert seen["scheme"] == "kv-shield" and seen["sent"] is None and seen["exchanges"] > 0


@pytest.mark.long
def test_without_a_page(demo_worker: WorkerProcess) -> None:
    with endpoint(demo_bundle("int8x2").trusted, "--worker", demo_worker.address, *F32, "--no-page") as (process, client):
        assert [httpx.get(f"{process.root}{path}", timeout=20).status_code for path in ("/", "/page.js", "/live")] == [404] * 3
        assert written(client, "ROMEO:", 3) == expected("ROMEO:", 3)
