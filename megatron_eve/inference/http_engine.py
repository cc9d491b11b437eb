"""Answers from a server with OpenAI's interface, such as vLLM or SGLang: any model that one serves.

Prompts are messages, to which the server applies the model's chat template (`/chat/completions`), or text without a
template (`/completions`). Pictures go along as data URLs. Greedy: temperature 0.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.images.decode import read_header
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.chat_messages import messages_of
from megatron_eve.inference.engine import (
    OWN_TEMPLATE,
    Answer,
    ContinuationQuery,
    LogLikelihood,
    PromptError,
    Query,
    cut_at_stop,
)
from megatron_eve.inference.http_client import HTTPClient, ServerError, TooLong, listed_model
from megatron_eve.inference.sampling import GREEDY, Sampling

UNKNOWN_LENGTH = 2**31 - 1
"""`HTTPEngine.max_length` where the server does not say."""
IN_FLIGHT = 64
"""Requests that a server has at once, at most; a batch has fewer."""
MOST_STOPS = 4
"""OpenAI's interface takes no more; the others are applied here."""
# In front of a prompt that is messages, as JSON; no text of a task begins so.
_MESSAGES = "chat messages: "
_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png"}

One = TypeVar("One")
Other = TypeVar("Other")


class HTTPEngine:
    """An `Engine` over a server that is already running.

    Args:
        base_url: the server's address, with /v1 at its end.
        model: the name that the server gives its model.
        apply_exif: turn pictures upright before they are sent.
        client: asks the server.

    Raises:
        ServerError: it cannot be reached, or serves no such model.
    """

    conv_mode = OWN_TEMPLATE

    def __init__(
        self, base_url: str, model: str, apply_exif: bool = True, client: HTTPClient | None = None
    ) -> None:
        self._client = client or HTTPClient(base_url)
        self.model, self._apply_exif = model, apply_exif
        self.max_length = self._look_up_model()
        self._gives_log_likelihoods = False
        self._count_tokens = lru_cache(maxsize=4096)(self._prompt_tokens)

    def _look_up_model(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        length = listed_model(self._client, self.model).get("max_model_len")
        return length if isinstance(length, int) and length > 0 else UNKNOWN_LENGTH

    def check_server(self) -> None:
        """Raise ServerError if the server cannot be reached any more, or does not serve the model any more."""
        listed_model(self._client, self.model)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Engine.prompt`: the messages as JSON."""
        return _MESSAGES + json.dumps(messages_of(turns, num_images), ensure_ascii=False)

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """See `Engine.prepare`. Only the server can count tokens: `length` is 0, and a prompt that turns out too long
        gets an answer with a `problem`.
        """
        if images and not text.startswith(_MESSAGES):
            raise PromptError(
                "image_in_raw_text", "a server takes pictures in messages alone, not in raw text"
            )
        for data in images:
            decode_image(data, apply_exif=False, max_pixels=DEFAULT_MAX_PIXELS)
        return Query(text, tuple(images), 0, max_new_tokens, tuple(stop))

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """See `Engine.answers`; all requests of a batch are with the server at once."""
        if not sampling.greedy:
            raise ConfigError(
                "--base-url: a server is asked for the most likely answer alone; leave --temperature out"
            )
        return at_once(self._answer, queries)

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """See `Engine.stream`; the answer comes as one piece."""
        (answer,) = self.answers([query], sampling)
        if answer.text:
            yield answer.text

    def _answer(self, query: Query) -> Answer:
        body: dict[str, Any] = {"model": self.model, "max_tokens": query.max_new_tokens, "temperature": 0}
        if query.stop:
            body["stop"] = list(query.stop[:MOST_STOPS])
        try:
            if query.text.startswith(_MESSAGES):
                body["messages"] = self._with_pictures(query)
                reply = self._client.post("/chat/completions", body)
                text = self._client.first_choice(reply, "message", "content")
            else:
                text = self._client.first_choice(
                    self._client.post("/completions", body | {"prompt": query.text}), "text"
                )
        except TooLong as error:
            return Answer((), "", problem=f"prompt_too_long: {error}")
        return Answer((), cut_at_stop(text or "", query.stop).strip())

    def _with_pictures(self, query: Query) -> list[dict[str, Any]]:
        """The messages of a prompt, with its pictures at their places."""
        messages: list[dict[str, Any]] = json.loads(query.text.removeprefix(_MESSAGES))
        images = iter(query.images)
        for message in messages:
            parts = message["content"]
            if all(part["type"] == "text" for part in parts):  # some servers take parts only from the user
                message["content"] = "".join(part["text"] for part in parts)
                continue
            message["content"] = [
                part
                if part["type"] == "text"
                else {"type": "image_url", "image_url": {"url": data_url(next(images), self._apply_exif)}}
                for part in parts
            ]
        return messages

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """See `Engine.prepare_continuation`.

        Raises:
            ServerError: the server gives no log-likelihoods of a prompt; asked once, with the first.
        """
        if images or text.startswith(_MESSAGES):
            raise ConfigError(
                "--base-url: OpenAI's interface gives no log-likelihoods of messages; take tasks that generate, or raw "
                "text without the chat template"
            )
        if not self._gives_log_likelihoods:
            self._check_log_likelihoods()
        return ContinuationQuery(text, (), continuation, 0)

    def _check_log_likelihoods(self) -> None:
        remedy = (
            "so log-likelihoods cannot be had from it; take tasks that generate, or a server whose /completions knows "
            "echo and logprobs (vLLM)"
        )
        try:
            found = self._scored("Hello world")
        except (ServerError, TooLong) as error:
            raise ServerError(f"{error}; {remedy}") from error
        if len(found) < 2:
            raise ServerError(f"{self._client.place}: gives no logprobs of a prompt, {remedy}")
        self._gives_log_likelihoods = True

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """See `Engine.log_likelihoods`."""
        return at_once(self._log_likelihood, queries)

    def _log_likelihood(self, query: ContinuationQuery) -> LogLikelihood:
        # As lm-eval's models: white space at the context's end belongs to the continuation, and the context's tokens
        # are counted off from those of both.
        context = query.text.rstrip()
        try:
            tokens = self._scored(query.text + query.continuation)
            before = self._count_tokens(context) if context else 0
        except TooLong as error:
            return LogLikelihood(float("-inf"), False, problem=f"prompt_too_long: {error}")
        # The first token of all has none, unless it is an end-of-text token that the server put in front.
        scored = [one for one in tokens[before:] if one is not None]
        return LogLikelihood(sum(value for value, _ in scored), all(greedy for _, greedy in scored))

    def _prompt_tokens(self, text: str) -> int:
        return len(self._scored(text))

    def _scored(self, text: str) -> list[tuple[float, bool] | None]:
        """Of each token of a text: its log probability, and whether it is the most likely; None of the first."""
        # One new token, since some servers refuse none; it comes last.
        asked = {
            "model": self.model,
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        reply = self._client.post("/completions", asked)
        found = self._client.first_choice(reply, "logprobs")
        if not found:
            return []
        values, tops = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        used = reply.get("usage") or {}
        count = used.get("prompt_tokens") or len(values) - 1
        if len(values) <= count - 1 or len(tops) < len(values):
            return []
        return [
            None if value is None else (float(value), not top or float(value) >= max(top.values()))
            for value, top in zip(values[:count], tops[:count], strict=True)
        ]


def data_url(data: bytes, apply_exif: bool = True) -> str:
    """A picture as a data URL: JPEG and PNG as they are, unless a server might decode them otherwise than is done here;
    others as PNG.
    """
    header = read_header(data, DEFAULT_MAX_PIXELS)
    kind = _AS_THEY_ARE.get(header.format)
    if kind is None or not header.plain or header.orientation != 1:
        kind, data = "png", _png(decode_image(data, apply_exif=apply_exif, max_pixels=DEFAULT_MAX_PIXELS))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def at_once(ask: Callable[[One], Other], queries: Sequence[One]) -> list[Other]:
    """Ask for all queries from threads; replies in order. The first error ends it."""
    if not queries:
        return []
    with ThreadPoolExecutor(min(len(queries), IN_FLIGHT)) as pool:
        futures = [pool.submit(ask, query) for query in queries]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
