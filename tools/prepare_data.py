#!/usr/bin/env python
"""Make parquet shards of records, pictures inside, from a data set as it is published."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.curation.preparing.config import PrepareConfig
from megatron_eve.curation.preparing.prepare import prepare
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.registry import PREPARERS
from megatron_eve.curation.preparing.summary import format_summary
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Make parquet shards of records, pictures inside, from a data set as it is published.

The first word names the data set. Its files are found below --source in the layout in which they are published, and
OUT/00000.parquet ... have a record (docs/data.md) for each row that can be used: text, pictures as the bytes of their
files, id, source, license, URL, author and scores. Nothing is downloaded, and no picture is written anew (but
those of AI2D on which letters have to be drawn). Rows that cannot be used are left out, counted by reason in the
summary and in OUT/prepared.json, and listed in OUT/skipped.jsonl.

After a kill the same command goes on with the shards that are missing. Files and rows of test and validation splits are
left out. The exit status is 0 if any row was kept.
"""


def build_parser() -> argparse.ArgumentParser:
    """A command for each preparer, with the flags of all and its own."""
    parser = CommandParser(
        description=DESCRIPTION, examples="\n".join(_example(name) for name in [*PREPARERS][:2])
    )
    commands = parser.add_subparsers(
        title="data sets", dest="name", required=True, metavar="NAME", prog=parser.prog
    )
    for name, preparer in PREPARERS.items():
        stop = "" if preparer.layout.endswith(".") else "."
        described = f"{preparer.what}.\n\n--source has {preparer.layout}{stop}"
        one = commands.add_parser(name, help=preparer.what, description=described, examples=_example(name))
        _add_flags(one, preparer)
    return parser


def _example(name: str) -> str:
    return f"python tools/prepare_data.py {name} --source downloads/{name} \\\n    --output prepared/{name}"


def _add_flags(parser: argparse.ArgumentParser, preparer: type[Preparer]) -> None:
    files = parser.add_argument_group("input and output", "What is read, and where the shards go.")
    files.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the download")
    files.add_argument(
        "--output", required=True, type=Path, metavar="OUT", help="folder of the shards, which is made"
    )
    files.add_argument(
        "--rows-per-shard",
        type=whole_number(1),
        default=PrepareConfig.rows_per_shard,
        metavar="N",
        help="rows of the download that go into one shard, those that are left out counted",
    )
    files.add_argument(
        "--follow-links",
        action="store_true",
        help="read pictures that are links to files outside of --source; otherwise their rows are left out",
    )
    rows = parser.add_argument_group("rows", "Which rows are kept.")
    preparer.add_flags(rows)
    rows.add_argument(
        "--allow-eval-splits",
        action="store_true",
        help="take files and rows of test and validation splits, too",
    )
    rows.add_argument(
        "--drop-license",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="leave out rows whose license matches a pattern, such as '*-nc-*' (case is ignored); rows without a "
        "license are kept",
    )
    rows.add_argument(
        "--opt-out",
        metavar="FILE",
        help="file of ids, URLs and image sha256 digests, one a line, whose rows are left out",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read rows and write shards (default: one for each CPU core, at most 8; here %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        flags = build_parser().parse_args(argv)
        config = PrepareConfig(
            preparer=PREPARERS[flags.name].from_flags(flags),
            output=flags.output,
            rows_per_shard=flags.rows_per_shard,
            workers=flags.workers,
            drop_license=tuple(flags.drop_license),
            opt_out=flags.opt_out,
            follow_links=flags.follow_links,
        )
        started = time.monotonic()
        print(format_summary(prepare(config), config.output, time.monotonic() - started))
        return 0

    return run_command(work, stopped="stopped; the same command goes on with the shards that are missing")


if __name__ == "__main__":
    sys.exit(main())
