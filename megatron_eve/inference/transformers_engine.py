"""Answers from a folder of a model that is none of ours, by transformers: LLaVA-1.5, Fuyu and others to compare with.

Any folder that AutoModelForImageTextToText and AutoProcessor load, asked with its own chat template. No code of the
folder runs, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria

from megatron_eve.config import ConfigError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.baseline_prompts import Inputs, padded, prompts_of
from megatron_eve.inference.engine import (
    Answer,
    ContinuationQuery,
    LogLikelihood,
    PromptError,
    Query,
    check_length,
    cut_at_stop,
)
from megatron_eve.inference.hf_engine import open_folder
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.runtime.accelerator import accelerator

BATCHED = ("fuyu", "llava")
"""Model types whose answers are known not to depend on the batch; of others, one prompt is answered at a time."""


class TransformersEngine:
    """An `Engine` over a model of transformers, in one process; greedy.

    Args:
        folder: of the model.
        apply_exif: turn pictures upright.

    Raises:
        ConfigError: transformers cannot open it without code of the folder, weights are missing, or it has no chat
            template.
    """

    conv_mode = "its own"

    def __init__(self, folder: Path, apply_exif: bool = True) -> None:
        processor, model = open_folder(folder)
        self._tokenizer, self._apply_exif = processor.tokenizer, apply_exif
        self._model = model.to(accelerator().device).eval()
        if model.config.model_type != "fuyu" and not _has_template(processor):
            raise ConfigError(
                f"--model-path {folder}: has no chat template; put the one of the published folder there "
                "(chat_template.jinja)"
            )
        self._prompts = prompts_of(model.config, processor)
        self._batched = model.config.model_type in BATCHED
        self._end_ids = _end_ids(model, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self._pad_id = int(pad) if pad is not None else self._end_ids[0]

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Engine.prompt`: by the model's own chat template."""
        return self._prompts.prompt(turns, num_images)

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """See `Engine.prepare`."""
        length = self._length(text, images)
        check_length(length, max_new_tokens, self.max_length)
        return Query(text, tuple(images), length, max_new_tokens, tuple(stop))

    def _length(self, text: str, images: Sequence[bytes]) -> int:
        """Tokens of a prompt, pictures expanded."""
        self._prompts.check_images(text, len(images))
        sizes = [self._picture(data).size for data in images]
        expanded = sum(self._prompts.image_tokens(*size) - 1 for size in sizes)
        return len(self._prompts.token_ids(text)) + expanded

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """See `Engine.answers`."""
        if not sampling.greedy:
            raise ConfigError("this model is asked for the most likely answer alone; leave --temperature out")
        return [answer for batch in self._batches(queries) for answer in self._answers(batch)]

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """See `Engine.stream`; the answer comes as one piece."""
        (answer,) = self.answers([query], sampling)
        if answer.text:
            yield answer.text

    def _answers(self, queries: Sequence[Query]) -> list[Answer]:
        inputs = self._batch([self._inputs(query.text, query.images) for query in queries])
        prompt = inputs["input_ids"].shape[1]
        ends = _Ends(queries, prompt, self._decode)
        with torch.inference_mode():
            sequences = self._model.generate(
                **inputs,
                max_new_tokens=max(query.max_new_tokens for query in queries),
                do_sample=False,
                num_beams=1,
                eos_token_id=self._end_ids,
                pad_token_id=self._pad_id,
                stopping_criteria=[ends],
            )
        rows = sequences[:, prompt:].tolist()
        return [self._answer(*one) for one in zip(rows, queries, ends.lengths, strict=True)]

    def _answer(self, row: list[int], query: Query, length: int | None) -> Answer:
        tokens = row[:length]
        tokens = tokens[: next((at for at, token in enumerate(tokens) if token in self._end_ids), None)]
        return Answer(tuple(tokens), cut_at_stop(self._decode(tokens), query.stop).strip())

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """See `Engine.prepare_continuation`."""
        length = self._length(text + continuation, images)
        check_length(length, 0, self.max_length)
        if self._continuation_length(text, continuation) < 1:
            raise PromptError("empty_continuation", f"a continuation of no token: {continuation!r:.80}")
        return ContinuationQuery(text, tuple(images), continuation, length)

    def _continuation_length(self, text: str, continuation: str) -> int:
        """Tokens of a continuation, found as lm-eval's models do: both encoded, the context's counted off, white space
        at its end being part of the continuation.
        """
        whole, context = (self._prompts.token_ids(one) for one in (text + continuation, text.rstrip()))
        return len(whole) - len(context)

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """See `Engine.log_likelihoods`."""
        return [one for batch in self._batches(queries) for one in self._log_likelihoods(batch)]

    def _log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        # A continuation's last token predicts nothing. Without it choices of one token share their context's row.
        rows: dict[tuple[Any, ...], int] = {}
        inputs: list[Inputs] = []
        asked: list[tuple[int, torch.Tensor]] = []
        for query in queries:
            found = self._inputs(query.text + query.continuation, query.images)
            ids = found["input_ids"][0]
            key = (*ids[:-1].tolist(), *query.images)
            if key not in rows:
                rows[key] = len(inputs)
                length = len(ids)
                inputs.append({name: _without_last(value, length) for name, value in found.items()})
            asked.append((rows[key], ids[-self._continuation_length(query.text, query.continuation) :]))
        keep = max(len(tokens) for _, tokens in asked)
        batch = self._batch(inputs)
        if len(inputs) > 1:  # the same positions as alone, whatever is in front
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = self._model(**batch, logits_to_keep=keep, use_cache=False).logits
        found_all = []
        for row, tokens in asked:
            scores = logits[row, -len(tokens) :].float().log_softmax(-1)
            chosen = scores.gather(-1, tokens.to(scores.device)[:, None])[:, 0]
            is_greedy = bool((chosen == scores.amax(-1)).all())
            found_all.append(LogLikelihood(float(chosen.double().sum()), is_greedy))
        return found_all

    def _batches(self, queries: Sequence[Any]) -> Iterator[Sequence[Any]]:
        if self._batched:
            return iter([queries] if queries else [])
        return iter([[query] for query in queries])

    def _inputs(self, text: str, images: Sequence[bytes]) -> Inputs:
        return self._prompts.inputs(text, [self._picture(data) for data in images])

    def _batch(self, inputs: Sequence[Inputs]) -> Inputs:
        """Several prompts' inputs on the device, numbers of pictures in the model's precision."""
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in padded(inputs, self._pad_id).items()
        }

    def _picture(self, data: bytes) -> Image.Image:
        picture = decode_image(data, apply_exif=self._apply_exif, max_pixels=DEFAULT_MAX_PIXELS)
        # Without the EXIF data, by which the image processor would turn it once more.
        return Image.fromarray(np.asarray(picture))

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class _Ends(StoppingCriteria):
    """Ends each answer of a batch at its own limit, or once it holds one of its stop texts.

    Attributes:
        lengths: tokens of each answer that ended so; None of one that ended by itself or goes on.
    """

    def __init__(self, queries: Sequence[Query], prompt: int, decode: Any) -> None:
        self.lengths: list[int | None] = [None] * len(queries)
        self._queries, self._prompt, self._decode = queries, prompt, decode
        # A stop text that is complete with the newest token lies within so many tokens: a character has at most four.
        self._tails = [4 * max(map(len, query.stop), default=0) + 8 for query in queries]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Called by transformers after each token: which samples [B] end here."""
        count = input_ids.shape[1] - self._prompt
        for row, query in enumerate(self._queries):
            if self.lengths[row] is not None:
                continue
            tail = input_ids[row, self._prompt :][-self._tails[row] :].tolist() if query.stop else []
            if count >= query.max_new_tokens or any(one in self._decode(tail) for one in query.stop if one):
                self.lengths[row] = count
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


def _without_last(value: torch.Tensor, length: int) -> torch.Tensor:
    """Without the last token, if it has a value for each."""
    return value[:, :-1] if value.shape == (1, length) else value


def _has_template(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, or else of the tokenizer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    ids = [one for one in (*ids, tokenizer.eos_token_id) if one is not None]
    return sorted({int(one) for one in ids})
