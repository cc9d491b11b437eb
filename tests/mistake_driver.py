"""Runs wrong usages of the commands one behind the other in one process, which never loads torch.

It reads a JSON list of cases from standard input, `{"tool", "words", "ranks"}`, and writes a list of what came of
each: `{"status", "out", "err", "torch"}`. With ranks, each is a fork of this process, and as under torchrun all get
SIGTERM as soon as one has ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]


def command(name: str) -> Callable[[list[str]], int | None]:
    """The `main` of a tool, or of a module of the package, as a function of its words."""
    path = ROOT / "tools" / f"{name}.py"
    if not path.exists():
        path = ROOT / "megatron_eve" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"command_{name}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)

    def run(words: list[str]) -> int | None:
        sys.argv = [f"{name}.py", *words]
        result: int | None = module.main()
        return result

    return run


def run_one(run: Callable[[list[str]], int | None], words: list[str]) -> int:
    """Its exit status; a traceback is shown on standard error, as Python does."""
    import traceback

    try:
        return run(words) or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def rank(run: Callable[[list[str]], int | None], words: list[str], number: int, ranks: int) -> int:
    """Fork a rank; returns its process id."""
    child = os.fork()
    if child == 0:
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
        )
        status = run_one(run, words)
        os._exit(status if "torch" not in sys.modules else 99)
    return child


def run_ranks(run: Callable[[list[str]], int | None], words: list[str], ranks: int) -> int:
    """The exit status of the rank that ended first; the others are ended, as torchrun does."""
    children = [rank(run, words, number, ranks) for number in range(ranks)]
    first, status = os.wait()
    for child in children:
        if child != first:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Run the cases."""
    # Before the forks, which else would each take a second for it.

    found: list[dict[str, Any]] = []
    commands: dict[str, Callable[[list[str]], int | None]] = {}
    kept = os.dup(1)
    for case in json.load(sys.stdin):
        run = commands.get(case["tool"]) or commands.setdefault(case["tool"], command(case["tool"]))
        files: list[IO[bytes]] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        ranks = case["ranks"]
        status = run_ranks(run, case["words"], ranks) if ranks else run_one(run, case["words"])
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode())
        found.append({"status": status, "out": texts[0], "err": texts[1], "torch": "torch" in sys.modules})
    os.write(kept, json.dumps(found).encode())


if __name__ == "__main__":
    main()
