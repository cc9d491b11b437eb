#!/usr/bin/env python
"""Weights from Hugging Face folders to checkpoints of this project, and back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config.early_flags import flag_value
from megatron_eve.models.registry import (
    DEFAULT_FAMILY,
    code_families,
    family_names,
    find_family,
    find_image_codes,
)
from megatron_eve.runtime.command_line import CommandParser
from megatron_eve.runtime.errors import run_command

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.family import ModelFamily
    from megatron_eve.models.image_codes import CodeTower

DESCRIPTION = """\
Weights from Hugging Face folders to checkpoints of this project, and back.

One tensor is held in memory at a time (on export, one file), on the CPU and in one process. Runs of any parallel layout
can read what is written. A folder gets its name when it is whole. The summary accounts for every tensor.

The flags of each: import --help, export --help.
"""
IMPORT_DESCRIPTION = """\
Make a checkpoint of a folder in Hugging Face layout: of a language model (Vicuna, Llama, Qwen2), for stage 1 to start
from, of a model in its published layout, to train on or to ask, or of a tower that makes codes of
pictures, for tokenize_images.py and reconstruct.py.
"""
EXPORT_DESCRIPTION = """\
Make a folder in Hugging Face layout of a checkpoint, whatever parallel layout it was saved under: the published one, or
one for transformers. A tower that makes codes of pictures comes back with every tensor that its folder had.
"""
IMPORT_EXAMPLES = """\
python tools/convert_checkpoint.py import --source vicuna-7b-v1.5 \\
    --target runs/vicuna --dtype bfloat16
python tools/convert_checkpoint.py import --source models/tower \\
    --target runs/tower
"""
EXPORT_EXAMPLES = """\
python tools/convert_checkpoint.py export --source runs/stage3 \\
    --target model-7b --tokenizer vicuna-7b-v1.5
python tools/convert_checkpoint.py export --source runs/stage3 \\
    --target model-7b-hf --tokenizer vicuna-7b-v1.5 --format transformers
python tools/convert_checkpoint.py export --source runs/lora \\
    --target model-7b-lora --format adapter
"""
EXAMPLES = IMPORT_EXAMPLES + EXPORT_EXAMPLES
_DTYPES = ("bfloat16", "float16", "float32")


def build_parser(family: ModelFamily | None, tower: str | None) -> argparse.ArgumentParser:
    """The two commands and their flags.

    Args:
        family: of the model, whose flags are among them; None for a tower that makes codes of pictures.
        tower: the family of such a tower.
    """
    from megatron_eve.convert.usage import DEFAULT_SEED

    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="{import,export}", prog=parser.prog
    )
    incoming = commands.add_parser(
        "import",
        help="a Hugging Face folder -> a checkpoint",
        description=IMPORT_DESCRIPTION,
        examples=IMPORT_EXAMPLES,
    )
    outgoing = commands.add_parser(
        "export",
        help="a checkpoint -> a folder in Hugging Face layout",
        description=EXPORT_DESCRIPTION,
        examples=EXPORT_EXAMPLES,
    )
    for one, source, target in (
        (
            incoming,
            "folder to read, in Hugging Face layout",
            "folder to write, for --pretrained-checkpoint of a run and --model-path of chat.py and generate.py",
        ),
        (
            outgoing,
            "folder to read: what --save of a run or an import wrote, or one iter_ folder in it",
            "folder to write, which must not exist",
        ),
    ):
        one.add_argument("--source", required=True, type=Path, metavar="DIR", help=source)
        one.add_argument("--target", required=True, type=Path, metavar="DIR", help=target)
        one.add_argument(
            "--dtype", choices=_DTYPES, help="data type of the written weights (default: as they are)"
        )
        one.add_argument(
            "--family",
            default=tower if family is None else family.name,
            metavar="NAME",
            help=f"model family, which has flags of its own (default: that of --source, or {DEFAULT_FAMILY})",
        )
        one.add_argument(
            "--dry-run", action="store_true", help="print what would be written, and write nothing"
        )
    incoming.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="N",
        help="seed of weights that the folder does not have, which get random values",
    )
    incoming.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="folder with an adapter (LoRA) that peft trained on the model of --source, to be put on it: a run with "
        "the same --lora-rank, --lora-alpha and --lora-target trains it on (default: no adapter)",
    )
    outgoing.add_argument(
        "--ckpt-step", type=int, metavar="N", help="export this iteration of a run (default: the latest)"
    )
    outgoing.add_argument(
        "--format",
        choices=("published", "transformers", "adapter"),
        default="published",
        help="layout of the folder. published: that of the published model, for its own code; transformers: for "
        "transformers 4.57 and 5, with trust_remote_code=True or after `import megatron_eve.hf`; both have the "
        "adapters of a run with --lora-rank merged into the matrices; adapter: these adapters alone, with what trained "
        "beside the decoder, for peft's PeftModel.from_pretrained",
    )
    outgoing.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.model or tokenizer.json that the data was made with, or its folder; it is copied, and required "
        "with --format transformers (default: the one whose path the checkpoint holds, if it is there and the same)",
    )
    outgoing.add_argument(
        "--max-shard-size",
        default="2GB",
        metavar="SIZE",
        help="largest file of weights, which is also what is held in memory",
    )
    if family is not None:
        family.hugging_face().add_import_flags(incoming)
        family.hugging_face().add_export_flags(outgoing)
    if tower is not None:
        find_image_codes(tower).add_flags(incoming)
    return parser


def chosen_family(argv: Sequence[str] | None) -> tuple[ModelFamily | None, str | None]:
    """The family that --family names, or --source is of, and without either the default one; of a tower that makes
    codes of pictures its name alone.

    Raises:
        ConfigError: --family names another one than the tower's.
        FamilyError: there is none of that name.
    """
    from megatron_eve.config import ConfigError
    from megatron_eve.convert.usage import family_of_source, tower_of_source

    named, source = flag_value(argv, "--family"), flag_value(argv, "--source")
    tower = tower_of_source(Path(source)) if source is not None else None
    if tower is not None and named not in (None, tower):
        raise ConfigError(f"--family {named}: {source} is a tower of the family {tower}; leave --family out")
    if tower is None and named in code_families() and named not in family_names():
        tower = named
    if tower is not None:
        return None, tower
    if named is None and source is not None:
        named = family_of_source(Path(source))
    return find_family(named or DEFAULT_FAMILY), None


def run_import(flags: argparse.Namespace) -> None:
    """Plan, check and write a checkpoint."""
    from megatron_eve.convert.adapter_config import AdapterFolder
    from megatron_eve.convert.folders import check_room
    from megatron_eve.convert.importing import (
        check_finite,
        import_config,
        plan_import,
        write_import,
    )
    from megatron_eve.convert.summary import dry_run_line, size_of, summary
    from megatron_eve.runtime.progress_bar import byte_progress

    family, values = find_family(flags.family), vars(flags)
    frozen = family.hugging_face().import_fingerprint(values)
    config = import_config(flags.source, family, values)
    adapter = AdapterFolder.read(flags.adapter) if flags.adapter else None
    plan = plan_import(flags.source, config, _dtype(flags), flags.seed, adapter)
    if plan.added_rows:
        tokens = ", ".join(family.text_rules.added_tokens)
        print(
            f"{flags.source}: has no rows for all of {tokens}; {plan.added_rows} begin as the mean of the others"
        )
    account = {"dropped": plan.dropped, "initialised": dict.fromkeys(plan.initialised, "not in the folder")}
    check_room(flags.target, size_of(plan.tensors))
    with byte_progress("checking", plan.source_bytes) as done:
        check_finite(flags.source, plan, done)
    if not flags.dry_run:
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write_import(plan, flags.target, frozen, done)
    print(summary(plan.tensors, plan.mapped, account, flags.dry_run))
    if flags.dry_run:
        print(dry_run_line(len(plan.tensors), size_of(plan.tensors), flags.target))


def run_export(flags: argparse.Namespace) -> None:
    """Plan, check and write a folder in Hugging Face layout."""
    from megatron_eve.checkpoint.hf.folder import count_shards
    from megatron_eve.config import ConfigError
    from megatron_eve.convert.adapters import plan_adapter_export, write_adapter_export
    from megatron_eve.convert.exporting import (
        ExportPlan,
        check_tokenizer_files,
        open_checkpoint,
        plan_export,
        write_export,
    )
    from megatron_eve.convert.folders import check_room
    from megatron_eve.convert.summary import dry_run_line, size_of, summary
    from megatron_eve.convert.usage import shard_bytes
    from megatron_eve.data.text.load_tokenizer import load_kind
    from megatron_eve.runtime.progress_bar import byte_progress

    published, shard = flags.format == "published", shard_bytes(flags.max_shard_size)
    tokenizer = load_kind(flags.tokenizer, flags.tokenizer_kind) if flags.tokenizer is not None else None
    image = check_tokenizer_files(tokenizer, published) if tokenizer is not None else None
    checkpoint, config = open_checkpoint(flags.source)
    if config.family != flags.family:
        raise ConfigError(
            f"--family {flags.family}: the checkpoint is of the family {config.family}; leave --family out"
        )
    alone = flags.format == "adapter"
    write: Callable[[Callable[[int], None]], None]
    if alone:
        plan: ExportPlan = plan_adapter_export(checkpoint, config, _dtype(flags), vars(flags))
        write = partial(write_adapter_export, plan, flags.target)
    else:
        plan = plan_export(checkpoint, config, _dtype(flags), published, vars(flags), image)
        write = partial(write_export, plan, flags.target, tokenizer, shard, published)
    account = {"dropped": plan.dropped, "added": plan.added}
    check_room(flags.target, size_of(plan.tensors))
    if not flags.dry_run:
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write(done)
    print(summary(plan.tensors, plan.mapped, account, flags.dry_run))
    if flags.dry_run:
        files = 1 if alone else sum(count_shards(tensors, shard) for tensors in plan.by_folder().values())
        print(dry_run_line(files, size_of(plan.tensors), flags.target))


def convert_tower(flags: argparse.Namespace, tower: CodeTower) -> None:
    """Plan, check and write a checkpoint or a folder of a tower that makes codes of pictures."""
    from megatron_eve.checkpoint.hf.folder import count_shards
    from megatron_eve.convert.folders import check_room
    from megatron_eve.convert.summary import dry_run_line, size_of, summary
    from megatron_eve.convert.towers import (
        check_tower,
        plan_tower_export,
        plan_tower_import,
        write_tower_export,
        write_tower_import,
    )
    from megatron_eve.convert.usage import shard_bytes, tower_folders
    from megatron_eve.runtime.progress_bar import byte_progress

    folders, dtype = tower_folders(flags.family), _dtype(flags)
    write: Callable[[Callable[[int], None]], None]
    if flags.command == "import":
        plan = plan_tower_import(tower, folders, dtype)
        files = len(plan.tensors)
        write = partial(write_tower_import, plan, flags.family, flags.target)
    else:
        published, shard = flags.format == "published", shard_bytes(flags.max_shard_size)
        plan = plan_tower_export(tower, folders, dtype, published)
        files = count_shards(plan.tensors, shard)
        write = partial(write_tower_export, plan, flags.target, shard, published)
    check_room(flags.target, size_of(plan.tensors))
    if flags.command == "import":
        with byte_progress("checking", plan.source_bytes) as done:
            check_tower(plan, done)
    if not flags.dry_run:
        with byte_progress("writing", size_of(plan.tensors)) as done:
            write(done)
    print(summary(plan.tensors, plan.mapped, {"dropped": plan.dropped}, flags.dry_run))
    if flags.dry_run:
        print(dry_run_line(files, size_of(plan.tensors), flags.target))


def _dtype(flags: argparse.Namespace) -> torch.dtype | None:
    import torch

    return getattr(torch, flags.dtype) if flags.dtype else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed here that wants a GPU
    return run_command(
        lambda: convert(*parse(argv)),
        stopped="stopped; nothing was written",
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, bool]:
    """The flags, and whether they are of a tower that makes codes of pictures."""
    family, tower = chosen_family(argv)
    return build_parser(family, tower).parse_args(argv), tower is not None


def convert(flags: argparse.Namespace, of_tower: bool) -> int:
    """Check the folders, then import or export; returns the exit status.

    Raises:
        UserError: what cannot be converted; OSError, what cannot be read or written.
    """
    from megatron_eve.convert.usage import check_export_flags, check_import_flags, check_tower_flags

    tower = check_tower_flags(flags) if of_tower else None
    if tower is None:
        check_import_flags(flags) if flags.command == "import" else check_export_flags(flags)
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    if tower is not None:
        convert_tower(flags, tower)
        return 0
    run_import(flags) if flags.command == "import" else run_export(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
