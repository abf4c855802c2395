"""A headless Chromium, where there is one, driven by Playwright, where that is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

WANTED = "a browser: needs `pip install playwright` and Debian's package chromium"


def chromium() -> str | None:
    """The browser's path; None: there is none, or nothing to drive it with."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def running(path: str) -> Iterator[Any]:
    """Playwright's browser. While it runs, this thread cannot run another event loop."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # of this process; five seconds are little on a machine that has much to do
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail, and say where, instead of waiting for ever for a browser that has gone; in the main thread."""

    def late(*_: object) -> NoReturn:
        raise TimeoutError(f"not done within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Tab:
    """A page of its own, which remembers what it asked for and what went wrong in it."""

    def __init__(self, browser: Any, root: str, width: int = 1280, **more: Any) -> None:
        self._context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        self._context.set_default_timeout(60_000)
        self.page = self._context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.goto(f"{root}/")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def text(self, name: str) -> str:
        """Of the element with this id."""
        return str(self.page.locator(f"#{name}").inner_text())

    def number(self, name: str) -> int:
        """The same as a number."""
        return int(self.text(name).replace(",", ""))

    def strip(self) -> list[int]:
        """The pixels of what the worker sees."""
        script = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
        pixels: list[int] = self.page.locator("#strip").evaluate(script)
        return pixels

    def send(self, prompt: str, tokens: int = 12) -> None:
        """Type a prompt and send it by the keyboard."""
        self.page.get_by_label("Tokens, at most").fill(str(tokens))
        self.page.locator("#prompt").fill(prompt)
        self.page.locator("#prompt").press("Enter")

    def answer(self) -> str:
        """The last text of the model, when it is complete."""
        from playwright.sync_api import expect

        expect(self.page.locator("#status")).to_contain_text("Complete")
        return str(self.page.locator(".turn.model p").last.text_content())
