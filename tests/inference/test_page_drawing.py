"""The chat's page of a model that draws, in a real browser."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.inference.sampling import DRAWING
from megatron_eve.inference.web import ChatPage
from tests.inference.person import (  # skips without Gradio or a browser's driver
    LIMITS,
    Person,
    browser,
    expect,
    served,
)
from tests.inference.scripted import ScriptedDrawer
from tests.inference.test_chat import until
from tests.inference.test_generate import picture
from tests.inference.vila_u_model import write_model
from tests.ranks import RankPool

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
    somebody.set_number("Guidance", "1.5")
    somebody.set_number("Pictures", "3")
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
    somebody.wait()
    tops = "images => new Set(images.slice(1).map(image => image.getBoundingClientRect().y)).size"
    until(lambda: pictures.evaluate_all(tops) == 1)  # those of one text stand beside each other
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


@pytest.mark.slow
def test_the_command_with_a_model_that_draws(
    browser: Any, ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question about a picture, and two pictures of a text."""
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    model = write_model(tmp_path, ranks)
    with served(*model.flags, "--max-new-tokens", "8") as (_, url):
        somebody = Person(browser, url)
        somebody.drop(picture(90, 60))
        somebody.ask("What is it?")
        expect(somebody.box).to_be_enabled(timeout=60_000)
        expect(somebody.page.get_by_text("Not answered")).to_have_count(0)
        somebody.page.get_by_role("button", name="Drawing").click()
        somebody.set_number("Pictures", "2")
        somebody.wait()
        somebody.box.fill("A red car.")
        somebody.page.get_by_role("button", name="Draw", exact=True).click()
        pictures = somebody.told.locator("img")
        expect(pictures).to_have_count(2)
        assert sizes(pictures) == [32, 32]
        somebody.leave()
