"""The chat's page in a real browser: what a person does, what a hostile one tries, and which hosts are asked."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.inference.chat import Limits
from tests.inference.scripted import HOSTILE
from tests.inference.test_chat import Running, until
from tests.inference.test_generate import picture

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=30_000)

ROOT = Path(__file__).parents[2]
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
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.complaints.append("a dialog"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url)

    def drop(self, content: bytes, name: str = "photo.png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})

    def ask(self, question: str) -> Any:
        """Type a question and send it; the item that gets the answer."""
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        return self.page.locator("#turns .told").last

    @property
    def notice(self) -> Any:
        return self.page.locator("#notice")


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running(Limits(new_tokens=50, questions=3, characters=1500, upload_bytes=100_000, waiting=1))
    yield server
    server.stop()


@pytest.fixture
def person(browser: Any, running: Running) -> Iterator[Person]:
    somebody = Person(browser, running.server.url)
    yield somebody
    somebody.context.close()
    hosts = {re.match(r"[a-z]+:(//[^/]*/)?", url)[0] for url in somebody.asked}  # type: ignore[index]
    assert hosts <= {running.server.url, "blob:", "data:"}
    # The browser itself reports answers such as 400; the page's own code and policy have nothing to complain of.
    assert [text for text in somebody.complaints if "Failed to load resource" not in text] == []


def test_a_picture_a_question_and_another(person: Person, running: Running) -> None:
    expect(person.page.locator("#model")).to_have_text("a <b>model</b>")
    person.drop(picture(90, 60))
    shown = person.page.locator("#picture")
    expect(shown).to_be_visible()
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 90
    answer = person.ask("slowly")
    for text in ("one", "one two", "one two three"):
        running.engine.release()
        expect(answer).to_have_text(text)
    expect(answer).to_have_attribute("data-state", "done")
    expect(person.ask("And then?")).to_have_text("1 pictures, 2 questions")
    assert "USER: slowly ASSISTANT: one two three</s>" in running.engine.queries[-1].text.replace(
        "<image>\n", ""
    )
    person.page.click("#new")
    expect(person.page.locator("#turns li")).to_have_count(0)
    expect(person.ask("Still there?")).to_have_text("1 pictures, 1 questions")
    person.drop(picture(40, 40))
    expect(person.page.locator("#turns li")).to_have_count(0)


def test_hostile_text_is_shown_and_not_run(person: Person) -> None:
    expect(person.ask("hostile")).to_have_text(HOSTILE)
    expect(person.ask(f"echo {HOSTILE}")).to_have_text(HOSTILE)
    expect(person.page.locator("#turns .asked").last).to_have_text(f"echo {HOSTILE}")
    assert person.page.locator("#turns *:not(li)").count() == 0
    assert person.page.title() == "Ask about a picture"
    # Were a script to come in all the same, the policy would not run it.
    person.page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=/x onerror=document.title=1>')"
    )
    person.page.wait_for_timeout(200)
    assert person.page.title() == "Ask about a picture"
    assert any("Content Security Policy" in text for text in person.complaints)
    person.complaints.clear()


def test_refusals_are_words_on_the_page_and_the_server_lives_on(person: Person, running: Running) -> None:
    person.drop(picture(90, 60) + bytes(100_000))
    expect(person.notice).to_contain_text("A picture's file may have 0 MiB; this one has 0.1.")
    # A page that does not look first gets the same words from the server.
    person.page.evaluate("about.upload_bytes = Infinity")
    person.drop(bytes(5_000_000))
    person.ask("What?")
    expect(person.notice).to_have_text("A picture's file may have 0 MiB.")
    expect(person.page.locator("#question")).to_have_value("What?")
    person.drop(picture(90, 60)[:-500])
    person.ask("What?")
    expect(person.notice).to_have_text("The picture is damaged, or cut off.")
    person.drop(b"<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1'/>", "x.svg")
    person.ask("What?")
    expect(person.notice).to_contain_text("not a picture that can be read: JPEG, PNG")
    person.drop(picture(90, 60))
    person.ask("fail")
    expect(person.notice).to_contain_text("The model failed")
    person.ask("x" * 1600)
    expect(person.notice).to_contain_text("at most 1,500 characters")
    running.engine.max_length = 300
    person.ask("echo " + "x" * 300)
    expect(person.notice).to_contain_text("too long for the model")
    running.engine.max_length = 2000
    for number in (1, 2, 3):
        expect(person.ask("What?")).to_have_text(f"1 pictures, {number} questions")
    person.ask("What?")
    expect(person.notice).to_contain_text("at most 3 questions")
    expect(person.page.locator("#turns .told")).to_have_count(3)


def test_a_second_person_waits_and_a_third_is_sent_away(
    person: Person, browser: Any, running: Running
) -> None:
    first = person.ask("slowly")
    until(lambda: running.engine.queries)
    others = [Person(browser, running.server.url) for _ in range(2)]
    second = others[0].ask("echo mine")
    expect(second).to_have_text("1 before you")
    others[1].ask("echo mine too")
    expect(others[1].notice).to_contain_text("1 questions are waiting already")
    running.engine.release(3)
    expect(first).to_have_text("one two three")
    expect(second).to_have_text("mine")
    for one in others:
        one.context.close()


def test_stopping_keeps_what_was_said(person: Person, running: Running) -> None:
    answer = person.ask("slowly")
    running.engine.release()
    expect(answer).to_have_text("one")
    person.page.click("#stop")
    expect(answer).to_have_attribute("data-state", "done")
    until(running.noticed)
    running.engine.release()
    until(lambda: running.engine.left == 1)
    expect(person.ask("And?")).to_have_text("0 pictures, 2 questions")
    assert "ASSISTANT: one</s>" in running.engine.queries[-1].text


def test_the_command_with_a_model(browser: Any, exported: Path) -> None:
    """An exported folder, a photo asked about twice, and Ctrl-C."""
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "tools/chat.py", "--model-path", str(exported), "--web", "--port", "0"]
    with subprocess.Popen(
        [*words, "--max-new-tokens", "24"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if " at http://127.0.0.1:" in line), "")
            assert line, "the page did not come up"
            somebody = Person(browser, line.split(" ")[2])
            somebody.drop((data / "astronaut.png").read_bytes())
            for count in (1, 2):
                answer = somebody.ask("What is it?")
                expect(answer).to_have_attribute("data-state", "done", timeout=60_000)
                assert answer.text_content().strip()
                assert somebody.page.locator("#turns .told").count() == count
            assert somebody.complaints == []
            somebody.context.close()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
