#!/usr/bin/env python
"""Weights from Hugging Face folders to checkpoints of this project, and back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.runtime.errors import run_command

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.family import ModelFamily

DESCRIPTION = """\
Weights from Hugging Face folders to checkpoints of this project, and back.

  import    a language model (Vicuna, Llama, Qwen2) -> a start for stage 1
            a model in its published layout         -> a checkpoint to go on from, or to ask
  export    a checkpoint of any layout              -> the published layout, or a folder for transformers

One tensor passes at a time (on export, one shard), on the CPU and in one process; any layout reads what is written. A
folder gets its name when it is whole. Every tensor is accounted for in the summary.
"""
EPILOG = """\
examples:
  python tools/convert_checkpoint.py import --source vicuna-7b-v1.5 --target runs/vicuna --dtype bfloat16
  python tools/convert_checkpoint.py export --source runs/stage3 --target model-7b --tokenizer vicuna-7b-v1.5
  python tools/convert_checkpoint.py export --source runs/stage3 --target model-7b-hf --tokenizer vicuna-7b-v1.5 \\
      --format transformers
"""
_DTYPES = ("bfloat16", "float16", "float32")


def build_parser(family: ModelFamily) -> argparse.ArgumentParser:
    """The two commands and their flags, those of the family among them."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export}")
    incoming = commands.add_parser("import", help="a Hugging Face folder -> a checkpoint")
    outgoing = commands.add_parser("export", help="a checkpoint -> a folder in Hugging Face layout")
    for one, source, target in (
        (
            incoming,
            "folder in Hugging Face layout",
            "new folder, for --pretrained-checkpoint and --model-path",
        ),
        (outgoing, "folder that --save of a run or an import wrote", "new folder in Hugging Face layout"),
    ):
        one.add_argument("--source", required=True, type=Path, metavar="DIR", help=source)
        one.add_argument("--target", required=True, type=Path, metavar="DIR", help=target)
        one.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they are)")
        one.add_argument(
            "--family",
            default=family.name,
            metavar="NAME",
            help=f"the model family, which has flags of its own (default: that of --source, or else {DEFAULT_FAMILY})",
        )
        one.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    incoming.add_argument(
        "--seed", type=int, default=1234, help="of weights that begin at random (default: %(default)s)"
    )
    outgoing.add_argument(
        "--format",
        choices=("published", "transformers"),
        default="published",
        help="published: for the public code of the family. transformers: for transformers 4.57 and 5, with "
        "trust_remote_code=True, or after `import megatron_eve.hf` without it (default: %(default)s)",
    )
    outgoing.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the folder of the tokenizer.model that the data was made with, or the file itself; --format transformers "
        "needs it",
    )
    outgoing.add_argument(
        "--max-shard-size",
        default="2GB",
        metavar="SIZE",
        help="of one file, and of what is held in memory (default: 2GB)",
    )
    family.hugging_face().add_import_flags(incoming)
    family.hugging_face().add_export_flags(outgoing)
    return parser


def chosen_family(argv: Sequence[str] | None) -> ModelFamily:
    """The family that --family names, or --source is of; without either the default one."""
    from megatron_eve.convert.usage import family_of_source

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--family")
    parser.add_argument("--source", type=Path)
    try:
        flags, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value, which the whole parser judges
        return find_family(DEFAULT_FAMILY)
    if flags.family is not None:
        return find_family(flags.family)
    stated = family_of_source(flags.source) if flags.source is not None else None
    return find_family(stated or DEFAULT_FAMILY)


def run_import(flags: argparse.Namespace) -> None:
    """Plan, check and write a checkpoint."""
    from megatron_eve.convert.importing import (
        check_finite,
        import_config,
        plan_import,
        write_import,
    )
    from megatron_eve.convert.summary import size_of, summary
    from megatron_eve.runtime.progress_bar import byte_progress

    family, values = find_family(flags.family), vars(flags)
    frozen = family.hugging_face().import_fingerprint(values)
    config = import_config(flags.source, family, values)
    plan = plan_import(flags.source, config, _dtype(flags), flags.seed)
    account = {"dropped": plan.dropped, "initialised": dict.fromkeys(plan.initialised, "not in the folder")}
    if not flags.dry_run:
        with byte_progress("checking", plan.source_bytes) as done:
            check_finite(flags.source, plan, done)
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write_import(plan, flags.target, frozen, done)
    print(summary(plan.tensors, plan.mapped, account, every=flags.dry_run))


def run_export(flags: argparse.Namespace) -> None:
    """Plan, check and write a folder in Hugging Face layout."""
    from megatron_eve.checkpoint.compatibility import check_tokenizer
    from megatron_eve.checkpoint.state import saved_common
    from megatron_eve.config import ConfigError
    from megatron_eve.convert.exporting import open_checkpoint, plan_export, write_export
    from megatron_eve.convert.summary import size_of, summary
    from megatron_eve.convert.transformers_folder import fast_tokenizer
    from megatron_eve.convert.usage import read_tokenizer, shard_bytes
    from megatron_eve.runtime.progress_bar import byte_progress

    published = flags.format == "published"
    tokenizer = read_tokenizer(flags.tokenizer) if flags.tokenizer is not None else None
    if tokenizer is not None:
        warning = check_tokenizer(*saved_common(str(flags.source)), tokenizer, "--tokenizer")
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        if not published:
            fast_tokenizer(Path(tokenizer.path))  # refuses one that transformers could not have
    checkpoint, config = open_checkpoint(flags.source)
    if config.family != flags.family:
        raise ConfigError(
            f"--family {flags.family}: the checkpoint is of the family {config.family}; leave --family out"
        )
    plan = plan_export(checkpoint, config, _dtype(flags), published, vars(flags))
    account = {"dropped": plan.dropped, "added": plan.added}
    if not flags.dry_run:
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write_export(plan, flags.target, tokenizer, shard_bytes(flags.max_shard_size), published, done)
    print(summary(plan.tensors, plan.mapped, account, every=flags.dry_run))


def _dtype(flags: argparse.Namespace) -> torch.dtype | None:
    import torch

    return getattr(torch, flags.dtype) if flags.dtype else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed here that wants a GPU
    return run_command(
        lambda: convert(build_parser(chosen_family(argv)).parse_args(argv)),
        stopped="stopped; nothing was written",
    )


def convert(flags: argparse.Namespace) -> int:
    """Check the folders, then import or export; returns the exit status.

    Raises:
        UserError: what cannot be converted; OSError, what cannot be read or written.
    """
    from megatron_eve.convert.usage import check_export_flags, check_import_flags

    check_import_flags(flags) if flags.command == "import" else check_export_flags(flags)
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    run_import(flags) if flags.command == "import" else run_export(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
