"""The chat's page of a model that draws, in a real browser."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_eve.inference.sampling import DRAWING
from megatron_eve.inference.web import ChatPage
from tests.inference.person import (  # skips without Gradio or a browser's driver
    LIMITS,
    Person,
    browser,
    expect,
)
from tests.inference.scripted import ScriptedDrawer
from tests.inference.test_chat import until
from tests.inference.test_generate import picture

__all__ = ["browser"]


@pytest.fixture(scope="module")
def studio() -> Iterator[tuple[ChatPage, ScriptedDrawer]]:
    """The page of a model that draws."""
    engine = ScriptedDrawer()
    with pytest.MonkeyPatch.context() as patch:
        # Gradio reads it at each upload; a second page in this process must not leave its own to the first.
        patch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", ""))
        with ChatPage(LIMITS, "unified", port=0, guidance=3.0) as page:
            thread = threading.Thread(target=page.serve_questions, args=(engine,), daemon=True)
            thread.start()
            yield page, engine
            page.stop()
            thread.join(timeout=30)
            assert not thread.is_alive()


def sizes(images: Any) -> list[int]:
    """Widths in pixels of pictures that the page has loaded."""
    found: list[int] = images.evaluate_all(
        "images => Promise.all(images.map(image => image.decode().then(() => image.naturalWidth)))"
    )
    return found


def test_pictures_are_drawn_into_the_conversation(
    browser: Any, studio: tuple[ChatPage, ScriptedDrawer]
) -> None:
    page, engine = studio
    somebody = Person(browser, page.url)
    draw = somebody.page.get_by_role("button", name="Draw", exact=True)
    pictures = somebody.told.locator("img")

    def drawn(text: str) -> Any:
        somebody.wait()
        somebody.box.fill(text)
        draw.click()
        return somebody.told

    told = drawn("slowly")
    for share in ("33 %", "66 %"):
        engine.release()
        expect(told).to_have_text(f"Drawing: {share}")
    engine.release()
    expect(pictures).to_have_count(1)
    assert sizes(pictures) == [48]
    expect(somebody.page.get_by_test_id("user").last).to_have_text("Draw: slowly")
    text, count, guidance, sampling = engine.drawn[-1]
    assert (text, count, guidance, sampling) == ("slowly", 1, 3.0, DRAWING)
    expect(somebody.ask("Hm?")).to_have_text(
        "0 pictures, 1 questions"
    )  # a drawing is no part of what is asked

    somebody.page.get_by_role("button", name="Drawing").click()
    for name, value in (("Guidance", "1.5"), ("Pictures", "3")):
        field = somebody.page.get_by_label(f"number input for {name}")
        field.fill(value)
        field.press("Tab")
    drawn("A <b>red</b> car.")
    expect(pictures).to_have_count(4)
    expect(somebody.page.get_by_test_id("user").last).to_have_text("Draw: A <b>red</b> car.")
    assert engine.drawn[-1][:3] == ("A <b>red</b> car.", 3, 1.5)
    again = somebody.page.get_by_role("button", name="Ask again")
    expect(again).to_be_enabled()
    again.click()
    until(lambda: len(engine.drawn) == 3)
    expect(again).to_be_enabled()
    expect(pictures).to_have_count(4)
    assert engine.drawn[2][:3] == engine.drawn[1][:3] and engine.drawn[2][3].seed > engine.drawn[1][3].seed
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        somebody.page.screenshot(path=f"{folder}/draw.png")
        somebody.page.set_viewport_size({"width": 390, "height": 800})
        somebody.page.screenshot(path=f"{folder}/draw_phone.png")
    for width in (1280, 390):
        somebody.page.set_viewport_size({"width": width, "height": 800})
        assert somebody.page.evaluate("document.documentElement.scrollWidth") <= width
    somebody.leave()


def test_what_is_not_drawn_is_said_and_a_drawing_can_be_stopped(
    browser: Any, studio: tuple[ChatPage, ScriptedDrawer]
) -> None:
    page, engine = studio
    somebody = Person(browser, page.url)
    draw = somebody.page.get_by_role("button", name="Draw", exact=True)
    for text, message in (
        ("long", "too long to be drawn"),
        ("fail", "The model failed"),
        ("x" * 1501, "at most"),
    ):
        somebody.wait()
        somebody.box.fill(text)
        draw.click()
        expect(somebody.told.last).to_contain_text(message)
        expect(somebody.box).to_have_value(text)
    somebody.drop(picture(90, 60))
    draw.click()
    expect(somebody.told.last).to_contain_text("remove the picture from the box")
    left = engine.left
    somebody.wait()
    somebody.box.fill("slowly")
    draw.click()
    engine.release()
    expect(somebody.told.last).to_have_text("Drawing: 33 %")
    somebody.page.locator(".stop-button").click()
    expect(somebody.box).to_be_enabled()
    with somebody.page.expect_response("**/gradio_api/reset"):
        until(lambda: engine.release() or engine.left > left)
    expect(somebody.ask("echo next")).to_have_text("next")
    expect(somebody.page.get_by_text("Not drawn to the end.")).to_be_visible()
    somebody.leave()
