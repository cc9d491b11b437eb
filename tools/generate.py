#!/usr/bin/env python
"""Answer a file of questions about pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError
from megatron_eve.data.tokenizing.flags import tower_family
from megatron_eve.inference.answering import AnswerCounts, answer_questions
from megatron_eve.inference.code_tower import ModelTower, add_tower_flags, model_tower
from megatron_eve.inference.conv_mode import check_conv_mode
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.model_lease import model_lease
from megatron_eve.inference.opening import (
    add_conv_mode_flag,
    add_model_flags,
    chat_template,
    check_model_flags,
    run_with_engine,
    show_any_text,
)
from megatron_eve.inference.origin import AnswerOrigin, model_fingerprint
from megatron_eve.inference.questions import AnswersFile, chunk, read_questions
from megatron_eve.inference.sampling import add_sampling_flags, sampling_of
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.digests import file_digest
from megatron_eve.runtime.errors import run_command
from megatron_eve.runtime.ranks import global_rank

DESCRIPTION = """\
Answer a file of questions about pictures.

Each line of --question-file is an object with
  "question_id"  a text or a whole number
  "image"        a file name under --image-folder, or a list of them, or absent
  "text"         the question; images go in front of it, unless <image> in it says where they stand
With --conv-mode plain, which captions, "image" must be there, and "text" is not looked at.

Each line of --answers-file, in the same order, is
  {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
Both are the layouts of the published evaluations. metadata says which model, settings and pictures an answer came
from.

Answers are greedy, as in the published evaluations, unless --temperature is given. They are written batch by batch. The
same command again goes on with those that are missing; with another model, other settings or other pictures it is
refused, since the file would mix answers: give another --answers-file. A question that cannot be asked, whose picture
cannot be read, or whose prompt is too long for the model, gets an empty text and says why in metadata.error; remove the
row to have it asked again. A line that is no question is named and left out. The exit status is 0 if every question has
an answer, 3 if some rows hold an error or some lines were left out, and 2 if the run could not be done.
"""
EXAMPLES = """\
python tools/generate.py --model-path runs/stage3 \\
    --tokenizer-model vicuna-7b/tokenizer.model --question-file pope.jsonl \\
    --image-folder coco/val2014 --answers-file answers/pope.jsonl
torchrun --nproc-per-node 2 tools/generate.py --tensor-model-parallel-size 2 \\
    --model-path runs/stage2 --tokenizer-model vicuna-7b/tokenizer.model \\
    --conv-mode plain --question-file photos.jsonl --image-folder photos \\
    --answers-file captions.jsonl
"""
SOME_SKIPPED = 3
MOST_WARNINGS = 5


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The flags; the published names where there are some. With those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    add_tower_flags(add_model_flags(parser), family)
    files = parser.add_argument_group("files", "The questions, their images, and where the answers go.")
    files.add_argument(
        "--question-file",
        required=True,
        type=Path,
        metavar="FILE",
        help="questions, one JSON object a line (above)",
    )
    files.add_argument(
        "--image-folder",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that image names are relative to (default: the current folder)",
    )
    files.add_argument(
        "--answers-file",
        required=True,
        type=Path,
        metavar="FILE",
        help="file that gets the answers; if it holds some already, the missing ones are added",
    )
    files.add_argument(
        "--num-chunks",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="cut the questions into N shards of equal length, for N processes (the last may be shorter)",
    )
    files.add_argument(
        "--chunk-idx",
        type=whole_number(0),
        default=0,
        metavar="I",
        help="shard to answer, from 0 to N - 1, into an answers file of its own; `cat` joins the files",
    )
    answers = parser.add_argument_group("answers", "How questions are asked, and how long answers may be.")
    add_conv_mode_flag(answers)
    answers.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="longest answer, in tokens",
    )
    answers.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="questions answered together; it changes the speed, not the answers",
    )
    add_sampling_flags(answers)
    return parser


def run(engine: Engine, flags: argparse.Namespace, answers: AnswersFile, refused: Sequence[str]) -> int:
    """Answer, and print the summary; returns the exit status.

    Args:
        engine: the model.
        flags: of this command.
        answers: the answers file, which knows the unanswered questions.
        refused: messages about lines of the question file that are not questions.
    """
    from tqdm import tqdm

    with tqdm(total=answers.resumed + len(answers.missing), initial=answers.resumed, desc="answers") as bar:
        try:
            tally = answer_questions(
                engine,
                answers,
                flags.image_folder,
                batch_size=flags.batch_size,
                max_new_tokens=flags.max_new_tokens,
                done=bar.update,
                sampling=sampling_of(flags),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on with what is missing") from None
    if refused:
        tally.skipped["not_a_question"] = len(refused)
    print(summary(tally, answers, flags.answers_file))
    return SOME_SKIPPED if tally.skipped or answers.damaged else 0


def answer_origin(flags: argparse.Namespace, tower: ModelTower | None) -> AnswerOrigin:
    """The origin of this run's answers; takes seconds for a large transformers folder, or a tower."""
    iteration, sha256 = model_fingerprint(flags.model_path)
    return AnswerOrigin(
        model_path=str(flags.model_path.resolve()),
        iteration=iteration,
        model_sha256=sha256,
        tokenizer_sha256=file_digest(flags.tokenizer_model) if flags.tokenizer_model else None,
        conv_mode=flags.conv_mode,
        max_new_tokens=flags.max_new_tokens,
        apply_exif=not flags.ignore_exif_orientation,
        sampling=sampling_of(flags).to_metadata(),
        tower_sha256=tower.check_weights() if tower else None,
    )


def summary(tally: AnswerCounts, answers: AnswersFile, path: Path) -> str:
    """The summary as text."""
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(tally.skipped.items()))
    before = f", {answers.damaged:,} of them with an error" if answers.damaged else ""
    rate = tally.tokens / tally.seconds if tally.seconds else 0.0
    rows = [
        ("answered", f"{tally.answered:,}"),
        ("skipped", f"{sum(tally.skipped.values()):,}{f' ({skipped})' if skipped else ''}"),
        ("resumed", f"{answers.resumed:,} that were in the file{before}"),
        ("tokens", f"{tally.tokens:,} in {tally.seconds:.1f} s: {rate:,.1f} tokens/s"),
        ("answers", str(path)),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def warn_of(refused: Sequence[str]) -> None:
    """Warn about lines that are not questions: the first ones by name, the others counted."""
    for line in refused[:MOST_WARNINGS]:
        print(f"warning: {line}; this line is left out", file=sys.stderr)
    if len(refused) > MOST_WARNINGS:
        print(f"warning: {len(refused) - MOST_WARNINGS:,} more lines are left out", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Check flags and questions, open the model, answer; returns the exit status."""

    def work() -> int:
        parser = build_parser(tower_family(argv))
        flags = parser.parse_args(argv)
        show_any_text()
        if not 0 <= flags.chunk_idx < flags.num_chunks:
            parser.error(
                f"--chunk-idx {flags.chunk_idx}: counts from 0 to --num-chunks - 1 = {flags.num_chunks - 1}"
            )
        return answer(flags)

    return run_command(work)


def answer(flags: argparse.Namespace) -> int:
    """Check folders and questions, open the model, answer; returns the exit status.

    Raises:
        UserError: what cannot be answered; OSError, what cannot be read or written.
    """
    sampling_of(flags)
    check_model_flags(flags)
    if not flags.image_folder.is_dir():
        raise ConfigError(f"--image-folder {flags.image_folder}: no such folder")
    flags.conv_mode = flags.conv_mode or chat_template(flags.model_path)
    template = check_conv_mode(flags, flags.conv_mode)
    found = read_questions(flags.question_file, template)
    shard = chunk(found.questions, flags.num_chunks, flags.chunk_idx)
    pictures = any(question.images for question in shard)
    tower = model_tower(flags, needed=pictures)
    if global_rank():
        return run_with_engine(flags, flags.conv_mode, work=None)
    warn_of(found.refused)
    tower = tower if pictures else None  # is not loaded for questions about text
    with (
        model_lease(flags.model_path),
        AnswersFile(flags.answers_file, shard, answer_origin(flags, tower), flags.image_folder) as answers,
    ):
        return run_with_engine(
            flags, flags.conv_mode, lambda engine: run(engine, flags, answers, found.refused), tower
        )


if __name__ == "__main__":
    sys.exit(main())
