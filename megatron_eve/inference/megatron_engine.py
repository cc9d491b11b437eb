"""Answers from a checkpoint of any layout, by one rank or by several that share the model.

Rank 0 has the questions and sends each batch to the other ranks, which only take part in the computation. Files,
terminals and web pages are handled on rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.config import RunConfig
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.text.conversation import tiled_text
from megatron_eve.data.text.prompts import drawing_prompt, encode_text, prompt_from_turns, stop_ids
from megatron_eve.data.text.templates import template_of
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.drawing import Drawing, drawing_key, drawing_steps
from megatron_eve.inference.engine import (
    NO_TOWER,
    Answer,
    AnswerEnd,
    ContinuationQuery,
    DrawingQuery,
    DrawingStep,
    EngineLost,
    LogLikelihood,
    PromptError,
    Query,
    TextPieces,
    check_continuation_length,
    check_drawing_length,
    check_images,
    check_length,
    cut_at_stop,
)
from megatron_eve.inference.generate import Prompt, generation_steps
from megatron_eve.inference.log_likelihoods import (
    Pair,
    Passes,
    SharedRows,
    encode_pair,
    move_space,
    packed_log_probabilities,
    summed,
)
from megatron_eve.inference.picture_codes import PictureCodes
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.image_plan import CodeSizes
from megatron_eve.models.registry import find_family, image_planner


class _Questions(NamedTuple):
    """Work of all ranks: answers to prompts, each with its limit of new tokens and the texts that end it."""

    prompts: list[Prompt]
    limits: list[int]
    stops: list[tuple[str, ...]]
    sampling: Sampling


class _Drawings(NamedTuple):
    """Work of all ranks: codes of pictures."""

    drawings: list[Drawing]
    guidance: float
    sampling: Sampling


class MegatronEngine:
    """A `BatchDrawingEngine` over this rank's part of a model. On rank 0 use it, on the others call `follow`.

    Args:
        model: built under `generation_config`, with its weights.
        config: sizes of the model.
        tokenizer: the one that it was trained with.
        conv_mode: the template of the prompts, which says what ends an answer.
        apply_exif: turn pictures upright, as their dataset did.
        picture_codes: the tower of a model that reads pictures as codes, on rank 0; without it, it is asked about text.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        config: RunConfig,
        tokenizer: TextTokenizer,
        conv_mode: str,
        apply_exif: bool = True,
        picture_codes: PictureCodes | None = None,
    ) -> None:
        self._model, self._config, self._tokenizer, self._apply_exif = model, config, tokenizer, apply_exif
        self._picture_codes = picture_codes
        self._template = template_of(conv_mode, tokenizer)
        self._stop_ids = stop_ids(tokenizer, self._template)
        self.conv_mode = conv_mode
        self._alone = torch.distributed.get_world_size() == 1

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._config.model.max_position_embeddings

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Engine.prompt`."""
        return prompt_from_turns(turns, self._template, num_images)

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """See `Engine.prepare`."""
        text, more = self._placed(text, images)
        length = len(encode_text(text, self._tokenizer, self._template)) + more
        check_length(length, max_new_tokens, self.max_length)
        return Query(text, tuple(images), length, max_new_tokens, tuple(stop))

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """See `Engine.prepare_continuation`."""
        text, continuation = move_space(text, continuation)
        text, more = self._placed(text, images)
        query = ContinuationQuery(text, tuple(images), continuation, 0)
        query = replace(query, length=len(self._pair(query).tokens) + more)
        check_continuation_length(query.length, self.max_length)
        return query

    def _placed(self, text: str, images: Sequence[bytes]) -> tuple[str, int]:
        """A text with an `<image>` for each tile of its pictures, and how many rows these take beside the tokens."""
        check_images(text, len(images))
        if images and self._picture_codes is None and find_family(self._config.family).reads_codes:
            raise PromptError("no_tower", NO_TOWER)
        planner = image_planner(self._config)
        plans = [
            planner(*decode_image(data, apply_exif=self._apply_exif, max_pixels=DEFAULT_MAX_PIXELS).size)
            for data in images
        ]
        if any(plan.is_tiled for plan in plans):
            text = tiled_text(text, [plan.tiles for plan in plans])
        return text, sum(plan.rows - plan.tiles for plan in plans)

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """See `Engine.answers`."""
        tokens: list[list[int]] = [[] for _ in queries]
        for found in self._lead(self._questions(queries, sampling)):
            for sample, token in found:
                tokens[sample].append(token)
        return [
            Answer(tuple(some), cut_at_stop(self._text(some), query.stop).strip())
            for query, some in zip(queries, tokens, strict=True)
        ]

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """See `Engine.log_likelihoods`. Queries that differ in the last token alone share a pass."""
        if not queries:
            return []
        pairs = [self._pair(query) for query in queries]
        shared = SharedRows(pairs, [query.images for query in queries])
        prompts = [self._prompt(pairs[number].tokens[:-1], queries[number].images) for number in shared.first]
        rows, tokens, numbers = shared.places(pairs)
        (found,) = self._lead(Passes(prompts, shared.rows, rows, tokens))
        return summed(found, numbers, len(queries))

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """See `Engine.stream`."""
        pieces = TextPieces(self._text, query.stop)
        steps = self._lead(self._questions([query], sampling))
        try:
            for ((_, token),) in steps:
                if piece := pieces.add(token):
                    yield piece
        finally:
            steps.close()
        if piece := pieces.rest():
            yield piece

    def draw(
        self, text: str, count: int, guidance: float, sampling: Sampling
    ) -> Generator[DrawingStep, None, None]:
        """See `DrawingEngine.draw`."""
        sizes, tower = self._drawn_sizes()
        drawing, total = self._drawing(text), sizes.grid[0] * sizes.grid[1]
        sampling = replace(sampling, top_k=min(sampling.top_k, sizes.codebook_size))
        drawings = [replace(drawing, key=drawing_key(sampling, text, number)) for number in range(count)]
        steps = self._lead(_Drawings(drawings, guidance, sampling))
        codes: list[torch.Tensor] = []
        try:
            for step in steps:
                codes.append(step)
                if len(codes) < total:
                    yield DrawingStep(len(codes), total)
        finally:
            steps.close()
        grid = torch.stack(codes, dim=1).reshape(count, *sizes.grid, sizes.depth)
        yield DrawingStep(total, total, tower.pictures(grid))

    def prepare_drawing(self, text: str, name: str) -> DrawingQuery:
        """See `BatchDrawingEngine.prepare_drawing`."""
        self._drawing(text)
        return DrawingQuery(text, name)

    def pictures(
        self, queries: Sequence[DrawingQuery], guidance: float, sampling: Sampling
    ) -> NDArray[np.uint8]:
        """See `BatchDrawingEngine.pictures`."""
        sizes, tower = self._drawn_sizes()
        sampling = replace(sampling, top_k=min(sampling.top_k, sizes.codebook_size))
        drawings = [
            replace(self._drawing(query.text), key=drawing_key(sampling, query.name, 0)) for query in queries
        ]
        codes = list(self._lead(_Drawings(drawings, guidance, sampling)))
        grid = torch.stack(codes, dim=1).reshape(len(queries), 1, *sizes.grid, sizes.depth)
        # One at a time: in a batch a pixel may round otherwise.
        return np.concatenate([tower.pictures(one) for one in grid])

    def _drawn_sizes(self) -> tuple[CodeSizes, PictureCodes]:
        """Sizes of the codes that the model draws, and the tower that makes pictures of them."""
        sizes = find_family(self._config.family).code_sizes(self._config)
        if sizes is None:
            raise PromptError("draws_nothing", f"it is of the family {self._config.family}")
        if self._picture_codes is None:
            raise PromptError("no_tower", NO_TOWER)
        return sizes, self._picture_codes

    def _drawing(self, text: str) -> Drawing:
        """What is drawn of a text; its key is still to be set."""
        sizes, _ = self._drawn_sizes()
        try:
            tokens, unconditional = (
                encode_text(drawing_prompt(words, self._template), self._tokenizer, self._template)
                for words in (text, "")
            )
        except SkipRow:
            raise
        except ValueError as error:
            raise PromptError("draws_nothing", str(error)) from None
        check_drawing_length(len(tokens), sizes.grid[0] * sizes.grid[1], self.max_length)
        return Drawing(tokens, unconditional)

    def _text(self, tokens: list[int]) -> str:
        """Text of an answer. Padding rows of the embedding have no piece, and so no text."""
        return self._tokenizer.decode([token for token in tokens if token < self._tokenizer.vocab_size])

    def follow(self) -> None:
        """Take part in the steps of rank 0, until it calls `dismiss`."""
        while (work := _shared(None)) is not None:
            for _ in self._steps(work):
                if not _shared(None):
                    break

    def dismiss(self) -> None:
        """End `follow` on the other ranks; the last call on rank 0."""
        if not self._alone:
            _shared(None)

    def _questions(self, queries: Sequence[Query], sampling: Sampling) -> _Questions:
        """The prompts of questions, and what ends their answers."""
        prompts = [
            self._prompt(
                encode_text(query.text, self._tokenizer, self._template),
                query.images,
                sampling.key(query.text, query.images),
            )
            for query in queries
        ]
        return _Questions(
            prompts, [query.max_new_tokens for query in queries], [query.stop for query in queries], sampling
        )

    def _prompt(self, tokens: list[int], images: Sequence[bytes], key: int = 0) -> Prompt:
        """A prompt, with codes of its pictures where the model reads these."""
        tower = self._picture_codes
        return Prompt(tokens, list(images), key, tower.codes(images, self._apply_exif) if tower else [])

    def _pair(self, query: ContinuationQuery) -> Pair:
        return encode_pair(
            query.text,
            query.continuation,
            lambda text: encode_text(text, self._tokenizer, self._template),
            self._tokenizer.eos_id,
        )

    def _lead(self, work: _Questions | _Drawings | Passes) -> Generator[Any, None, None]:
        """Rank 0's steps; after each it tells the others whether there will be another."""
        if self._alone:
            yield from self._steps(work)
            return
        _shared(work)
        steps = self._steps(work)
        while (found := _next_of(steps)) is not None:
            goes_on = False
            try:
                yield found
                goes_on = True
            finally:
                _shared(goes_on)

    def _steps(self, work: _Questions | _Drawings | Passes) -> Iterator[Any]:
        """Steps that all ranks take: of questions (prompt, token) pairs, of drawings codes int64 [n, D], of
        continuations one step with float32 [n, 2].
        """
        if isinstance(work, Passes):
            return self._one_step(work)
        if isinstance(work, _Drawings):
            return drawing_steps(
                self._model, work.drawings, self._config, sampling=work.sampling, guidance=work.guidance
            )
        ends = [AnswerEnd(self._text, *one) for one in zip(work.limits, work.stops, strict=True)]
        return generation_steps(
            self._model,
            work.prompts,
            self._config,
            max_new_tokens=max(work.limits, default=0),
            ended=lambda sample, token: ends[sample].add(token),
            stop_ids=self._stop_ids,
            apply_exif=self._apply_exif,
            sampling=work.sampling,
        )

    def _one_step(self, work: Passes) -> Iterator[torch.Tensor]:
        yield packed_log_probabilities(self._model, work, self._config, self._apply_exif)


def _next_of(steps: Iterator[Any]) -> Any:
    """A step that all ranks take; if it fails on this one, the others wait in the middle of theirs."""
    try:
        return next(steps, None)
    except Exception as error:
        raise EngineLost("a step failed on rank 0, and the other ranks wait for it") from error


def _shared(value: Any) -> Any:
    """Broadcast rank 0's value to every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
