"""A person with a browser, for tests of the chat's page."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_eve.inference.chat import Limits

pytest.importorskip("gradio", reason="gradio is not installed (make install-dev)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make install-dev)")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # milliseconds; the machine may be busy

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian's package of that name)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=QUIET)
        yield browser
        browser.close()


class Person:
    """Somebody with a browser of their own, and every address it asked for."""

    def __init__(self, browser: Any, url: str) -> None:
        self.url, self.context = url, browser.new_context(viewport={"width": 1000, "height": 800})
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.events = 0  # events that Gradio has not ended; it drops what is sent before their end
        self.page.on("request", self._count)
        for name in ("requestfinished", "requestfailed"):
            self.page.on(name, self._ended)
        self.page.on("dialog", lambda dialog: self.errors.append("a dialog"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(url)
        expect(self.box).to_be_visible()

    @property
    def box(self) -> Any:
        return self.page.locator("textarea")

    @property
    def told(self) -> Any:
        """Answers on the page."""
        return self.page.get_by_test_id("bot")

    def _count(self, request: Any) -> None:
        self.asked.append(request.url)
        self.events += "/queue/join" in request.url

    def _ended(self, request: Any) -> None:
        if "/queue/data" in request.url:  # the stream of all events closes with the last
            self.events = 0

    def wait(self) -> None:
        """Wait until a question can be sent: the box is enabled a moment before the last event ends."""
        expect(self.box).to_be_enabled()
        deadline = time.monotonic() + 30
        while self.events and time.monotonic() < deadline:
            self.page.wait_for_timeout(20)  # milliseconds
        assert not self.events, "Gradio has not ended the last event"

    def drop(self, content: bytes, name: str = "photo.png") -> None:
        expect(self.box).to_be_enabled()
        self.page.set_input_files(
            "input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content}
        )
        expect(self.page.locator(".thumbnail-item")).to_have_count(1)

    def ask(self, question: str) -> Any:
        """Type a question and send it; the message that gets the answer."""
        self.wait()
        count = self.told.count()
        self.box.fill(question)
        self.box.press("Enter")
        return self.told.nth(count)

    def leave(self) -> None:
        """Nothing but this server was asked for anything, and the page had nothing to complain of."""
        self.context.close()
        assert {re.match(r"[a-z]+:(//[^/]*/)?", url)[0] for url in self.asked} <= {  # type: ignore[index]
            self.url, "blob:", "data:",
        }  # fmt: skip
        # The browser itself reports answers such as 413.
        assert [text for text in self.errors if "Failed to load resource" not in text] == []


LIMITS = Limits(new_tokens=50, questions=3, characters=1500, upload_bytes=100_000, waiting=1)
