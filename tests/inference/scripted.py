"""An engine without a model, for tests of what stands around one."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

from megatron_eve.data.images import ImageError, decode_image
from megatron_eve.inference.engine import Answer, EngineLost, PromptError, Query, check_length
from megatron_eve.inference.sampling import GREEDY, Sampling

HOSTILE = (
    "<img src=x onerror=\"document.title='run'\"> **bold** [a](javascript:alert(1)) <script>alert(1)</script>"
)


class ScriptedEngine:
    """Says what the last question wants to hear.

    "echo ..." says the rest; "hostile" what a page must not run; "slowly" three words, each when `release` was called
    once more; "fail" and "lose" raise; anything else counts pictures and questions.
    """

    max_length, conv_mode = 2000, "vicuna_v1"

    def __init__(self) -> None:
        self.queries: list[Query] = []
        self.samplings: list[Sampling] = []
        self.threads: set[int] = set()
        self.left = 0
        self._go = threading.Semaphore(0)

    def release(self, count: int = 1) -> None:
        """Let so many words of "slowly" come."""
        self._go.release(count)

    def prepare(self, text: str, images: Sequence[bytes], max_new_tokens: int) -> Query:
        """Decode the pictures; a token is a character."""
        for data in images:
            if decode_image(data, apply_exif=True, max_pixels=1_000_000).size == (1, 1):
                raise ImageError("image_damaged", "a pixel")
        check_length(len(text), max_new_tokens, self.max_length)
        if "unspeakable" in text:
            raise PromptError("prompt_too_long", "by a word")
        return Query(text, tuple(images), len(text))

    def answers(
        self, queries: Sequence[Query], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[Answer]:
        """All of it at once."""
        return [Answer((), "".join(self.stream(query, max_new_tokens))) for query in queries]

    def stream(
        self, query: Query, max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Generator[str, None, None]:
        """A piece a word."""
        self.queries.append(query)
        self.samplings.append(sampling)
        self.threads.add(threading.get_ident())
        question = query.text.rpartition("USER: ")[2].removesuffix(" ASSISTANT:").removeprefix("<image>\n")
        kind, _, rest = question.partition(" ")
        if kind == "fail":
            raise RuntimeError("out of memory")
        if kind == "lose":
            raise EngineLost("a rank is lost")
        said = f"{len(query.images)} pictures, {query.text.count('USER: ')} questions"
        words = {"echo": rest, "hostile": HOSTILE, "slowly": "one two three"}.get(kind, said).split(" ")
        try:
            for number, word in enumerate(words):
                if kind == "slowly":
                    assert self._go.acquire(timeout=30)
                yield f" {word}" if number else word
        except GeneratorExit:
            self.left += 1
            raise
