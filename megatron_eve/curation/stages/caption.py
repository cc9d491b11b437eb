"""The stage `caption`: a vision-language model writes a new caption for each pair of a picture and a caption.

The model is a folder that transformers loads (--model-path), or one that a server with OpenAI's interface serves
(--base-url). Each pair is asked one prompt of --prompt-file, drawn by its row and --seed. Rows of other kinds than
pairs keep their text.

Answers are on disk batch by batch (WORK/caption/00000.answers.jsonl), so that a shard that was interrupted goes on.
Rows without an answer, and new captions that break a rule, are dropped with a reason.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow

from megatron_eve.config import ConfigError
from megatron_eve.curation.caption_answers import CaptionAnswer, CaptionAnswers
from megatron_eve.curation.caption_page import caption_page, shown_captions
from megatron_eve.curation.caption_prompts import FLAG, drawn_prompt, read_prompts
from megatron_eve.curation.captioner import Captioner, CaptionModel, open_engine, picture_of
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.text_rules import CaptionRules, add_caption_flags, caption_rules
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.sources.fields import plain_text
from megatron_eve.data.text.turns import is_blank
from megatron_eve.inference.engine_choice import check_engine_flags, engine_fingerprint
from megatron_eve.inference.opening import is_exported
from megatron_eve.inference.sampling import Sampling, add_sampling_flags, sampling_of
from megatron_eve.runtime.command_line import whole_number

CAPTION = "caption"
ANSWERS_SUFFIX, PAGE = ".answers.jsonl", "index.html"
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("caption", pyarrow.string()),
        ("reason", pyarrow.string()),
        ("detail", pyarrow.string()),
    ]
)
"""Columns of the table: `caption` is null without an answer and of rows that keep their text, `reason` of kept rows."""
PUBLISHED_RULES = CaptionRules(max_repeated=0.3, complete_sentences=True)
"""EVE's data leaves out "repetitive text and incomplete sentences"; how much repetition that is was not published."""
NEW, UNCHANGED = "new captions", "rows that keep their text"
_TELL_SECONDS = 60.0


@dataclass(frozen=True)
class CaptionStage(Stage):
    """New captions for the pairs of a shard.

    Attributes:
        model: that writes them.
        prompts: to draw from.
        seed: of that draw, and of sampled answers.
        sampling: how tokens are chosen.
        max_new_tokens: limit of a caption's tokens.
        rules: for new captions.
        batch_size: pictures that are asked about together.
    """

    name: ClassVar[str] = CAPTION
    workers: ClassVar[int | None] = 1  # the model uses all cores, or the GPU

    model: CaptionModel
    prompts: tuple[str, ...]
    seed: int
    sampling: Sampling
    max_new_tokens: int
    rules: CaptionRules
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """See `Stage`: where the model's folder lies or its server runs decides nothing, nor does the batch size."""
        served = {"served_model": self.model.served} if self.model.served else {}
        return {
            "model_sha256": self.model.sha256,
            **served,
            "prompts": list(self.prompts),
            "seed": self.seed,
            "sampling": self.sampling.to_metadata(),
            "max_new_tokens": self.max_new_tokens,
            **asdict(self.rules),
        }

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: the counts are those of new captions, of rows that keep their text, and of dropped rows by
        reason."""
        rows = work.kept_rows(shard, before=self.name).tolist()
        path = work.table(self.name, shard, ANSWERS_SUFFIX)
        with CaptionAnswers(path, rows, self.batch_size) as answers:
            if answers.missing:
                self._ask(work, shard, answers)
            table = [table_row(answer, self.rules) for answer in answers.found]
        work.write_table(self.name, shard, pyarrow.Table.from_pylist(table, SCHEMA))
        return Counter(_label(row) for row in table)

    def _ask(self, work: Work, shard: int, answers: CaptionAnswers) -> None:
        """Fill the file of answers."""
        records = work.records(shard, np.array(answers.missing, dtype=np.int64))
        pictures = (picture_of(row, self._prompt(work, shard, row), record) for row, record in records)
        captioner = Captioner(open_engine(self.model), self.max_new_tokens, self.sampling)
        captioner.fill(answers, pictures, self.batch_size, _Progress(answers).tell)

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`; it writes the page, too."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        rows = [(label, f"{count:,}") for label, count in record.counts(work).most_common()]
        page = caption_page(
            work.folder.name, rows, shown_captions(work, self.name, partial(self._prompt, work))
        )
        with work.output_file(self.name, PAGE) as path:
            path.write_text(page, encoding="utf-8")
        return [*rows, ("page", str(work.stage_folder(self.name) / PAGE))]

    def _prompt(self, work: Work, shard: int, row: int) -> str:
        """The prompt of a row."""
        return drawn_prompt(self.prompts, self.seed, sum(work.inputs.rows[:shard]) + row)


class _Progress:
    """Prints how far a shard is, once a minute, into the file that a task prints to."""

    def __init__(self, answers: CaptionAnswers) -> None:
        self._answers, self._before = answers, len(answers.found)
        self._began = self._told = time.monotonic()

    def tell(self) -> None:
        """Called after each batch."""
        now, done = time.monotonic(), len(self._answers.found)
        if now - self._told < _TELL_SECONDS:
            return
        self._told = now
        rate = (done - self._before) / (now - self._began)
        print(f"{done:,} rows done, {len(self._answers.missing):,} missing, {rate:.2f} rows/s", flush=True)


def table_row(answer: CaptionAnswer, rules: CaptionRules) -> dict[str, Any]:
    """The row of the table for an answer."""
    row: dict[str, Any] = {
        "row": answer.row,
        "caption": None,
        "reason": answer.reason,
        "detail": answer.detail,
    }
    if answer.caption is None:
        return row
    try:
        row["caption"] = plain_text(answer.caption, "the caption", Counter())
        if is_blank(answer.caption):
            raise SkipRow("caption_empty", "the model answered nothing that is visible")
        rules.check(row["caption"])
    except SkipRow as skip:
        row |= {"reason": skip.reason, "detail": skip.detail}
    return row


def _label(row: Mapping[str, Any]) -> str:
    """What a row of the table counts as."""
    reason: str | None = row["reason"]
    return reason or (UNCHANGED if row["caption"] is None else NEW)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    model = parser.add_argument_group("model", "Which model writes captions.")
    model.add_argument(
        "--model-path",
        type=Path,
        metavar="DIR",
        help="folder of the model: any that transformers' AutoModelForImageTextToText and AutoProcessor load, such as "
        "LLaVA-1.5; no code of it runs",
    )
    model.add_argument(
        "--base-url",
        metavar="URL",
        help="in place of --model-path: address of a running server with OpenAI's interface, such as vLLM or SGLang: "
        "http://HOST:8000/v1; a key, if it wants one, is taken from the environment variable OPENAI_API_KEY",
    )
    model.add_argument(
        "--model", metavar="NAME", help="with --base-url: the name that the server gives its model"
    )
    answers = parser.add_argument_group("answers", "What the model is asked, and how it answers.")
    answers.add_argument(
        FLAG,
        type=Path,
        required=True,
        metavar="FILE",
        help="text file of prompts, one a line; each row is asked one of them, drawn by its row and --seed",
    )
    answers.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="limit of a caption's tokens; one that is cut there has no complete sentence at its end",
    )
    answers.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="pictures that are asked about together; of a server, requests that it has at once from one shard",
    )
    add_sampling_flags(answers, gives="prompts and captions")
    add_caption_flags(
        parser, PUBLISHED_RULES, "Which new captions are kept; the rows of the others are dropped."
    )


def from_flags(flags: argparse.Namespace) -> CaptionStage:
    """The stage with the settings of the command line.

    Raises:
        UserError: the prompts or the model cannot be used; one sentence with the remedy.
    """
    prompts = read_prompts(flags.prompt_file)
    sampling = sampling_of(flags, draws=True)
    if flags.base_url is not None and not sampling.greedy:
        raise ConfigError(
            "--temperature: a server is asked for the most likely caption alone; leave this out with --base-url"
        )
    return CaptionStage(
        model=_model(flags),
        prompts=prompts,
        seed=flags.seed,
        sampling=sampling,
        max_new_tokens=flags.max_new_tokens,
        rules=caption_rules(flags),
        batch_size=flags.batch_size,
    )


def _model(flags: argparse.Namespace) -> CaptionModel:
    folder = flags.model_path
    if folder is not None and not is_exported(folder):
        raise ConfigError(
            f"--model-path {folder}: no folder that transformers loads (it has no config.json); name one, or of a "
            "checkpoint of this project make one: tools/convert_checkpoint.py export --format transformers"
        )
    one_process = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    flags = argparse.Namespace(**vars(flags), **one_process, ckpt_step=None, tokenizer_model=None)
    conv_mode = check_engine_flags(flags)
    _, _, sha256 = engine_fingerprint(flags)
    return CaptionModel(flags.model_path, conv_mode, flags.base_url, flags.model, sha256)
