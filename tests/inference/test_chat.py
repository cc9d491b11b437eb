"""The chat without a browser: its limits, its queue, and whom the server answers."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from megatron_eve.inference.chat import Asked, Desk, Limits, Refused
from megatron_eve.inference.engine import EngineLost
from megatron_eve.inference.web import ChatServer
from tests.inference.scripted import HOSTILE, ScriptedEngine
from tests.inference.test_generate import picture

LIMITS = Limits(new_tokens=50, questions=3, characters=1500, upload_bytes=100_000, waiting=1)


class Running:
    """A server over a scripted engine, and the thread that answers."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.engine, self.server = ScriptedEngine(), ChatServer(limits, "a <b>model</b>", port=0)
        self.thread = threading.Thread(target=self.server.serve_questions, args=(self.engine,), daemon=True)
        self.thread.start()

    def connect(self, method: str, path: str, body: bytes | None = None, **headers: str) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.server.server_address[1], timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        return connection

    def ask(self, question: object, earlier: object = (), image: bytes | str | None = None) -> HTTPConnection:
        if isinstance(image, bytes):
            image = base64.b64encode(image).decode()
        body = json.dumps({"question": question, "earlier": earlier, "image": image})
        return self.connect("POST", "/ask", body.encode())

    def noticed(self, count: int = 1) -> bool:
        """Whether the server knows that so many of those who ask have gone."""
        return [ticket.left.is_set() for ticket in self.server.desk._tickets].count(True) == count

    def stop(self) -> None:
        self.server.stop()
        self.engine.release(100)
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        self.server.server_close()


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    yield server
    server.stop()


def told(connection: HTTPConnection) -> str:
    """The answer, or "error: ..."."""
    response = connection.getresponse()
    lines = [json.loads(line) for line in response.read().splitlines()]
    if "error" in lines[-1]:
        return "error: " + lines[-1]["error"]
    assert response.status == 200 and list(lines[-1]) == ["done"]
    return "".join(line.get("text", "") for line in lines)


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_questions_and_follow_ups_in_one_thread(running: Running) -> None:
    assert told(running.ask("What?", image=picture(40, 30))) == "1 pictures, 1 questions"
    earlier = [["What?", "A cat."], ["Where?", ""]]
    assert told(running.ask("  Why? ", earlier, picture(40, 30))) == "1 pictures, 3 questions"
    text = running.engine.queries[-1].text
    assert text.endswith(
        "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:USER: Why? ASSISTANT:"
    )
    assert told(running.ask("hostile")) == HOSTILE
    assert len(running.engine.threads) == 1


@pytest.mark.parametrize(
    ("question", "earlier", "image", "message"),
    [
        ("What?", [], b"no picture", "not a picture that can be read: JPEG, PNG"),
        ("What?", [], b"", "file is empty"),
        ("What?", [], picture(90, 60)[:-500], "damaged, or cut off"),
        ("What?", [], b"\x89PNG" + bytes(100_000), "may have 0 MiB"),
        ("What?", [], "no base64", "not a question of the page"),
        (" ", [], None, "Ask something"),
        (5, [], None, "not a question of the page"),
        ("What?", [["one"]], None, "not a question of the page"),
        ("What?", [["a", 1]], None, "not a question of the page"),
        ("\ud800", [], None, "half of a character"),
        ("What is <image>?", [], None, "<image> stands for a picture"),
        ("What?", [["a", "an <image>"]], picture(40, 30), "<image> stands for a picture"),
        ("What?", [["a", "b"]] * 3, None, "at most 3 questions"),
        ("x" * 1501, [], None, "at most 1,500 characters"),
        ("x" * 1400, [["a", "b" * 99]], picture(40, 30), "too long for the model: 1,"),
        ("fail", [], None, "The model failed on this question"),
    ],
)
def test_what_is_refused_is_refused_in_words_and_the_next_is_answered(
    running: Running, question: object, earlier: object, image: Any, message: str
) -> None:
    if message.startswith("too long"):
        running.engine.max_length = 1600
    found = told(running.ask(question, earlier, image))
    assert found.startswith("error: ") and message in found
    assert told(running.ask("echo still here")) == "still here"


def test_a_picture_of_too_many_pixels(running: Running) -> None:
    found = told(running.ask("What?", image=picture(1001, 1000)[:90_000]))
    assert "too large: 1001 x 1000 pixels" in found


def test_one_at_a_time_and_a_queue_of_one(running: Running) -> None:
    first = running.ask("slowly").getresponse()
    until(lambda: running.engine.queries)
    second = running.ask("echo second").getresponse()
    assert json.loads(second.readline()) == {"waiting": 1}
    assert "1 questions are waiting already" in told(running.ask("echo third"))
    running.engine.release(3)
    events = [json.loads(line) for line in first.read().splitlines()]
    assert [event["text"] for event in events if "text" in event] == ["one", " two", " three"]
    events = [json.loads(line) for line in second.read().splitlines()]
    assert events == [{"waiting": 0}, {"text": "second"}, {"done": ""}]
    assert told(running.ask("echo third")) == "third"


def test_who_goes_away_is_not_answered_further(running: Running) -> None:
    talking = running.ask("slowly")
    response = talking.getresponse()
    until(lambda: running.engine.queries)
    waiting = running.ask("echo never").getresponse()
    for one in (waiting, response):
        one.close()
    talking.close()
    until(lambda: running.noticed(2))
    running.engine.release()
    until(lambda: running.engine.left == 1)
    assert told(running.ask("echo next")) == "next"
    assert [query.text.count("never") for query in running.engine.queries] == [0, 0]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/about", {"Host": "localhost:9000"}, 200),
        ("GET", "/", {"Host": "rebound.example:7860"}, 403),
        ("GET", "/../web.py", {}, 404),
        ("POST", "/ask", {"Origin": "http://elsewhere.example"}, 403),
        ("POST", "/ask", {"Origin": "null"}, 403),
        ("POST", "/ask", {"Content-Type": "text/plain"}, 404),
        ("POST", "/ask", {"Content-Length": "9000000"}, 413),
        ("POST", "/ask", {"Content-Length": "-5"}, 413),
        ("POST", "/ask", {}, 400),
        ("PUT", "/ask", {}, 501),
    ],
)
def test_whom_the_server_answers(
    running: Running, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = running.connect(method, path, b"{}" if method == "POST" else None, **headers).getresponse()
    assert response.status == status
    if status != 501:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert running.server.server_address[0] == "127.0.0.1"


def test_an_engine_that_is_lost_ends_the_desk() -> None:
    desk = Desk(LIMITS)
    ticket = desk.submit(Asked("lose"))
    with pytest.raises(EngineLost):
        desk.serve(ScriptedEngine())
    assert [ticket.events.get()[0] for _ in range(2)] == ["waiting", "error"]


def test_refusals_need_no_engine() -> None:
    with pytest.raises(Refused, match="at most 3 questions"):
        Asked("What?", (("a", "b"),) * 3).check(LIMITS)
    Asked("What?", (("a", "b"),) * 2).check(LIMITS)
