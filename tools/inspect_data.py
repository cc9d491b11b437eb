#!/usr/bin/env python
"""Look at a dataset: figures and rows on a page, or a check of all of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import AnyDataset, open_dataset
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.inspecting.checking import Tally, check_dataset, parts_of
from megatron_eve.data.inspecting.inspection import PAGE, draw_sample, write_inspection
from megatron_eve.data.inspecting.layout import check_tokenizer
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.runtime.errors import UserError, run_command

DESCRIPTION = """\
Look at a dataset: its figures, and rows drawn at random with their pictures and their tokens.

DIR/index.html is the page, one file that needs no network; DIR/row_N.png are its rows. Tokens that train are green.
A dataset holds no tokenizer: without --tokenizer-model the rows show token ids.

--check reads all of the dataset instead: every record, token id and label, every picture, and the digest of the
content. What is damaged is listed by row on standard output. The exit status is 0 if all is whole, 1 if something is
damaged, and 2 if the dataset cannot be opened. With --output-dir the page is written too.
"""
EPILOG = """\
examples:
  python tools/inspect_data.py data/captions --tokenizer-model vicuna-7b/tokenizer.model --output-dir look
  python tools/inspect_data.py data/captions --check --workers 16
"""
SOME_DAMAGED = 1


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument(
        "dataset", metavar="PREFIX", help="the dataset's --output-prefix, or its PREFIX_dataset.json"
    )
    parser.add_argument("--tokenizer-model", metavar="FILE", help="the tokenizer that it was made with")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="where the page goes (default: inspect_NAME in the current folder, NAME as the dataset is called)",
    )
    parser.add_argument(
        "--sample", type=int, default=8, metavar="N", help="rows to draw (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which rows (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="read all of it and list what is damaged")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that decode pictures for --check (default: the machine's cores, at most 8: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = build_parser().parse_args(argv)
    return run_command(lambda: inspect(flags))


def inspect(flags: argparse.Namespace) -> int:
    """What the flags ask for; returns the exit status."""
    for flag, value, least in (
        ("--sample", flags.sample, 0),
        ("--seed", flags.seed, 0),
        ("--workers", flags.workers, 1),
    ):
        if value < least:
            raise UserError(f"{flag} {value}: must be {least} or more")
    prefix = flags.dataset.removesuffix(MANIFEST)
    dataset = open_dataset(prefix)
    tokenizer = None
    if flags.tokenizer_model is not None:
        tokenizer = Tokenizer(flags.tokenizer_model)
        check_tokenizer(dataset, prefix, tokenizer)
    folder = Path(flags.output_dir or f"inspect_{Path(prefix).name}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: is a file; name a folder")
    damaged = check(dataset, prefix, flags.workers) if flags.check else 0
    if flags.output_dir is not None or not flags.check:
        write_inspection(dataset, prefix, folder, draw_sample(dataset, flags.sample, flags.seed), tokenizer)
        print(f"page      {folder / PAGE}")
    return SOME_DAMAGED if damaged else 0


def check(dataset: AnyDataset, prefix: str, workers: int) -> int:
    """Check a dataset, list what is damaged and say what was read; returns how many things are damaged."""
    with contextlib.suppress(DataError):
        dataset.text(0)  # loads megatron-core, which takes seconds that are not the check's
    tally, started = Tally(), time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file is not for redrawing
    total = sum(part.info.text_bytes + part.info.stored_bytes for part in parts_of(dataset))
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", mininterval=interval) as bar:
        for damage in check_dataset(dataset, tally, workers=workers, advance=bar.update):
            bar.write(f"damaged   {damage}", file=sys.stdout)
    seconds = time.monotonic() - started
    print(
        f"checked   {tally.samples:,} samples, {tally.images:,} images, {tally.num_bytes:,} bytes in {seconds:.1f} s "
        f"({tally.num_bytes / max(seconds, 1e-9) / 1e6:.1f} MB/s)"
    )
    for name in tally.without_digest:
        print(f"note      {name}{MANIFEST} has no content_sha256: an older version made it")
    print(f"result    {prefix} {f'has damage: {tally.damaged:,} found' if tally.damaged else 'is whole'}")
    return tally.damaged


if __name__ == "__main__":
    sys.exit(main())
