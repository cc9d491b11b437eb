"""The chat as a web page for one machine: the standard library's server on the loopback address, and three files.

Gradio would be the usual choice. Its 6.31 wants an older Pillow than the one that decodes pictures here, and the newest
release that pip finds beside that one, 3.18, loads fonts and a script from other hosts. This page asks nothing of any
other host, which its content security policy makes the browser enforce, and shows every text as text.

The server keeps no conversation: a question brings along what came before it.
"""

from __future__ import annotations

import base64
import binascii
import json
import queue
import select
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from megatron_eve.inference.chat import Asked, Desk, Limits, Refused
from megatron_eve.inference.engine import Engine

HOST = "127.0.0.1"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOOK_SECONDS = 0.25  # how soon it is noticed that somebody went away
_DRAIN_SECONDS = 1.0  # how long the next bytes of it may take
_POLL_SECONDS = 0.1  # how soon the server's thread notices its end
_DRAINED = 128 << 20  # bytes of a refused body that are read, so that the browser reads the refusal


class ChatServer(ThreadingHTTPServer):
    """Takes questions on the loopback address and hands them to a desk.

    Args:
        limits: what one who asks may take.
        name: of the model, for the page.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, limits: Limits, name: str, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.desk, self.limits, self.name = Desk(limits), limits, name
        self.about = {"model": name, "upload_bytes": limits.upload_bytes, "characters": limits.characters}
        # A picture in base64, and a conversation of characters that take up to six bytes each in JSON.
        self.body_bytes = limits.upload_bytes * 4 // 3 + limits.characters * 6 + 65_536

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def serve_questions(self, engine: Engine) -> None:
        """Serve the page from threads, and answer in this one, until `stop` or an interrupt."""
        pages = threading.Thread(target=self.serve_forever, args=(_POLL_SECONDS,), name="pages", daemon=True)
        pages.start()
        try:
            self.desk.serve(engine)
        finally:
            self.shutdown()

    def stop(self) -> None:
        """Have `serve_questions` return after the question that it is answering."""
        self.desk.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who went away is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, so that the end of an answer is the end of its connection."""

    server: ChatServer
    timeout = 60  # seconds that a client may stand still

    def do_GET(self) -> None:
        """The page, its script and style, and what it needs to know."""
        if not self._is_ours():
            return
        if self.path == "/about":
            self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.about).encode())
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            content = resources.files("megatron_eve.inference").joinpath("page", name).read_bytes()
            self._send(HTTPStatus.OK, f"{kind}; charset=utf-8", content)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def do_POST(self) -> None:
        """A question: answered by a line of JSON for each event, as they come."""
        if not self._is_ours():
            return
        if self.path != "/ask" or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > self.server.body_bytes:
            self._drain(size)
            limit = f"{self.server.limits.upload_bytes / (1 << 20):.0f} MiB"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A picture's file may have {limit}.")
            return
        body = b""
        try:
            with self.server.desk.place():
                body = self.rfile.read(int(size))
                asked = _asked(body)
                asked.check(self.server.limits)
                self._answer(asked)
        except Refused as error:
            if not body:
                self._drain(size)
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _answer(self, asked: Asked) -> None:
        self._head(HTTPStatus.OK, "application/x-ndjson")
        ticket = self.server.desk.submit(asked)
        event: tuple[str, str | int] = ("waiting", 0)
        try:
            while event[0] not in ("done", "error") and not self._is_gone():
                try:
                    event = ticket.events.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    continue
                self.wfile.write(json.dumps(dict([event])).encode() + b"\n")
        finally:
            ticket.left.set()

    def _is_gone(self) -> bool:
        """Whether the client has closed its end, which writing to it would only show the next time."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _is_ours(self) -> bool:
        """Whether this machine's own page asks: another site may know the port, and any name may mean this host."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if urlsplit(f"//{host}").hostname in (HOST, "localhost") and origin in (None, f"http://{host}"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "This page is for this machine alone.")
        return False

    def _drain(self, size: str) -> None:
        left = min(int(size), _DRAINED) if size.isdecimal() else 0
        self.connection.settimeout(_DRAIN_SECONDS)
        try:
            while left > 0 and (some := self.rfile.read1(min(left, 1 << 16))):
                left -= len(some)
        except OSError:
            pass  # all that was sent

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self._head(status, kind, len(content))
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        """What is asked is nobody's business; errors are printed where they arise."""


def _asked(body: bytes) -> Asked:
    """A question from the page: `{"question": text, "earlier": [[question, answer], ...], "image": base64 or null}`.

    Raises:
        Refused: anything else.
    """
    try:
        row = json.loads(body)
        question, image = row["question"], row["image"]
        earlier = tuple((asked, told) for asked, told in row["earlier"])
        images = () if image is None else (base64.b64decode(image, validate=True),)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise Refused("This is not a question of the page.") from error
    if not all(isinstance(text, str) for text in (question, *(text for turn in earlier for text in turn))):
        raise Refused("This is not a question of the page.")
    return Asked(question, earlier, images)
