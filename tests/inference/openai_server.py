"""A small server with OpenAI's interface over an engine of a tiny model, on loopback, that can also fail on demand."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import PromptError
from megatron_eve.inference.transformers_engine import TransformersEngine

_TURNS = {"system": "system", "user": "human", "assistant": "gpt"}
Failure = tuple[int, dict[str, str], str]
"""Status, headers and body of a response in place of an answer."""


class Served:
    """What the server does, and what it was asked.

    Attributes:
        failures: given, one each, to the next requests but those for the list of models.
        asked: path and body of each request.
        keys: `Authorization` of each request.
        delay: seconds that the answer to the prompt of a text takes, by a word in it.
        most_at_once: requests that were answered at the same time.
    """

    def __init__(self, engine: TransformersEngine | None) -> None:
        if engine is not None:
            self.engine, self.models = engine, [{"id": "tiny", "max_model_len": engine.max_length}]
        self.failures: list[Failure] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.echoes, self.lists_models = True, True
        self.delay: dict[str, float] = {}
        self.most_at_once = self._now = 0
        self._lock, self._engine_lock = threading.Lock(), threading.Lock()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(
                max((seconds for word, seconds in self.delay.items() if word in str(body)), default=0.0)
            )
            if body["model"] not in [one["id"] for one in self.models]:
                message = f"The model `{body['model']}` does not exist."
                return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
            with self._engine_lock:
                return self._chat(body) if path.endswith("/chat/completions") else self._complete(body)
        finally:
            with self._lock:
                self._now -= 1

    def _chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        turns, images = [], []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = ""
            for part in parts:
                if part["type"] == "text":
                    text += part["text"]
                else:
                    url = part["image_url"]["url"]
                    assert url.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
                    images.append(base64.b64decode(url.partition(",")[2]))
                    text += "<image>\n"
            turns.append(Turn(_TURNS[message["role"]], text))
        return self._generate(self.engine.prompt(turns, len(images)), images, body, chat=True)

    def _generate(self, text: str, images: list[bytes], body: dict[str, Any], chat: bool) -> tuple[int, Any]:
        try:
            query = self.engine.prepare(text, images, body["max_tokens"], body.get("stop", ()))
        except PromptError:
            message = f"This model's maximum context length is {self.engine.max_length} tokens. However, you requested"
            return 400, {"error": {"message": f"{message} more.", "type": "BadRequestError"}}
        (answer,) = self.engine.answers([query])
        text = f" {answer.text}"
        return 200, {
            "choices": [{"message": {"role": "assistant", "content": text}} if chat else {"text": text}]
        }

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not body.get("echo"):
            return self._generate(body["prompt"], [], body, chat=False)
        if not self.echoes:
            return 200, {"choices": [{"text": body["prompt"], "logprobs": None}]}
        ids = self.engine._prompt_ids(body["prompt"])
        logits = self.engine._model(
            **self.engine._inputs([self.engine.prepare(body["prompt"], (), 1)])
        ).logits[0]
        scores = logits.float().log_softmax(-1).tolist()
        new = max(range(len(scores[-1])), key=scores[-1].__getitem__)
        values: list[float | None] = [None]
        tops: list[dict[str, float] | None] = [None]
        for before, token in zip(scores, [*ids[1:], new], strict=True):
            best = max(range(len(before)), key=before.__getitem__)
            values.append(before[token])
            tops.append({f"token {best}": before[best], f"token {token}": before[token]})
        logprobs = {
            "token_logprobs": values,
            "top_logprobs": tops,
            "tokens": [str(one) for one in (*ids, new)],
        }
        return 200, {
            "choices": [{"text": body["prompt"], "logprobs": logprobs}],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 1},
        }


@contextmanager
def serving(engine: TransformersEngine | Served) -> Iterator[tuple[str, Served]]:
    """Address, with /v1, and state of a server that runs meanwhile, of an engine or of another kind."""
    served = engine if isinstance(engine, Served) else Served(engine)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            served.keys.append(self.headers.get("Authorization"))
            if self.path == "/v1/models" and served.lists_models:
                self._send(200, json.dumps({"object": "list", "data": served.models}))
            else:
                self._send(404, json.dumps({"detail": "Not Found"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.keys.append(self.headers.get("Authorization"))
            served.asked.append((self.path, body))
            if served.failures:
                status, headers, text = served.failures.pop(0)
                if status == 0:
                    self.connection.close()
                    self.close_connection = True
                    return
                self._send(status, text, headers)
            elif self.path not in ("/v1/chat/completions", "/v1/completions"):
                self._send(404, json.dumps({"detail": "Not Found"}))
            else:
                status, reply = served.reply(self.path, body)
                self._send(status, json.dumps(reply))

        def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
            data = text.encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            if not isinstance(
                sys.exc_info()[1], (OSError, ValueError)
            ):  # of a connection that was closed on purpose
                super().handle_error(request, address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
