"""A server that grades answers as a test says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tests.inference.openai_server import Served

NAME = "org/judge-7b"


class JudgeServed(Served):
    """Its replies come from a function of the last message's text and of the temperature.

    Args:
        say: text of a reply, or the probabilities of its first token.
    """

    def __init__(self, say: Callable[[str, float], str | Mapping[str, float]]) -> None:
        super().__init__(None)
        self.models: list[dict[str, Any]] = [{"id": NAME}]
        self.say = say

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        assert path == "/v1/chat/completions"
        if body["model"] not in [one["id"] for one in self.models]:
            return 404, {"error": {"message": "no such model"}}
        said = self.say(text_of(body), body["temperature"])
        if isinstance(said, str):
            return 200, {"choices": [{"message": {"role": "assistant", "content": said}}]}
        assert body["logprobs"] is True and body["top_logprobs"] >= len(said)
        top = [{"token": token, "logprob": math.log(share)} for token, share in said.items()]
        first = {"token": max(said, key=said.__getitem__), "top_logprobs": top}
        space = {"token": "\n", "top_logprobs": [{"token": "no", "logprob": 0.0}]}
        message = {"role": "assistant", "content": f"\n{first['token']}"}
        return 200, {"choices": [{"message": message, "logprobs": {"content": [space, first]}}]}


def text_of(body: Mapping[str, Any]) -> str:
    """The text of the last message of a request."""
    content = body["messages"][-1]["content"]
    return (
        content
        if isinstance(content, str)
        else next(part["text"] for part in content if part["type"] == "text")
    )
