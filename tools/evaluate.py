#!/usr/bin/env python
"""Evaluate a model on the tasks of lmms-eval and lm-eval: answer their requests, then score the answers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError
from megatron_eve.data.errors import DataError
from megatron_eve.data.tokenizing.flags import tower_family
from megatron_eve.evaluation.answering import AnsweringCounts, answer_requests
from megatron_eve.evaluation.answering_model import AnsweringModel, find_model
from megatron_eve.evaluation.answers import (
    Head,
    MissingAnswers,
    ShardFile,
    check_data,
    check_head,
    read_answers,
)
from megatron_eve.evaluation.data_root import prepare_environment
from megatron_eve.evaluation.harnesses import Harnesses, check_installed, listing, ungrouped, versions
from megatron_eve.evaluation.judging import Judge, check_judge_flags, judge_answers
from megatron_eve.evaluation.mistakes import write_mistakes
from megatron_eve.evaluation.picture_answering import PictureAnswering
from megatron_eve.evaluation.report import (
    errors_by_task,
    in_doubt,
    markdown,
    write_results,
    write_submissions,
)
from megatron_eve.evaluation.requests import Request, of_shard
from megatron_eve.evaluation.training_record import add_scalars, append_scores, check_iteration
from megatron_eve.inference.code_tower import add_tower_flags
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.engine_choice import (
    add_engine_flags,
    open_engine_and_work,
)
from megatron_eve.inference.model_lease import model_lease
from megatron_eve.inference.opening import add_conv_mode_flag, run_on_rank
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import USER_ERROR_STATUS, record_status, run_command
from megatron_eve.runtime.ranks import global_rank

DESCRIPTION = """\
Evaluate a model on the tasks of lmms-eval (pictures) and lm-eval (text), in two steps.

  answer  builds all requests of the tasks, opens a model and answers those of one shard
  score   opens no model: the harnesses score the answers on disk
  list    shows tasks and groups, and which of their datasets are there

--data-root holds the datasets as folders OWNER/NAME in the hub's layout (README.md and parquet files), and is not
written; nothing is downloaded. The exit status is 0, 3 if more than 1 % of a task's requests have no answer because a
picture cannot be decoded or a prompt is too long, and 2 if the command could not be done.
"""
ANSWER_DESCRIPTION = """\
Build all requests of the tasks, open a model and answer those of one shard, greedily. Each batch of answers is on disk
before the next begins; the same command again goes on with what is missing. A picture that cannot be decoded or a
prompt that is too long is an answer that does not exist: it is counted, and scored as wrong.
"""
SCORE_DESCRIPTION = """\
Score the answers on disk and print the table. Refuses while answers are missing, and says how many of each task.
"""
LIST_DESCRIPTION = """\
List the tasks and groups of this project, the protocol that each follows, and whether its dataset is in --data-root.
"""
EXAMPLES = """\
python tools/evaluate.py answer --model-path runs/stage3 --tasks pope \\
    --data-root benchmarks --answers answers/stage3
python tools/evaluate.py score --tasks pope --data-root benchmarks \\
    --answers answers/stage3 --output results/stage3.json
torchrun --nproc-per-node 2 tools/evaluate.py answer --shard 3/8 \\
    --tensor-model-parallel-size 2 --model-path runs/stage3 \\
    --tasks pope,mmlu --data-root benchmarks --answers answers/stage3
"""
SOME_MISSING = 3
_SHARD = re.compile(r"(\d+)/(\d+)")


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The three commands and their flags, with those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="{answer,score,list}", prog=parser.prog
    )
    answer = commands.add_parser(
        "answer", help="answer the requests of one shard with a model", description=ANSWER_DESCRIPTION
    )
    add_tower_flags(add_engine_flags(answer), family)
    _add_data_flags(answer)
    how = answer.add_argument_group("answers", "How requests are answered, and by which process.")
    add_conv_mode_flag(how)
    how.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="answer the I-th of N shards, from 0/N to N-1/N; each process has a shard of its own (default: 0/1)",
    )
    how.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="requests answered together; it changes the speed, not the answers",
    )
    answer.set_defaults(max_new_tokens=None)
    score = commands.add_parser(
        "score", help="score the answers on disk; opens no model", description=SCORE_DESCRIPTION
    )
    _add_data_flags(score)
    results = score.add_argument_group("results", "Where the scores go, beside the table that is printed.")
    results.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file that gets the scores as JSON; files for servers go beside it",
    )
    results.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="for the FID of pictures: the Inception network as TorchScript, inception-2015-12-05.pt",
    )
    results.add_argument(
        "--mistakes",
        type=whole_number(1),
        metavar="N",
        help="also write a page beside --output with N wrong answers of each task and their pictures",
    )
    results.add_argument(
        "--judge-url",
        metavar="URL",
        help="also have a model behind a server with OpenAI's interface grade the answers, where a task has a "
        "judge's prompt: http://HOST:8000/v1; its values stand under its name, and its verdicts are kept below "
        "--answers; a key is taken from OPENAI_API_KEY",
    )
    results.add_argument(
        "--judge-model",
        metavar="NAME",
        help="with --judge-url: the name that the server gives its model (default: the only one that it has)",
    )
    results.add_argument(
        "--evaluation-log",
        type=Path,
        metavar="FILE",
        help="also append the scores as a line of JSON with the checkpoint's iteration, such as "
        "runs/stage2/evaluation.jsonl",
    )
    results.add_argument(
        "--tensorboard-dir",
        metavar="DIR",
        help="also write the scores as TensorBoard's scalars at the checkpoint's iteration",
    )
    what = "list tasks, groups and their datasets"
    listing = commands.add_parser("list", help=what, description=LIST_DESCRIPTION)
    listing.add_argument(
        "--data-root",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder of the datasets (default: the current one)",
    )
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tasks and data", "What is asked, its datasets, and where the answers are."
    )
    group.add_argument(
        "--tasks",
        required=True,
        type=_names,
        metavar="NAME,...",
        help="tasks and groups (tools/evaluate.py list)",
    )
    group.add_argument(
        "--data-root",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder with the datasets as OWNER/NAME; it is not written",
    )
    group.add_argument(
        "--data-cache-path",
        type=Path,
        default=Path.home() / ".cache" / "megatron_eve" / "evaluation",
        metavar="DIR",
        help="folder for the copies of the datasets in Arrow, shared by all processes (default: "
        "~/.cache/megatron_eve/evaluation)",
    )
    group.add_argument(
        "--answers",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the answers of one model, a file for each shard",
    )


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("names no task; tools/evaluate.py list shows them")
    return names


def _shard(text: str) -> tuple[int, int]:
    found = _SHARD.fullmatch(text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text}: write I/N, where I counts from 0 to N - 1, such as 0/8 or 7/8"
        )
    return int(found[1]), int(found[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Rank 0 also writes it to the file that `STATUS_FILE` names."""

    def work() -> int:
        flags = build_parser(tower_family(argv)).parse_args(argv)
        check_installed()
        if not flags.data_root.is_dir():
            raise ConfigError(
                f"--data-root {flags.data_root}: no such folder; name the one with the datasets"
            )
        flags.data_root = flags.data_root.resolve()
        if flags.command == "list":
            prepare_environment(Path.home() / ".cache" / "megatron_eve" / "evaluation")
            return list_tasks(flags)
        flags.answers, flags.data_cache_path = flags.answers.resolve(), flags.data_cache_path.resolve()
        prepare_environment(flags.data_cache_path)
        return answer(flags) if flags.command == "answer" else score(flags)

    try:
        status = run_command(work)
    except SystemExit:  # a flag that argparse refuses, on all ranks, or --help
        record_status(USER_ERROR_STATUS)
        raise
    return status if global_rank() else record_status(status)


def answer(flags: argparse.Namespace) -> int:
    """Plan, open the model, answer a shard; returns the exit status.

    Raises:
        UserError: what cannot be answered; OSError, what cannot be read or written.
    """
    if flags.model_path is not None:
        flags.model_path = flags.model_path.resolve()
    model = find_model(flags, ungrouped(flags.tasks))
    if global_rank():
        return open_engine_and_work(flags, flags.conv_mode, work=None)
    with model_lease(flags.model_path):
        return _answer_shard(flags, model)


def _answer_shard(flags: argparse.Namespace, model: AnsweringModel) -> int:
    harnesses = Harnesses(flags.tasks, flags.data_root)
    data = harnesses.check_data(flags.data_cache_path)
    head = Head(model.origin(flags).to_metadata(), data | model.data(), versions())
    before = read_answers(flags.answers, "--answers")
    check_head(before.head, head, flags.answers)
    requests = of_shard(harnesses.plan(), *flags.shard)
    missing = [request for request in requests if request.key not in before.found]
    shard, shards = flags.shard
    print(
        f"requests  {len(requests):,} of shard {shard}/{shards}, {len(missing):,} of them without an answer",
        flush=True,
    )
    if not missing:
        return 0
    with ShardFile(flags.answers / f"shard-{shard}-of-{shards}.jsonl", head) as file:

        def work(engine: Engine | None) -> int:
            return _answer(engine, missing, file, flags.batch_size, model.pictures)

        if not model.needs_engine:
            return run_on_rank(lambda: work(None))
        return open_engine_and_work(flags, flags.conv_mode, work, model.tower)


def _answer(
    engine: Engine | None,
    missing: Sequence[Request],
    file: ShardFile,
    batch_size: int,
    pictures: PictureAnswering | None,
) -> int:
    from tqdm import tqdm

    with tqdm(total=len(missing), desc="answers") as bar:
        try:
            counts = answer_requests(engine, missing, file, batch_size, bar.update, pictures)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on with what is missing") from None
    print(_summary(counts))
    return SOME_MISSING if in_doubt(missing, counts.errors) else 0


def _summary(counts: AnsweringCounts) -> str:
    rate = counts.tokens / counts.seconds if counts.seconds else 0.0
    rows = [f"answered  {counts.answered:,}"]
    rows += [
        f"errors    {task}: {', '.join(f'{reason} {count:,}' for reason, count in sorted(reasons.items()))}"
        for task, reasons in counts.errors.items()
    ]
    if counts.tokens or not counts.answered:
        rows.append(f"tokens    {counts.tokens:,} in {counts.seconds:.1f} s: {rate:,.1f} tokens/s")
    return "\n".join(rows)


def score(flags: argparse.Namespace) -> int:
    """Score the answers on disk, print the table, write the JSON; returns the exit status.

    Raises:
        UserError: answers that are missing, of two models, or to other data.
    """
    harnesses = Harnesses(flags.tasks, flags.data_root, flags.answers, flags.inception_weights)
    check_judge_flags(flags.judge_url, flags.judge_model, harnesses.tasks, harnesses.judged_tasks())
    data = harnesses.check_data(flags.data_cache_path)
    answers = read_answers(flags.answers, "--answers")
    if answers.head is None:
        raise DataError(f"--answers {flags.answers}: no answers there; run tools/evaluate.py answer first")
    check_data(answers.head, data, flags.answers)
    if flags.evaluation_log or flags.tensorboard_dir:
        check_iteration(answers.head, flags.answers)
    harnesses.check_scoring()
    judge = Judge(flags.judge_url, flags.judge_model) if flags.judge_url else None
    try:
        measured, requests = harnesses.score(answers.found, bool(flags.mistakes))
    except MissingAnswers as error:
        raise DataError(
            f"--answers {flags.answers}: answers are missing: {error}; run tools/evaluate.py answer "
            "until each shard is done"
        ) from None
    errors = errors_by_task(requests, answers)
    ungraded: list[str] = []
    if judge is not None:
        measured, ungraded = judge_answers(measured, requests, judge, flags.answers)
    print(markdown(measured, errors))
    write_results(flags.output, measured, errors, answers, versions())
    for path in write_submissions(flags.output, measured):
        print(f"file      {path}, for the benchmark's server or a judge")
    if flags.mistakes:
        page = flags.output.with_name(f"{flags.output.stem}.mistakes.html")
        left_out = write_mistakes(page, flags.mistakes, measured, requests, answers.found)
        print(f"mistakes  {page}" + (f", without {', '.join(left_out)}" if left_out else ""))
    if flags.evaluation_log:
        append_scores(flags.evaluation_log, answers.head, measured)
    if flags.tensorboard_dir:
        add_scalars(flags.tensorboard_dir, answers.head, measured)
    return SOME_MISSING if in_doubt(requests, errors) or ungraded else 0


def list_tasks(flags: argparse.Namespace) -> int:
    """Print the tasks and groups of this project; returns the exit status."""
    tasks, groups = listing(flags.data_root)
    widths = [max(len(row[column]) for row in tasks) for column in range(2)]
    for row in tasks:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
    print("\ngroups")
    for name, members in groups.items():
        print(f"{name.ljust(widths[0])}  {', '.join(members)}")
    print("\nEvery other task of lmms-eval 0.7.3 that generates answers can be asked by its own name, too.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
