"""Cost of tools/evaluate.py: planning and scoring many requests, and answering, compared with tools/generate.py.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --model-path quickstart/reference --conv-mode plain \\
        --picture quickstart/data/images/*
    python benchmarks/evaluation.py --toy

Planning and scoring: POPE with --requests rows, in a process that opens no model: seconds of each part, and the peak
memory. Answering, with --model-path: both tools answer the same questions about the same pictures in turns; questions
and tokens a second are those of the answering alone, without the opening of the model. Log-likelihoods have a benchmark
of their own, log_likelihoods.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from command_cost import ROOT, Memory, run_command
from gpu_common import parser, photos
from tables import Table

from tests.evaluation.hub_folder import write_split

MAX_NEW_TOKENS = "128"  # of POPE's task file
TOOLS = ("generate.py", "evaluate.py")
_ANSWERED = re.compile(r"tokens +([\d,]+) in ([\d.,]+) s")


def write_questions(root: Path, count: int, pictures: Sequence[bytes]) -> None:
    """POPE with so many rows, whose questions are numbers, with the pictures in turns."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": str(number),
            "answer": "yes" if number % 2 else "no",
            "image_source": "",
            "image": {"bytes": pictures[number % len(pictures)], "path": f"{number}.jpg"},
            "category": "random",
        }
        for number in range(count)
    ]
    write_split(root / "lmms-lab-encoder" / "POPE", "test", rows)


def plan_and_score(root: Path, cache: Path) -> dict[str, float]:
    """Seconds of each part of both commands but the model's, and MiB of memory. For a process of its own."""
    parts: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        parts[name] = time.perf_counter() - began
        return found

    def opened() -> Any:
        from megatron_eve.evaluation.data_root import prepare_environment

        prepare_environment(cache)
        from megatron_eve.evaluation.harnesses import Harnesses

        return Harnesses(["pope"], root)

    harnesses = timed("imports and task files", opened)
    timed("digest of the data", lambda: harnesses.check_data(cache))
    timed("planning, with the copy in Arrow", lambda: len(harnesses.plan()))
    requests = timed("planning once more", harnesses.plan)
    from megatron_eve.evaluation.answers import Answered

    found = {one.key: Answered("Yes") for one in requests}
    del requests
    timed("scoring", lambda: harnesses.score(found))
    memory = Memory()
    memory.update(os.getpid())
    return {**parts, "memory": memory.resident}


def planning(arguments: argparse.Namespace) -> None:
    """Print the table of planning and scoring."""
    count = 300 if arguments.toy else arguments.requests
    table = Table("planning and scoring", ("part", f"s, {count:,} requests"), arguments.out)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as written:
        folder = Path(written)
        write_questions(folder / "root", count, photos(1, 64, 48))
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(plan_and_score, folder / "root", folder / "cache").result()
    memory = found.pop("memory")
    for name, seconds in found.items():
        table.add(name, f"{seconds:.1f}")
    table.note(f"Peak memory: {memory:,.0f} MiB.")
    table.close()


def commands(folder: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What each tool is called with, for questions in the folder."""
    model = ["--model-path", str(arguments.model_path), "--batch-size", str(arguments.batch_size)]
    for name in ("conv_mode", "tokenizer_model"):
        if value := getattr(arguments, name):
            model += [f"--{name.replace('_', '-')}", str(value)]
    generate = [
        "--question-file",
        "questions.jsonl",
        "--image-folder",
        "pictures",
        "--answers-file",
        "answers.jsonl",
    ]
    evaluate = [
        "--tasks",
        "pope",
        "--data-root",
        "root",
        "--data-cache-path",
        "cache",
        "--answers",
        "answers",
    ]
    paths = {"questions.jsonl", "pictures", "answers.jsonl", "root", "cache", "answers"}

    def placed(words: Sequence[str]) -> list[str]:
        return [str(folder / word) if word in paths else word for word in words]

    first = [sys.executable, str(ROOT / "tools" / TOOLS[0]), *model, "--max-new-tokens", MAX_NEW_TOKENS]
    second = [sys.executable, str(ROOT / "tools" / TOOLS[1]), "answer", *model]
    return {TOOLS[0]: first + placed(generate), TOOLS[1]: second + placed(evaluate)}


def answering(arguments: argparse.Namespace) -> None:
    """Let both tools answer in turns, and print the rates of each turn and their medians."""
    questions, turns = (8, 1) if arguments.toy else (arguments.questions, arguments.turns)
    pictures = [path.read_bytes() for path in arguments.picture] or photos(25, 640, 480)
    header = ("turn", "tool", "tokens", "questions/s", "tokens/s")
    table = Table(f"answering {questions} questions", header, arguments.out)
    rates: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as written:
        folder = Path(written)
        (folder / "pictures").mkdir()
        for number, picture in enumerate(pictures):
            (folder / "pictures" / str(number)).write_bytes(picture)
        rows = [
            {"question_id": str(number), "image": str(number % len(pictures)), "text": str(number)}
            for number in range(questions)
        ]
        (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        write_questions(folder / "root", questions, pictures)
        for turn in range(turns):
            for tool, words in commands(folder, arguments).items():
                for path in [folder / "answers.jsonl", *folder.glob("answers/*")]:
                    path.unlink(missing_ok=True)
                tokens, seconds = _answered(words)
                rates[tool].append(questions / seconds)
                table.add(turn + 1, tool, tokens, f"{questions / seconds:.1f}", f"{tokens / seconds:.0f}")
    middle = [statistics.median(rates[tool]) for tool in TOOLS]
    ratio = f"{TOOLS[1]} {middle[1] / middle[0]:.2f} of {TOOLS[0]}"
    table.note(f"Medians: {middle[0]:.1f} and {middle[1]:.1f} questions/s, {ratio}.")
    table.close()


def _answered(words: Sequence[str]) -> tuple[int, float]:
    """Tokens and seconds that a tool prints."""
    cost = run_command(words)
    found = _ANSWERED.search(cost.output)
    if cost.status or not found:
        sys.exit(f"error: {' '.join(words)} failed:\n{cost.output[-3000:]}")
    return int(found[1].replace(",", "")), max(float(found[2].replace(",", "")), 0.1)


def main() -> None:
    """Measure and print the tables."""
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=200_000, help="requests to plan and to score")
    options.add_argument(
        "--folder", type=Path, help="folder for what is written meanwhile (default: the system's)"
    )
    options.add_argument("--model-path", type=Path, help="a checkpoint or an exported folder, to answer with")
    options.add_argument(
        "--tokenizer-model", type=Path, help="its tokenizer, where the checkpoint's is elsewhere"
    )
    options.add_argument("--conv-mode", help="template of its prompts")
    options.add_argument(
        "--picture", type=Path, nargs="+", default=[], help="files of pictures (default: noise and shapes)"
    )
    options.add_argument("--questions", type=int, default=150, help="questions to answer")
    options.add_argument("--turns", type=int, default=5, help="turns of both tools")
    options.add_argument("--batch-size", type=int, default=8, help="questions in a batch")
    arguments = options.parse_args()
    planning(arguments)
    if arguments.model_path:
        answering(arguments)


if __name__ == "__main__":
    main()
