"""How transformers' `generate` chooses tokens, ends answers and passes them on, for `hf_engine.py`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Generator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from megatron_eve.inference.engine import AnswerEnd, Query
from megatron_eve.inference.piece_text import Decoder
from megatron_eve.inference.sampling import Sampling, next_tokens


class Chooser(LogitsProcessor):
    """Has transformers choose tokens as `MegatronEngine` does, with random numbers of each prompt's own."""

    def __init__(self, sampling: Sampling, queries: Sequence[Query], inputs: Any) -> None:
        self._sampling = sampling
        self._keys = [sampling.key(query.text, query.images) for query in queries]
        self._prompt = inputs["input_ids"].shape[1]

    @property
    def processors(self) -> list[LogitsProcessor]:
        """For `generate`: none where the most likely token is taken, which it does by itself."""
        return [] if self._sampling.greedy else [self]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by transformers for each token, scores [B, W]; in what is returned, all but the chosen are -inf."""
        step = input_ids.shape[1] - self._prompt
        chosen = next_tokens(scores.float(), self._sampling, self._keys, step)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class AnswerEnds(StoppingCriteria):
    """Ends each answer of a batch by its own limit and stop texts.

    Attributes:
        counts: of each answer's tokens, without the one that ended it.
    """

    def __init__(self, queries: Sequence[Query], text: Decoder, stop_ids: Collection[int]) -> None:
        self._ends = [AnswerEnd(text.decode, query.max_new_tokens, query.stop) for query in queries]
        self._stop_ids, self._ended = stop_ids, [False] * len(queries)
        self.counts = [0] * len(queries)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Called by transformers after each token: which samples [B] end here."""
        for sample, token in enumerate(input_ids[:, -1].tolist()):
            if self._ended[sample]:
                continue
            if token in self._stop_ids:
                self._ended[sample] = True
            else:
                self.counts[sample] += 1
                self._ended[sample] = self._ends[sample].add(token)
        return torch.tensor(self._ended, device=input_ids.device)


class TokenStream(BaseStreamer, StoppingCriteria):
    """New tokens as they come, from another thread; ends the generation once `left` is set."""

    def __init__(self, ends: AnswerEnds) -> None:
        self._ends = ends
        self.left = threading.Event()
        self._events: queue.Queue[int | Exception | None] = queue.Queue()
        self._prompt_came = False

    def run(self, generate: Any, inputs: Any, max_new_tokens: int, chooser: Chooser) -> None:
        """Generate; an error is passed to the reader of the stream."""
        try:
            generate(inputs, max_new_tokens, chooser, streamer=self, stopping_criteria=[self])
        except Exception as error:
            self._events.put(error)

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers: first with the prompt, then with each token."""
        if self._prompt_came:
            self._events.put(int(value))
        self._prompt_came = True

    def end(self) -> None:
        """Called by transformers after the last token."""
        self._events.put(None)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Called by transformers after each token: which samples [B] end here."""
        return self._ends(input_ids, scores) | self.left.is_set()

    def __iter__(self) -> Generator[int, None, None]:
        while (event := self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
