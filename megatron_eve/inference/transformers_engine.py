"""Answers from a folder of a model that is none of ours, by transformers: LLaVA-1.5, Fuyu and others to compare with.

Any folder that AutoModelForImageTextToText and AutoProcessor load, asked with its own chat template. No code of the
folder runs, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.config import ConfigError
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.baseline_prompts import padded, prompts_of
from megatron_eve.inference.engine import OWN_TEMPLATE, Answer, ContinuationQuery, LogLikelihood, Query
from megatron_eve.inference.hf_engine import HFEngine, open_folder
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.runtime.accelerator import accelerator

BATCHED = ("fuyu", "llava")
"""Model types whose answers are known not to depend on the batch; of others, one prompt is answered at a time."""


class TransformersEngine(HFEngine):
    """An `HFEngine` over any model of transformers, whose prompts its own processor makes.

    Args:
        folder: of the model.
        apply_exif: turn pictures upright.

    Raises:
        ConfigError: transformers cannot open it without code of the folder, weights are missing, or it has no chat
            template.
    """

    def __init__(self, folder: Path, apply_exif: bool = True) -> None:
        self._processor, model = open_folder(folder)
        self._model, self._apply_exif = model.to(accelerator().device).eval(), apply_exif
        if model.config.model_type != "fuyu" and not _has_template(self._processor):
            raise ConfigError(
                f"--model-path {folder}: has no chat template; put the one of the published folder there "
                "(chat_template.jinja)"
            )
        self._prompts = prompts_of(model.config, self._processor)
        self._image_row = (
            None  # log-likelihoods are those of the model's own logits, whatever rows these have
        )
        self._text = _TokenizerText(self._processor.tokenizer)
        self._batched = model.config.model_type in BATCHED
        self._stop_ids = _end_ids(model, self._processor.tokenizer)
        self.conv_mode = OWN_TEMPLATE

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """See `Engine.prompt`: by the model's own chat template."""
        return self._prompts.prompt(turns, num_images)

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """See `Engine.answers`."""
        if self._batched:
            return super().answers(queries, sampling)
        return [
            answer
            for query in queries
            for answer in super(TransformersEngine, self).answers([query], sampling)
        ]

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """See `Engine.stream`; the answer comes as one piece, since tokenizers decode bytes differently once others
        follow them.
        """
        (answer,) = self.answers([query], sampling)
        if answer.text:
            yield answer.text

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """See `Engine.log_likelihoods`."""
        if self._batched:
            return super().log_likelihoods(queries)
        return [one for query in queries for one in super(TransformersEngine, self).log_likelihoods([query])]

    def _unmarked(self, text: str) -> str:
        """The text as it is: the model's own chat template marks nothing."""
        return text

    def _prompt_ids(self, text: str) -> list[int]:
        return self._prompts.token_ids(text)

    def _more_tokens(self, text: str, images: Sequence[bytes]) -> int:
        self._prompts.check_images(text, len(images))
        return sum(self._prompts.image_tokens(*self._picture(data).size) - 1 for data in images)

    def _inputs(self, queries: Sequence[Query | ContinuationQuery]) -> Any:
        rows = [
            self._prompts.inputs(query.text, [self._picture(data) for data in query.images])
            for query in queries
        ]
        pad_id = self._processor.tokenizer.pad_token_id
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in padded(rows, self._stop_ids[0] if pad_id is None else pad_id).items()
        }


class _TokenizerText:
    """Decodes as the model's own tokenizer does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """See `Decoder.decode`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _has_template(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, and the tokenizer's."""
    found = model.generation_config.eos_token_id
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]
    return sorted({int(one) for one in ids if one is not None})
