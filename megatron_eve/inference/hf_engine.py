"""Answers from a folder that tools/convert_checkpoint.py export --format transformers wrote, by transformers itself.

The classes are those of `megatron_eve.hf`: no code of the folder runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import megatron_eve.hf  # noqa: F401  (registers the classes)
from megatron_eve.accelerator import accelerator
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.tokenizer import Tokenizer
from megatron_eve.inference.engine import Answer, Query, TextPieces, check_length


class HFEngine:
    """An `Engine` over transformers, in one process.

    Args:
        folder: the exported folder.
        conv_mode: the template of the prompts; a caption after "plain" ends with its newline, since stages 1 and 2
            train no end-of-sequence token.
        apply_exif: turn pictures upright, as the model's dataset did.

    Raises:
        OSError, DataError: the folder lacks a file.
        ValueError: a file of it cannot be used.
    """

    def __init__(self, folder: Path, conv_mode: str, apply_exif: bool = True) -> None:
        local = {"trust_remote_code": False, "local_files_only": True}
        self._processor: Any = AutoProcessor.from_pretrained(folder, **local)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **local)
        self._model = model.to(accelerator().device).eval()
        # The `tokenizers` library loses a whole run of bytes where one of them belongs to no character.
        self._tokenizer, self._apply_exif = Tokenizer(folder / "tokenizer.model"), apply_exif
        self._stop_ids = [self._tokenizer.eos_id]
        if conv_mode == "plain":
            self._stop_ids.append(self._tokenizer.encode("\n")[-1])

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._model.config.max_position_embeddings)

    def prepare(self, text: str, images: Sequence[bytes], max_new_tokens: int) -> Query:
        """See `Engine.prepare`."""
        length = len(self._processor.tokenizer(text)["input_ids"])
        for data in images:
            rows, columns = self._processor.image_processor.grid(*self._picture(data).size)
            length += rows * (columns + 1)  # and the CLS, in the place of the placeholder
        check_length(length, max_new_tokens, self.max_length)
        return Query(text, tuple(images), length)

    def answers(self, queries: Sequence[Query], max_new_tokens: int) -> list[Answer]:
        """See `Engine.answers`."""
        inputs = self._inputs(queries)
        found = self._generate(inputs, max_new_tokens)[:, inputs["input_ids"].shape[1] :]
        return [self._answer(row) for row in found.tolist()]

    def stream(self, query: Query, max_new_tokens: int) -> Generator[str, None, None]:
        """See `Engine.stream`. transformers generates in a thread of its own, which has ended when this does."""
        tokens = _Tokens()
        inputs, pieces = self._inputs([query]), TextPieces(self._tokenizer.decode)
        thread = threading.Thread(target=tokens.run, args=(self._generate, inputs, max_new_tokens))
        thread.start()
        try:
            for token in tokens:
                if token not in self._stop_ids and (piece := pieces.add(token)):
                    yield piece
        finally:
            tokens.left.set()
            thread.join()
        if piece := pieces.rest():
            yield piece

    def _generate(self, inputs: Any, max_new_tokens: int, **more: Any) -> torch.Tensor:
        """Token ids [B, prompt and answer]; an answer that ends before the others is filled up behind its end."""
        found: torch.Tensor = self._model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self._stop_ids, **more
        )
        return found

    def _inputs(self, queries: Sequence[Query]) -> Any:
        pictures = [[self._picture(data) for data in query.images] for query in queries]
        inputs = self._processor(
            text=[query.text for query in queries],
            images=pictures if any(pictures) else None,
            padding=True,
            return_tensors="pt",
        )
        return inputs.to(self._model.device)

    def _picture(self, data: bytes) -> Image.Image:
        picture = decode_image(data, apply_exif=self._apply_exif, max_pixels=DEFAULT_MAX_PIXELS)
        # Without the EXIF data, by which the image processor would turn it once more.
        return Image.fromarray(np.asarray(picture))

    def _answer(self, row: list[int]) -> Answer:
        end = next((at for at, token in enumerate(row) if token in self._stop_ids), len(row))
        return Answer(tuple(row[:end]), self._tokenizer.decode(row[:end]).strip())


class _Tokens(BaseStreamer, StoppingCriteria):
    """New tokens as they come, from another thread; ends the generation once `left` is set."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self._events: queue.Queue[int | Exception | None] = queue.Queue()
        self._prompt_came = False

    def run(self, generate: Any, inputs: Any, max_new_tokens: int) -> None:
        """Generate; an error goes to the one who listens."""
        try:
            generate(inputs, max_new_tokens, streamer=self, stopping_criteria=[self])
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
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)

    def __iter__(self) -> Generator[int, None, None]:
        while (event := self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
