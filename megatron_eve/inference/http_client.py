"""Requests to a server with OpenAI's interface: retries, time limits, and one sentence for what goes wrong."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_eve.runtime.errors import UserError

API_KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
"""A server answers once it has the whole answer, and a busy one keeps requests waiting before that."""
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
# Statuses after which the same request may succeed: time-out, conflict, too many, a server that starts or fails.
_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)
# How servers say that a request is too long: OpenAI, vLLM, SGLang, llama.cpp.
_TOO_LONG = re.compile(
    r"context.{0,40}(?:length|size|window)|maximum model length|max_model_len", re.I | re.S
)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerError(UserError):
    """The server cannot be reached, or refuses what it is asked. The message names it and says what to do."""


class TooLong(Exception):
    """The server found one request longer than its model takes; the message is the server's."""


def check_base_url(base_url: str, flag: str = "--base-url") -> str:
    """The address, given by a flag, without a slash at its end.

    Raises:
        ServerError: not an http(s) address, or one that holds a password, which would get into answers files.
    """
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in base_url):
        raise ServerError(f"{flag} {base_url}: not an address such as http://HOST:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ServerError(
            f"{flag}: an address with a user, a password, ? or # is kept in answers files; leave these out, and "
            f"put the key into the environment variable {API_KEY_VARIABLE}"
        )
    return base_url.rstrip("/")


class HTTPClient:
    """Asks one server. Calls may come from several threads at once.

    Args:
        base_url: up to and with the version: http://HOST:8000/v1.
        first_wait: seconds before the second try; doubles with each further one.
        flag, model_flag: by which the user names the address and the model, for messages.

    Attributes:
        place: the flag and the address, with which messages begin.

    Raises:
        ServerError: not a usable address.
    """

    def __init__(
        self,
        base_url: str,
        first_wait: float = _FIRST_WAIT_SECONDS,
        flag: str = "--base-url",
        model_flag: str = "--model",
    ) -> None:
        self.base_url = check_base_url(base_url, flag)
        self.place, self._model_flag = f"{flag} {self.base_url}", model_flag
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        self._first_wait = first_wait
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            self._client = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None),
                trust_env=urlsplit(self.base_url).hostname
                not in _LOOPBACK,  # no proxy reaches this host's own ports
                follow_redirects=False,  # the key goes to no other server
            )
        except (UnicodeError, ValueError) as error:
            raise ServerError(
                f"environment variable {API_KEY_VARIABLE}: holds characters that no key has; set it anew"
            ) from error

    def get(self, path: str) -> Any:
        """JSON that the server has at a path below the address; None if it has nothing there (404)."""
        response = self._send("GET", path, None)
        return None if response.status_code == 404 else self._json(response, path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's JSON answer to a request.

        Raises:
            ServerError: no answer after `TRIES` tries, or the request was refused.
            TooLong: the request is longer than the model takes.
        """
        response = self._send("POST", path, body)
        if response.status_code == 404:
            raise ServerError(
                f"{self.place}: has no {path} (status 404: {self._reason(response)}); the address mostly "
                f"ends in /v1, and {self._model_flag} is the name that the server gives its model"
            )
        return self._json(response, path)

    def served_models(self) -> dict[str, Any] | None:
        """What the server says of its models, by name; None if it does not list them."""
        listed = self.get("/models")
        served = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(served, list):
            return None
        return {str(one.get("id")): one for one in served if isinstance(one, dict)}

    def no_such_model(self, model: str, served: Mapping[str, Any]) -> ServerError:
        """The error for a model that is none of those that the server lists."""
        names = ", ".join(sorted(served)) or "none"
        return ServerError(
            f"{self._model_flag} {model}: {self.base_url} serves no such model, but {names}; name one of these"
        )

    def first_choice(self, reply: Any, *path: str) -> Any:
        """A field of the first choice of a reply.

        Raises:
            ServerError: there is none.
        """
        try:
            found = reply["choices"][0]
            for name in path:
                found = found[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.place}: its reply has no choices[0].{'.'.join(path)}; is it a server with OpenAI's interface?"
            ) from error
        return found

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """A response that is not worth another try."""
        wait = self._first_wait
        for attempt in range(1, TRIES + 1):
            try:
                response = self._client.request(method, f"{self.base_url}{path}", json=body)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem, asked = f"{type(error).__name__}: {str(error)[:200] or 'no reason given'}", 0.0
                if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
                    raise ServerError(f"{self.place}: {problem}; correct the address") from error
            else:
                if response.status_code not in _TRANSIENT:
                    return response
                problem = f"status {response.status_code}: {self._reason(response)}"
                asked = _seconds(response.headers.get("retry-after"))
            if attempt < TRIES:
                time.sleep(min(max(wait, asked), _LONGEST_WAIT_SECONDS))
                wait *= 2
        raise ServerError(
            f"{self.place}: no answer after {TRIES} tries ({problem}); when the server runs, repeat the "
            "command, which asks only what has no answer yet"
        )

    def _json(self, response: httpx.Response, path: str) -> Any:
        status = response.status_code
        if status in (400, 413, 422) and _TOO_LONG.search(response.text):
            raise TooLong(self._reason(response))
        if status in (401, 403):
            raise ServerError(
                f"{self.place}: refuses the key (status {status}); put the right one into the "
                f"environment variable {API_KEY_VARIABLE}"
            )
        if not response.is_success:
            raise ServerError(
                f"{self.place}: refuses {path} (status {status}: {self._reason(response)}); check the "
                "server's options and the address"
            )
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(
                f"{self.place}: {path} does not answer with JSON; is it a server with OpenAI's interface?"
            ) from error

    def _reason(self, response: httpx.Response) -> str:
        """What the server says of an error, on one line, without the key."""
        try:
            found = response.json()
            while isinstance(found, dict) and (inner := found.get("error") or found.get("message")):
                found = inner
            text = found if isinstance(found, str) else response.text
        except ValueError:
            text = response.text
        if self._key:
            text = text.replace(self._key, "...")
        return " ".join(text.split())[:300] or "no reason given"


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; 0 where it has a date or nothing."""
    return float(header) if header is not None and header.strip().isdigit() else 0.0


def listed_model(client: HTTPClient, model: str) -> dict[str, Any]:
    """What a server says of a model in its list of models; nothing where it lists none.

    Raises:
        ServerError: it cannot be reached, or serves no such model.
    """
    models = client.served_models()
    if models is None:
        return {}  # a server need not list its models; a wrong name is then found by the first request
    if model not in models:
        raise client.no_such_model(model, models)
    return models[model]
