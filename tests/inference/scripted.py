"""An engine without a model, for tests of what stands around one."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import numpy as np

from megatron_eve.data.images import ImageError, decode_image
from megatron_eve.data.text.prompts import prompt_from_turns
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import (
    Answer,
    ContinuationQuery,
    DrawingStep,
    EngineLost,
    LogLikelihood,
    PromptError,
    Query,
    check_length,
)
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

    def _wait(self) -> None:
        # Longer than several pages take to open on a busy machine; a test that fails releases nothing.
        assert self._go.acquire(timeout=120)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """By the template of `conv_mode`."""
        return prompt_from_turns(turns, self.conv_mode, num_images)

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """Decode the pictures; a token is a character."""
        for data in images:
            if decode_image(data, apply_exif=True, max_pixels=1_000_000).size == (1, 1):
                raise ImageError("image_damaged", "a pixel")
        check_length(len(text), max_new_tokens, self.max_length)
        if "unspeakable" in text:
            raise PromptError("prompt_too_long", "by a word")
        return Query(text, tuple(images), len(text), max_new_tokens, tuple(stop))

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """All of it at once."""
        return [Answer((), "".join(self.stream(query))) for query in queries]

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """A token is a character."""
        return ContinuationQuery(text, tuple(images), continuation, len(text) + len(continuation))

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """A character is as likely as another; the first query's continuation is the most likely one."""
        return [LogLikelihood(-float(len(one.continuation)), not n) for n, one in enumerate(queries)]

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
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
                    self._wait()
                yield f" {word}" if number else word
        except GeneratorExit:
            self.left += 1
            raise


class ScriptedDrawer(ScriptedEngine):
    """Draws, too: pictures of one colour, by the seed and their numbers.

    "slowly" waits before each of the three steps until `release` was called once more; "fail" raises, and so does
    "long", in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, int, float, Sampling]] = []

    def draw(
        self, text: str, count: int, guidance: float, sampling: Sampling
    ) -> Generator[DrawingStep, None, None]:
        """In three steps."""
        if text == "long":
            raise PromptError("drawing_too_long", "9,000 tokens")
        self.drawn.append((text, count, guidance, sampling))
        if text == "fail":
            raise RuntimeError("out of memory")
        try:
            for step in range(1, 4):
                if text == "slowly":
                    self._wait()
                pictures = np.full((count, 48, 48, 3), 40 * sampling.seed % 256, dtype=np.uint8)
                pictures[..., 0] = 60 * np.arange(count)[:, None, None]
                yield DrawingStep(step, 3, pictures if step == 3 else None)
        except GeneratorExit:
            self.left += 1
            raise
