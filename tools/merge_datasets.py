#!/usr/bin/env python
"""Make one dataset of several, without copying any data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.data.format.joined import MergedDataset, open_dataset
from megatron_eve.data.format.manifest import MANIFEST, PARTIAL
from megatron_eve.data.format.merging import check_codes_alike, merge_datasets
from megatron_eve.runtime.command_line import CommandParser
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Make one dataset of several, without copying any data.

OUT_dataset.json, the only file that is written, names the datasets, which stay where they are. A run takes OUT as one
dataset: --data-path OUT.
"""
EXAMPLES = """\
python tools/merge_datasets.py --output-prefix data/all \\
    data/captions/*_dataset.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="OUT",
        help="prefix of the new dataset: OUT_dataset.json is written, and names its parts relative to its folder",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the dataset that OUT is already; its own files, if it has any, are removed",
    )
    parser.add_argument(
        "datasets",
        nargs="+",
        metavar="PREFIX",
        help="datasets to merge, in the order in which their samples follow: each its --output-prefix, or the file "
        "PREFIX_dataset.json",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = build_parser().parse_args(argv)

    def work() -> int:
        prefix = flags.output_prefix.removesuffix(MANIFEST)
        info = merge_datasets(
            prefix,
            [name.removesuffix(MANIFEST) for name in flags.datasets],
            overwrite=flags.overwrite,
        )
        for folder in sorted({Path(name).parent for name in flags.datasets}):
            for path in sorted(folder.glob(f"*{MANIFEST}{PARTIAL}")):
                partial = str(path).removesuffix(MANIFEST + PARTIAL)
                if not Path(partial + MANIFEST).exists():
                    print(f"warning: {partial} is not finished, so it is left out", file=sys.stderr)
        merged = open_dataset(prefix)
        assert isinstance(merged, MergedDataset)
        if without := check_codes_alike(merged.parts):
            print(
                f"warning: {', '.join(without)} have no codes, and others have: {prefix} has none until these are made "
                "(tools/tokenize_images.py)",
                file=sys.stderr,
            )
        print(
            f"{flags.output_prefix}{MANIFEST}: {info.num_samples:,} samples, {info.num_images:,} images and "
            f"{info.num_tokens:,} tokens of {len(info.datasets):,} datasets"
        )
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
