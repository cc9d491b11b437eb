"""The chat without a page: what is refused, in which words, and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_eve.inference.chat import Asked, AskedDrawing, Limits, Refused, Request, RequestQueue
from megatron_eve.inference.engine import EngineLost
from megatron_eve.inference.sampling import DRAWING
from tests.inference.scripted import HOSTILE, ScriptedDrawer, ScriptedEngine
from tests.inference.test_generate import picture

LIMITS = Limits(new_tokens=50, questions=3, characters=1500, upload_bytes=100_000, waiting=1)


class Running:
    """A request queue over a scripted engine, and the thread that answers."""

    def __init__(self) -> None:
        self.engine, self.requests = ScriptedEngine(), RequestQueue()
        self.thread = threading.Thread(target=self.requests.serve, args=(self.engine, LIMITS), daemon=True)
        self.thread.start()

    def ask(self, question: str, earlier: Any = (), *images: bytes) -> str:
        asked = Asked(question, tuple(earlier), images)
        asked.check(LIMITS)
        return "".join(self.requests.submit(asked).pieces())

    def stop(self) -> None:
        self.requests.close()
        self.engine.release(100)
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.stop()


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_questions_and_follow_ups_in_one_thread(running: Running) -> None:
    assert running.ask("What?", (), picture(40, 30)) == "1 pictures, 1 questions"
    earlier = (("What?", "A cat."), ("Where?", ""))
    assert running.ask("  Why? ", earlier, picture(40, 30)) == "1 pictures, 3 questions"
    text = running.engine.queries[-1].text
    assert text.endswith(
        "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:USER: Why? ASSISTANT:"
    )
    assert running.ask("hostile") == HOSTILE
    assert len(running.engine.threads) == 1


@pytest.mark.parametrize(
    ("question", "earlier", "images", "message"),
    [
        ("What?", [], [b"no picture"], "not a picture that can be read: JPEG, PNG"),
        ("What?", [], [b""], "file is empty"),
        ("What?", [], [picture(90, 60)[:-500]], "damaged, or cut off"),
        ("What?", [], [b"\x89PNG" + bytes(100_000)], "may have 0 MiB"),
        ("What?", [], [picture(1001, 1000)[:90_000]], "too large: 1001 x 1000 pixels"),
        (" ", [], [], "Ask something"),
        ("\ud800", [], [], "half of a character"),
        ("What is <image>?", [], [], "<image> stands for a picture"),
        ("What?", [("a", "an <image>")], [picture(40, 30)], "<image> stands for a picture"),
        ("What?", [("a", "b")] * 3, [], "at most 3 questions"),
        ("x" * 1501, [], [], "at most 1,500 characters"),
        ("x" * 1400, [("a", "b" * 99)], [picture(40, 30)], "too long for the model: 1,"),
        ("fail", [], [], "The model failed on this question"),
    ],
)
def test_what_is_refused_is_refused_in_words_and_the_next_is_answered(
    running: Running, question: str, earlier: Any, images: list[bytes], message: str
) -> None:
    if message.startswith("too long"):
        running.engine.max_length = 1600
    with pytest.raises(Refused) as error:
        running.ask(question, earlier, *images)
    assert message in str(error.value)
    assert running.ask("echo still here") == "still here"


def test_one_at_a_time_in_order(running: Running) -> None:
    requests = [running.requests.submit(Asked(text)) for text in ("slowly", "echo second", "echo third")]
    until(lambda: running.engine.queries)
    assert all(request.events.empty() for request in requests)
    running.engine.release(3)
    said = ["".join(request.pieces()) for request in requests]
    assert said == ["one two three", "second", "third"]


def test_who_goes_away_is_not_answered_further(running: Running) -> None:
    talking, waiting = (running.requests.submit(Asked(text)) for text in ("slowly", "echo never"))
    until(lambda: running.engine.queries)
    for request in (waiting, talking):
        request.cancelled.set()
    running.engine.release()
    until(lambda: running.engine.left == 1)
    assert running.ask("echo next") == "next"
    assert [query.text.count("never") for query in running.engine.queries] == [0, 0]


def failed(request: Request) -> str:
    with pytest.raises(Refused) as error:
        list(request.pieces())
    return str(error.value)


def test_an_engine_that_is_lost_ends_the_queue() -> None:
    """And those who wait are told so."""
    requests = RequestQueue()
    lost, waiting = requests.submit(Asked("lose")), requests.submit(Asked("What?"))
    with pytest.raises(EngineLost):
        requests.serve(ScriptedEngine(), LIMITS)
    assert "The model failed" in failed(lost)
    assert failed(waiting) == "The server has ended."


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (" ", {}, "Say what to draw"),
        ("x" * 1501, {}, "at most 1,500 characters"),
        ("A car.", {"count": 5}, "Between 1 and 4 pictures"),
        ("A car.", {"guidance": float("nan")}, "--cfg nan: must be 0 or more"),
        ("\ud800", {}, "half of a character"),
        ("long", {}, "too long to be drawn: 9,000 tokens"),
        ("A car.", {}, "draws no pictures"),
    ],
)
def test_what_is_not_drawn_is_said_in_words(text: str, more: dict[str, Any], message: str) -> None:
    engine = ScriptedDrawer() if text == "long" else ScriptedEngine()
    with pytest.raises(Refused) as error:
        list(AskedDrawing(text, **more).pieces(engine, LIMITS, DRAWING))
    assert message in str(error.value)
