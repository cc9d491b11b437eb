"""Answers from a folder that tools/convert_checkpoint.py export --format transformers wrote, by transformers itself.

A folder that transformers saved again works too (`save_pretrained` of model and processor). The classes are those of
`megatron_eve.hf`: no code of the folder runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

import megatron_eve.hf  # noqa: F401 - registers the models
from megatron_eve.config import ConfigError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.text.prompts import prompt_from_turns, stop_tokens
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import (
    Answer,
    ContinuationQuery,
    LogLikelihood,
    Query,
    TextPieces,
    check_continuation_length,
    check_images,
    check_length,
    cut_at_stop,
)
from megatron_eve.inference.export_template import template_of_export, unmarked
from megatron_eve.inference.hf_generation import AnswerEnds, Chooser, TokenStream
from megatron_eve.inference.log_likelihoods import (
    Pair,
    SharedRows,
    encode_pair,
    move_space,
    summed,
    token_log_probabilities,
)
from megatron_eve.inference.piece_text import Decoder, PieceText
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.models.registry import loaded_families
from megatron_eve.runtime.accelerator import accelerator

_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")  # 0 is text
_PROBE = "two  words,\n猫 🙂"


class HFEngine:
    """An `Engine` over transformers, in one process.

    Args:
        folder: the exported folder.
        conv_mode: the template of the prompts, which says what ends an answer.
        apply_exif: turn pictures upright, as the model's dataset did.

    Raises:
        ConfigError: a file is missing or cannot be used, or the files are not those of one model.
    """

    def __init__(self, folder: Path, conv_mode: str, apply_exif: bool = True) -> None:
        self._processor, model = open_folder(folder, _check_type, _check_tokenizer)
        self._model = model.to(accelerator().device).eval()
        # LLaVA looks `<image>` up like any token, so its export adds a row for it, the last one of the logits, though
        # no text holds it. Where a model has more rows than its tokenizer tokens, it is one of those, which all count.
        self._image_row: int | None = self._processor.image_token_id
        self._text: Decoder = PieceText(self._processor.tokenizer)
        self._apply_exif = apply_exif
        self.conv_mode, self._template = conv_mode, template_of_export(folder, conv_mode)
        eos_id = self._processor.tokenizer.eos_token_id
        self._stop_ids = sorted({eos_id, *stop_tokens(self._ids, self._template)})

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, without BOS."""
        token_ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Engine.prompt`."""
        return prompt_from_turns(turns, self._template, num_images)

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """See `Engine.prepare`."""
        text = self._unmarked(text)
        length = self._more_tokens(text, images) + len(self._prompt_ids(text))
        check_length(length, max_new_tokens, self.max_length)
        return Query(text, tuple(images), length, max_new_tokens, tuple(stop))

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """See `Engine.prepare_continuation`."""
        text = self._unmarked(text)
        more = self._more_tokens(text, images)
        text, continuation = move_space(text, continuation)
        query = ContinuationQuery(text, tuple(images), continuation, 0)
        query = replace(query, length=len(self._pair(query).tokens) + more)
        check_continuation_length(query.length, self.max_length)
        return query

    def _unmarked(self, text: str) -> str:
        """A prompt's text as the processor takes it; raises PromptError, see `unmarked`."""
        return unmarked(text, self._template, self._processor.tokenizer)

    def _prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt's text, `<image>` as one, BOS in front where the model has one."""
        token_ids: list[int] = self._processor.tokenizer(text)["input_ids"]
        return token_ids

    def _pair(self, query: ContinuationQuery) -> Pair:
        eos_id = self._processor.tokenizer.eos_token_id
        return encode_pair(query.text, query.continuation, self._prompt_ids, eos_id)

    def _more_tokens(self, text: str, images: Sequence[bytes]) -> int:
        """Tokens that the pictures take beside their `<image>`."""
        check_images(text, len(images))
        return sum(self._image_tokens(*self._picture(data).size) - 1 for data in images)

    def _image_tokens(self, width: int, height: int) -> int:
        """Tokens that the `<image>` of a picture of this size, in pixels, becomes."""
        counted: int | None
        if (own := getattr(self._processor, "num_image_tokens", None)) is not None:
            counted = own(width, height)
        else:  # as transformers counts for its own processors
            (counted,) = self._processor._get_num_multimodal_tokens([(height, width)]).num_image_tokens
        return int(counted)

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """See `Engine.answers`."""
        if not queries:
            return []
        inputs = self._inputs(queries)
        chooser = Chooser(sampling, queries, inputs)
        ends = AnswerEnds(queries, self._text, self._stop_ids)
        longest = max(query.max_new_tokens for query in queries)
        generated = self._generate(inputs, longest, chooser, stopping_criteria=[ends])
        rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            Answer(tuple(row[:count]), cut_at_stop(self._text.decode(row[:count]), query.stop).strip())
            for query, row, count in zip(queries, rows, ends.counts, strict=True)
        ]

    @torch.no_grad()
    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """See `Engine.log_likelihoods`. Queries that differ in the last token alone share a row."""
        if not queries:
            return []
        pairs = [self._pair(query) for query in queries]
        shared = SharedRows(pairs, [query.images for query in queries])
        inputs = self._continued(
            self._inputs([queries[number] for number in shared.first]),
            [pairs[number].continuation[:-1] for number in shared.first],
        )
        kept = max(shared.rows)
        logits = self._model(**inputs, logits_to_keep=kept, use_cache=False).logits
        if self._image_row == logits.shape[-1] - 1:
            logits[..., -1] = -torch.inf
        needed = torch.cat([row[len(row) - count :] for row, count in zip(logits, shared.rows, strict=True)])
        rows, tokens, numbers = shared.places(pairs)
        return summed(token_log_probabilities(needed, rows, tokens), numbers, len(queries))

    def _continued(self, inputs: Any, continuations: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The inputs of contexts with more tokens behind them, all padded on the left; an empty context is EOS."""
        real = inputs["attention_mask"].cpu().bool()
        eos = [self._processor.tokenizer.eos_token_id]
        added = [
            [*(() if some.any() else eos), *more] for some, more in zip(real, continuations, strict=True)
        ]
        behind = {
            "input_ids": added,
            "attention_mask": [[1] * len(more) for more in added],
            **{name: [[0] * len(more) for more in added] for name in _KINDS_OF_TOKENS if name in inputs},
        }
        found = dict(inputs)
        for name, values in behind.items():
            rows = [
                torch.tensor([*row[some].tolist(), *more], dtype=torch.int64)
                for row, some, more in zip(inputs[name].cpu(), real, values, strict=True)
            ]
            found[name] = pad_sequence(rows, True, padding_side="left").to(self._model.device)
        mask = found["attention_mask"]
        if not mask.all():  # otherwise the model's own, which may have several axes
            found["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return found

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """See `Engine.stream`. transformers generates in a thread of its own, which has ended when this does."""
        ends = AnswerEnds([query], self._text, self._stop_ids)
        tokens = TokenStream(ends)
        inputs, pieces = self._inputs([query]), TextPieces(self._text.decode, query.stop)
        chooser = Chooser(sampling, [query], inputs)
        thread = threading.Thread(
            target=tokens.run, args=(self._generate, inputs, query.max_new_tokens, chooser)
        )
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

    def _generate(self, inputs: Any, max_new_tokens: int, chooser: Chooser, **more: Any) -> torch.Tensor:
        """Token ids [B, prompt and answer]; shorter answers are padded at the end."""
        sequences: torch.Tensor = self._model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # the chooser leaves one token
            eos_token_id=self._stop_ids,
            logits_processor=chooser.processors,
            **more,
        )
        return sequences

    def _inputs(self, queries: Sequence[Query | ContinuationQuery]) -> Any:
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


def open_folder(
    folder: Path,
    check_type: Callable[[Path, Any], None] | None = None,
    check_tokenizer: Callable[[Path, Any, Any], None] | None = None,
) -> tuple[Any, Any]:
    """The processor and the model of a folder; no code of it runs, and nothing is downloaded.

    Args:
        folder: that transformers loads.
        check_type: gets folder and config, before a model of its sizes is built.
        check_tokenizer: gets folder, config and processor.

    Raises:
        ConfigError: transformers cannot open it, its parts are not those of one model, or weights are missing, which
            transformers would draw at random.
    """
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config: Any = AutoConfig.from_pretrained(folder, **local)
        if check_type is not None:
            check_type(folder, config)
        processor: Any = AutoProcessor.from_pretrained(folder, **local)
        if check_tokenizer is not None:
            check_tokenizer(folder, config, processor)
        opened: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **local
        )
        model, loading = opened
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # transformers, tokenizers and safetensors raise nearly anything on a damaged file
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"--model-path {folder}: transformers cannot open it ({type(error).__name__}: {reason[:200]}); copy or "
            "export the folder again"
        ) from error
    if loading["missing_keys"]:
        raise ConfigError(
            f"--model-path {folder}: {len(loading['missing_keys'])} weights are missing, such as "
            f"{min(loading['missing_keys'])}; copy or export the folder again"
        )
    return processor, model


def _check_type(folder: Path, config: Any) -> None:
    formats = [family.hugging_face() for family in loaded_families()]
    if not any(config.model_type in one.model_types for one in formats):
        raise ConfigError(
            f"--model-path {folder}: holds a model of type {config.model_type!r}, none of those that are known here "
            f"({', '.join(one.title for one in formats)}); name the folder of one"
        )


def _check_tokenizer(folder: Path, config: Any, processor: Any) -> None:
    """Raise ConfigError for a tokenizer of another model, by the id of `<image>` and the tokens of a text."""
    image = config.image_token_index
    if image is None:
        image = config.vocab_size
    ids = processor.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if processor.image_token_id != image or PieceText(processor.tokenizer).decode(ids) != _PROBE:
        raise ConfigError(
            f"--model-path {folder}: its tokenizer.json is not the one that this model was exported with; save the "
            "processor of the exported folder there (AutoProcessor.from_pretrained(...).save_pretrained(...))"
        )
