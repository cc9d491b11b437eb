#!/usr/bin/env python
"""Curate shards of records, stage by stage: filter, duplicates, features, clusters, captions, build."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.curation.command import curate
from megatron_eve.curation.registry import stage_modules
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Curate parquet shards of records (docs/curation.md), one stage at a time. Each stage reads the shards and the tables of
the stages before it, all in one work folder, and leaves the shards as they are; build writes the curated ones.

Each shard is a task of its own process. The exit status is 0 if all shards are finished, 1 if some are not, which the
same command finishes, and 2 if something has to be corrected first.
"""
EXAMPLES = """\
python tools/curate.py filter --work curated --input 'shards/*.parquet'
python tools/curate.py build --work curated
python tools/curate.py filter --work curated --shards 3,7-9 --workers 2
"""


def build_parser() -> argparse.ArgumentParser:
    """A parser with one command for each stage."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    modules = stage_modules()
    names = "{" + ",".join(modules) + "}"  # by which argparse knows that these are commands
    stages = parser.add_subparsers(
        title="stages", dest="stage", required=True, metavar=names, prog=parser.prog
    )
    for name, module in modules.items():
        doc = (module.__doc__ or "").removeprefix(f"The stage `{name}`: ").strip()
        first = doc.split("\n\n")[0].replace("\n", " ").rstrip(".")
        stage = stages.add_parser(name, help=first, description=doc[:1].upper() + doc[1:])
        _add_common(stage)
        module.add_flags(stage)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of all stages."""
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        metavar="WORK",
        help="work folder of this curation, shared by its stages",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="shards that are worked on at a time, each by a process of its own (default: the stage's own number, "
        "mostly one for each CPU core)",
    )
    parser.add_argument(
        "--shards",
        metavar="NUMBERS",
        help="work on these shards only, such as 0,3,7-9 (default: all unfinished ones)",
    )
    parser.add_argument(
        "--list-unfinished",
        action="store_true",
        help="print the numbers of the tasks that are unfinished, such as 0,3,7-9, or none, and run nothing",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        flags = build_parser().parse_args(argv)
        return curate(
            stage_modules()[flags.stage].from_flags(flags),
            flags.work,
            patterns=getattr(flags, "input", None),
            workers=flags.workers,
            shards=flags.shards,
            list_unfinished=flags.list_unfinished,
        )

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
