"""The chat's page in a real browser: what a person does, what a hostile one tries, and which hosts are asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_eve.inference.web import ChatPage, Conversation
from tests.inference.person import (  # skips without Gradio or a browser's driver
    LIMITS,
    Person,
    browser,
    expect,
    served,
)
from tests.inference.scripted import HOSTILE, ScriptedEngine
from tests.inference.test_chat import until
from tests.inference.test_generate import picture

__all__ = ["browser"]


@pytest.fixture(scope="module")
def shop() -> Iterator[tuple[ChatPage, ScriptedEngine]]:
    engine = ScriptedEngine()
    with ChatPage(LIMITS, "a <b>model</b>", port=0) as page:
        thread = threading.Thread(target=page.serve_questions, args=(engine,), daemon=True)
        thread.start()
        yield page, engine
        page.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def engine(shop: tuple[ChatPage, ScriptedEngine]) -> ScriptedEngine:
    shop[1].queries.clear()
    shop[1].samplings.clear()
    shop[1].left = 0
    return shop[1]


@pytest.fixture
def person(browser: Any, shop: tuple[ChatPage, ScriptedEngine]) -> Iterator[Person]:
    somebody = Person(browser, shop[0].url)
    yield somebody
    somebody.leave()


def test_a_picture_a_question_and_another(person: Person, engine: ScriptedEngine) -> None:
    assert person.page.title() == "Ask about a picture"
    expect(person.page.get_by_text("a <b>model</b>", exact=True)).to_be_visible()
    person.drop(picture(90, 60))
    answer = person.ask("slowly")
    shown = person.page.get_by_test_id("user").locator("img").first
    expect(shown).to_be_visible()
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 90
    for text in ("one", "one two", "one two three"):
        engine.release()
        expect(answer).to_have_text(text)
    expect(person.ask("And then?")).to_have_text("1 pictures, 2 questions")
    assert "USER: <image>\nslowly ASSISTANT: one two three</s>" in engine.queries[-1].text
    for button in ("New conversation", "Clear"):
        person.page.get_by_role("button", name=button, exact=True).click()
        expect(person.told).to_have_count(0)
        expect(person.ask("Still there?")).to_have_text("0 pictures, 1 questions")
    expect(person.page.get_by_role("button", name="Share")).to_be_hidden()


def test_a_picture_alone_is_a_question(person: Person, engine: ScriptedEngine) -> None:
    person.drop(picture(90, 60))
    expect(person.ask("")).to_have_text("1 pictures, 1 questions")
    expect(person.page.get_by_test_id("user").last).to_have_text("Describe the picture.")
    assert engine.queries[-1].text.endswith("USER: <image>\nDescribe the picture. ASSISTANT:")
    expect(person.ask("And now?")).to_have_text("1 pictures, 2 questions")
    person.wait()
    with person.page.expect_request("**/queue/join*"):
        person.box.press("Enter")  # nothing to ask
    expect(person.ask("And then?")).to_have_text("1 pictures, 3 questions")
    expect(person.page.get_by_test_id("user")).to_have_count(4)  # the picture is one of them


def test_a_question_is_asked_again_with_other_random_numbers(person: Person, engine: ScriptedEngine) -> None:
    again = person.page.get_by_role("button", name="Ask again")
    expect(again).to_be_disabled()
    expect(person.ask("echo one")).to_have_text("one")
    expect(person.ask("echo two")).to_have_text("two")
    assert engine.samplings[-1].greedy
    person.page.get_by_role("button", name="Sampling").click()
    person.set_number("Temperature", "0.7")
    person.set_number("Top-p", "0.9")
    for _ in range(2):
        asked = len(engine.queries)
        expect(again).to_be_enabled()
        again.click()
        until(lambda asked=asked: len(engine.queries) == asked + 1)
        expect(again).to_be_enabled()
        expect(person.told).to_have_text(["one", "two"])
        assert engine.queries[-1].text == engine.queries[1].text
    first, second = engine.samplings[-2:]
    assert (first.temperature, first.top_p) == (0.7, 0.9) and second == replace(first, seed=first.seed + 1)
    expect(person.ask("fail")).to_contain_text("The model failed")
    again.click()
    expect(person.told.nth(2)).to_contain_text("The model failed")
    expect(person.told).to_have_count(3)
    person.page.get_by_role("button", name="New conversation").click()
    expect(again).to_be_disabled()


def test_a_question_that_comes_before_the_model_waits_for_it(
    browser: Any, shop: tuple[ChatPage, ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gradio reads it at each upload; a second page in this process must not leave its own to the first.
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])
    engine = ScriptedEngine()
    with ChatPage(LIMITS, "model", port=0) as page:
        somebody = Person(browser, page.url)
        answer = somebody.ask("echo here")
        expect(answer).to_have_text("The model is being loaded; the answer comes then.")
        thread = threading.Thread(target=page.serve_questions, args=(engine,), daemon=True)
        thread.start()
        expect(answer).to_have_text("here")
        somebody.leave()
        page.stop()
        thread.join(timeout=30)


def test_a_slider_takes_no_other_value_by_hand(shop: tuple[ChatPage, ScriptedEngine]) -> None:
    """A browser may send what it likes."""
    page, request = shop[0], SimpleNamespace(session_hash="somebody else")
    *_, (_, messages, _, _) = page._answer({"text": "Hi", "files": []}, Conversation(), -1.0, 1.0, request)
    assert messages[-1]["content"]["text"].startswith("--temperature -1.0: must lie between 0")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(browser: Any, shop: tuple[ChatPage, ScriptedEngine], width: int) -> None:
    """Nothing has to be scrolled to sideways, and the box is in sight."""
    somebody = Person(browser, shop[0].url)
    somebody.page.set_viewport_size({"width": width, "height": 800})
    expect(somebody.ask("echo " + "word " * 100)).to_contain_text("word word")
    assert somebody.page.evaluate("document.documentElement.scrollWidth") <= width
    expect(somebody.box).to_be_in_viewport()
    somebody.leave()


def test_hostile_text_is_shown_and_not_run(person: Person, engine: ScriptedEngine) -> None:
    expect(person.ask("hostile")).to_have_text(HOSTILE)
    expect(person.ask(f"echo {HOSTILE}")).to_have_text(HOSTILE)
    expect(person.page.get_by_test_id("user").last).to_have_text(f"echo {HOSTILE}")
    assert person.page.locator(".message-content").locator("img, script, a, strong").count() == 0
    assert person.page.title() == "Ask about a picture"


def test_refusals_are_words_on_the_page_and_the_server_lives_on(
    person: Person, engine: ScriptedEngine
) -> None:
    big = {"name": "big.png", "mimeType": "image/png", "buffer": picture(90, 60) + bytes(100_000)}
    person.page.set_input_files("input[type=file]", big)
    expect(person.page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    for content, message in (
        (picture(90, 60)[:-500], "The picture is damaged, or cut off."),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1'/>",
            "not a picture that can be read",
        ),
    ):
        person.drop(content)
        expect(person.ask("What?")).to_contain_text(message)
    for question, message in (
        ("fail", "The model failed"),
        ("x" * 1600, "at most 1,500 characters"),
        ("What is <image>?", "<image> stands for a picture"),
    ):
        expect(person.ask(question)).to_contain_text(message)
        expect(person.box).to_have_value(question)
    person.drop(picture(90, 60))
    for number in (1, 2, 3):
        expect(person.ask("What?")).to_have_text(f"1 pictures, {number} questions")
    expect(person.ask("What?")).to_contain_text("at most 3 questions")
    assert person.page.title() == "Ask about a picture"


def test_a_second_person_waits_and_a_third_is_sent_away(
    person: Person, browser: Any, shop: tuple[ChatPage, ScriptedEngine], engine: ScriptedEngine
) -> None:
    others = [Person(browser, shop[0].url) for _ in range(2)]
    first = person.ask("slowly")
    until(lambda: engine.queries)
    second = others[0].ask("echo mine")
    expect(others[0].page.get_by_text("queue: 1/1").first).to_be_visible()
    others[1].ask("echo mine too")
    expect(others[1].page.get_by_text("This application is currently busy").first).to_be_visible()
    engine.release(3)
    expect(first).to_have_text("one two three")
    expect(second).to_have_text("mine")
    for one in others:
        one.leave()


def test_a_model_that_does_not_draw_says_nothing_of_it(person: Person) -> None:
    expect(person.page.get_by_role("button", name="Ask again")).to_be_visible()
    expect(person.page.get_by_role("button", name="Draw")).to_have_count(
        0
    )  # nor "Drawing", of which it is a part


def test_stopping_keeps_what_was_said(person: Person, engine: ScriptedEngine) -> None:
    answer = person.ask("slowly")
    engine.release()
    expect(answer).to_have_text("one")
    person.page.locator(".stop-button").click()
    expect(person.box).to_be_enabled()
    # Gradio's page takes no other question before its server has said that this one is over.
    with person.page.expect_response("**/gradio_api/reset"):
        until(lambda: engine.release() or engine.left == 1)
    expect(person.ask("And?")).to_have_text("0 pictures, 2 questions")
    assert "ASSISTANT: one" in engine.queries[-1].text


def test_a_stopped_question_takes_nothing_from_the_next(
    shop: tuple[ChatPage, ScriptedEngine], engine: ScriptedEngine
) -> None:
    """Gradio closes the generator of a question that was stopped when it likes."""
    page, request = shop[0], SimpleNamespace(session_hash="somebody")

    def ask(question: str) -> Any:
        asking = page._answer({"text": question, "files": []}, Conversation(), 0.0, 1.0, request)
        next(asking)
        return asking

    stopped = ask("slowly")
    engine.release()
    next(stopped)
    page._stop(Conversation(), request)
    engine.release()
    until(lambda: engine.left == 1)
    following = ask("echo mine")
    next(following)
    pending = page._pending["somebody"]
    stopped.close()
    assert not pending.cancelled.is_set() and page._pending["somebody"] is pending
    following.close()
    assert pending.cancelled.is_set() and "somebody" not in page._pending


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 200),
        ("/config", {"Host": "localhost:9000"}, 200),
        ("/", {"Host": "rebound.example:7860"}, 400),
        ("/gradio_api/file=/etc/passwd", {}, 403),
        ("/docs", {}, 404),
        ("/openapi.json", {}, 404),
    ],
)
def test_whom_the_server_answers(
    shop: tuple[ChatPage, ScriptedEngine], path: str, headers: dict[str, str], status: int
) -> None:
    address = urlsplit(shop[0].url)
    assert address.hostname == "127.0.0.1"
    connection = HTTPConnection("127.0.0.1", address.port or 0, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    assert response.status == status
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]


@pytest.mark.slow
def test_the_command_with_a_model(browser: Any, exported: Path) -> None:
    """An exported folder, a photo asked about twice, and Ctrl-C."""
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    with served("--model-path", str(exported), "--max-new-tokens", "24") as (name, url):
        assert name == exported.name
        somebody = Person(browser, url)
        expect(
            somebody.page.get_by_text("EVE v1, on this machine; nothing is sent elsewhere.")
        ).to_be_visible()
        somebody.drop((data / "astronaut.png").read_bytes())
        for count in (1, 2):
            answer = somebody.ask("What is it?")
            expect(somebody.box).to_be_enabled(timeout=60_000)
            assert answer.text_content().strip() and somebody.told.count() == count
        somebody.leave()
