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

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import CODES_MANIFEST
from megatron_eve.data.format.joined import AnyDataset, open_dataset
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset, parts_of
from megatron_eve.data.inspecting.codes import Codes, check_codes, describe_codes, find_dataset_codes
from megatron_eve.data.inspecting.inspection import PAGE, draw_sample, write_inspection
from megatron_eve.data.inspecting.layout import check_tokenizer
from megatron_eve.data.text.load_tokenizer import load_kind
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import UserError, run_command

DESCRIPTION = """\
Look at a dataset: its figures, and rows drawn at random with their pictures and their tokens.

DIR/index.html is the page, one file that needs no network; DIR/row_N.png are its rows. Tokens that train are green.
A dataset holds no tokenizer: without --tokenizer-model the rows show token ids.

--check reads all of the dataset instead: every record, token id and label, every picture, the digest of the content,
and the codes of its pictures if it has some. What is damaged is listed by row on standard output. The exit status is 0
if all is whole, 1 if something is damaged, and 2 if the dataset cannot be opened. With --output-dir the page is written
too.
"""
EXAMPLES = """\
python tools/inspect_data.py data/captions \\
    --tokenizer-model vicuna-7b/tokenizer.model --output-dir look
python tools/inspect_data.py data/captions --check --workers 16
"""
SOME_DAMAGED = 1


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument(
        "dataset", metavar="PREFIX", help="the dataset: its --output-prefix, or the file PREFIX_dataset.json"
    )
    parser.add_argument(
        "--codes",
        metavar="PREFIX",
        help="codes of the pictures, the --output-prefix of tools/tokenize_images.py (default: those at the dataset's "
        "prefix, if there are any)",
    )
    page = parser.add_argument_group("page", "The page that shows the dataset.")
    page.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json that the dataset was made with, or its folder (default: rows show "
        "token ids instead of text)",
    )
    page.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder of the page (default: inspect_NAME, for a dataset .../NAME)",
    )
    page.add_argument("--sample", type=whole_number(0), default=8, metavar="N", help="rows to show")
    page.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed that chooses the rows to show"
    )
    check = parser.add_argument_group("check", "Reading all of the dataset, instead of making the page.")
    check.add_argument("--check", action="store_true", help="read all of it and list what is damaged")
    check.add_argument(
        "--workers",
        type=whole_number(1),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that decode images for --check (default: one for each CPU core, at most 8; here %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = build_parser().parse_args(argv)
    return run_command(lambda: inspect(flags))


def inspect(flags: argparse.Namespace) -> int:
    """What the flags ask for; returns the exit status."""
    prefix = flags.dataset.removesuffix(MANIFEST)
    dataset = open_dataset(prefix)
    tokenizer = None
    if flags.tokenizer_model is not None:
        tokenizer = load_kind(flags.tokenizer_model, dataset.info.tokenizer_kind)
        check_tokenizer(dataset, prefix, tokenizer)
    folder = Path(flags.output_dir or f"inspect_{Path(prefix).name}")
    for there in (folder, *folder.parents):
        if there.exists() and not there.is_dir():
            raise UserError(f"--output-dir {folder}: {there} is a file; name a folder")
    codes = find_dataset_codes(dataset, flags.codes and flags.codes.removesuffix(CODES_MANIFEST))
    damaged = check(dataset, prefix, flags.workers, codes) if flags.check else 0
    if flags.output_dir is not None or not flags.check:
        rows = draw_sample(dataset, flags.sample, flags.seed)
        write_inspection(dataset, prefix, folder, rows, tokenizer, codes)
        print(f"page      {folder / PAGE}")
    return SOME_DAMAGED if damaged else 0


def check(dataset: AnyDataset, prefix: str, workers: int, codes: Sequence[Codes]) -> int:
    """Check a dataset, list damage and print what was read; returns the number of damaged things."""
    with contextlib.suppress(DataError):
        dataset.text(0)  # loads megatron-core first: these seconds should not count as the check's
    tally, started = CheckCounts(), time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file cannot be redrawn
    total = sum(part.info.text_bytes + part.info.stored_bytes for part in parts_of(dataset))
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", mininterval=interval) as bar:
        for damage in check_dataset(dataset, tally, workers=workers, advance=bar.update):
            bar.write(f"damaged   {damage}", file=sys.stdout)
    for one in codes:
        for damage in check_codes(one):
            tally.damaged += 1
            print(f"damaged   {damage}")
    seconds = time.monotonic() - started
    print(
        f"checked   {tally.samples:,} samples, {tally.images:,} images, {tally.num_bytes:,} bytes in {seconds:.1f} s "
        f"({tally.num_bytes / max(seconds, 1e-9) / 1e6:.1f} MB/s)"
    )
    for one in codes:
        print(f"codes     {describe_codes(one)}")
    for name in tally.without_digest:
        print(f"note      {name}{MANIFEST} has no content_sha256: an older version made it")
    print(f"result    {prefix} {f'has damage: {tally.damaged:,} found' if tally.damaged else 'is whole'}")
    return tally.damaged


if __name__ == "__main__":
    sys.exit(main())
