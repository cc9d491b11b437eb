#!/usr/bin/env python
"""Weights from Hugging Face folders to checkpoints of this project, and back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.runtime.errors import run_command

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Weights from Hugging Face folders to checkpoints of this project, and back.

  import    a language model (Vicuna, Llama, Qwen2) -> a start for stage 1
            an EVE in the published layout          -> a checkpoint to go on from, or to ask
  export    a checkpoint of any layout              -> the published EVE layout, or a folder for transformers

One tensor passes at a time (on export, one shard), on the CPU and in one process; any layout reads what is written. A
folder gets its name when it is whole. Every tensor is accounted for in the summary.
"""
EPILOG = """\
examples:
  python tools/convert_checkpoint.py import --source vicuna-7b-v1.5 --target runs/vicuna \\
      --teacher-model clip-vit-large-patch14-336 --dtype bfloat16
  python tools/convert_checkpoint.py export --source runs/stage3 --target eve-7b --tokenizer vicuna-7b-v1.5
  python tools/convert_checkpoint.py export --source runs/stage3 --target eve-7b-hf --tokenizer vicuna-7b-v1.5 \\
      --format transformers
"""
_DTYPES = ("bfloat16", "float16", "float32")


def build_parser() -> argparse.ArgumentParser:
    """The two commands and their flags."""
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
        one.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    _add_import_flags(incoming)
    outgoing.add_argument(
        "--format",
        choices=("published", "transformers"),
        default="published",
        help="published: for the public code of EVE. transformers: for transformers 4.57 and 5, with "
        "trust_remote_code=True, or after `import megatron_eve.hf` without it (default: %(default)s)",
    )
    outgoing.add_argument(
        "--teacher-model",
        type=Path,
        metavar="DIR",
        help="CLIP's folder: write it and the aligning layer, too, as the published folders have them, for training on "
        "with the public code; asking needs neither",
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
    return parser


def _add_import_flags(incoming: argparse.ArgumentParser) -> None:
    incoming.add_argument(
        "--teacher-model",
        metavar="DIR",
        help="CLIP's folder, whose sizes the aligning layer gets and whose hashes are recorded; it is not copied. "
        "Without it the checkpoint has no aligning layer, which a run with --patch-aligning then begins at random",
    )
    incoming.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python files in the teacher's folder run, for towers that transformers does not know (EVA-CLIP); no "
        "other code of a folder ever runs",
    )
    incoming.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="672, or 1344 for the HD model (default: as the folder says, or 672)",
    )
    incoming.add_argument(
        "--patch-embedding-size",
        type=int,
        default=1024,
        metavar="C",
        help="width of the patch embedding that a language model gets (default: %(default)s)",
    )
    incoming.add_argument(
        "--seed", type=int, default=1234, help="of weights that begin at random (default: %(default)s)"
    )


def run_import(flags: argparse.Namespace) -> None:
    """Plan, check and write a checkpoint."""
    from megatron_eve.convert.importing import (
        check_finite,
        import_config,
        plan_import,
        write_import,
    )
    from megatron_eve.convert.report import size_of, summary
    from megatron_eve.convert.usage import teacher_settings
    from megatron_eve.models.eve.teacher import teacher_identity
    from megatron_eve.runtime.progress_bar import byte_progress

    front, identity = {"patch_embedding_size": flags.patch_embedding_size}, None
    if flags.teacher_model:
        tower = teacher_settings(flags).tower()
        front |= {"teacher_size": tower.geometry_size, "teacher_hidden_size": tower.hidden_size}
        identity = teacher_identity(flags.teacher_model)
    config = import_config(flags.source, flags.image_size, flags.teacher_model is not None, front)
    plan = plan_import(flags.source, config, _dtype(flags), flags.seed)
    account = {"dropped": plan.dropped, "initialised": dict.fromkeys(plan.initialised, "not in the folder")}
    if not flags.dry_run:
        with byte_progress("checking", plan.source_bytes) as done:
            check_finite(flags.source, plan, done)
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write_import(plan, flags.target, identity, done)
    print(summary(plan.tensors, plan.mapped, account, every=flags.dry_run))


def run_export(flags: argparse.Namespace) -> None:
    """Plan, check and write a folder in Hugging Face layout."""
    from megatron_eve.checkpoint.compatibility import check_tokenizer
    from megatron_eve.checkpoint.state import saved_common
    from megatron_eve.convert.exporting import open_checkpoint, plan_export, write_export
    from megatron_eve.convert.report import size_of, summary
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
    plan = plan_export(checkpoint, config, _dtype(flags), flags.teacher_model, published)
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
    flags = build_parser().parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed here that wants a GPU
    try:
        return run_command(lambda: convert(flags))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


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
