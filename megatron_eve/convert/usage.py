"""Mistakes in the flags of tools/convert_checkpoint.py that are found without torch."""

from __future__ import annotations

import argparse
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import yaml

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.hf.config import HFConfig
from megatron_eve.checkpoint.saved_state import read_common
from megatron_eve.checkpoint.store import CheckpointStore, named_checkpoint
from megatron_eve.checkpoint.tokenizer_record import open_tokenizer
from megatron_eve.config import TRACKER, ConfigError
from megatron_eve.convert.adapter_config import AdapterFolder
from megatron_eve.convert.folders import check_target, source_tokenizer
from megatron_eve.models.image_codes import CodeTower, TowerFolders
from megatron_eve.models.registry import code_families, find_family, find_image_codes
from megatron_eve.runtime.errors import UserError

# As transformers and huggingface_hub spell sizes; the binary ones are those of older transformers.
_UNITS = {
    f"{prefix}{kind}": (1024 if kind == "IB" else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for kind in ("B", "IB")
}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]I?B)", re.ASCII)


def shard_bytes(size: str) -> int:
    """Bytes of a `--max-shard-size`, such as "2GB", "500MB" or "1.5GiB".

    Raises:
        ConfigError: no size, or less than a byte.
    """
    found = _SIZE.fullmatch(size.strip().upper())
    count = int(Fraction(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise ConfigError(
            f"--max-shard-size {size}: is no size; give a number above 0 and a unit, such as 2GB, 500MB or 5GiB"
        )
    return count


def family_of_source(source: Path) -> str | None:
    """The family that a folder is of, by its config.json or by the settings of its latest checkpoint.

    Returns:
        None where it does not say: a language model alone, or a folder that cannot be read, which later checks judge.
    """
    try:
        found = HFConfig.read(source).family
        return found.name if found else None
    except ConfigError:
        pass
    store = CheckpointStore(source)
    try:
        iteration = store.latest()
        if iteration is None:
            return None
        settings = yaml.safe_load((store.folder(iteration) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError, yaml.YAMLError):
        return None
    name = settings.get("family") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def tower_of_source(source: Path) -> str | None:
    """The family whose tower a folder is, published or a checkpoint; None where it is none."""
    for name in code_families():
        folders = find_image_codes(name).folders
        if folders is not None and folders.is_tower(source):
            return name
    return None


def tower_folders(family: str) -> TowerFolders:
    """The folders of a family's towers.

    Raises:
        ConfigError: its towers are not converted.
    """
    folders = find_image_codes(family).folders
    if folders is None:
        raise ConfigError(f"--family {family}: its towers have no folders that are converted")
    return folders


DEFAULT_SEED = 1234
"""`--seed` of an import."""
# Flags of the command, with their defaults, that mean something of models alone.
_OF_MODELS = {"seed": DEFAULT_SEED, "adapter": None, "tokenizer": None, "tokenizer_kind": None}


def check_tower_flags(flags: argparse.Namespace) -> CodeTower:
    """Refuse what the flags and folders of a tower's conversion alone show to be wrong.

    Args:
        flags: of the command. Afterwards `source` is the folder of one iteration, if an export names one.

    Returns:
        The tower, as its folder describes it.

    Raises:
        ConfigError, CheckpointError: naming the flag or the folder, and the remedy.
    """
    folders, incoming = tower_folders(flags.family), flags.command == "import"
    for name, default in _OF_MODELS.items():
        if getattr(flags, name, default) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')}: {flags.source} is a tower, which has none; leave it out"
            )
    if incoming:
        _check_folders(flags)
        check_target(flags.target)
        if folders.is_tower(flags.source) and not folders.is_published(flags.source):
            raise ConfigError(f"--source {flags.source}: is a checkpoint already; name a published folder")
    else:
        if flags.format == "adapter":
            raise ConfigError("--format adapter: a tower has no adapters; choose published or transformers")
        shard_bytes(flags.max_shard_size)
        flags.source = named_checkpoint(flags.source, flags.ckpt_step, "--source")
        _check_export_folders(flags)
    return find_image_codes(flags.family).read_tower(flags.source, vars(flags))


def check_import_flags(flags: argparse.Namespace) -> None:
    """Refuse what an import's flags and folders alone show to be wrong.

    Raises:
        ConfigError: naming the flag and the remedy.
    """
    if not 0 <= flags.seed < 2**63:
        raise ConfigError(f"--seed {flags.seed}: must be 0 or more, and below 2^63")
    for problem in find_family(flags.family).hugging_face().check_import_flags(vars(flags)):
        raise ConfigError(problem)
    _check_folders(flags)
    check_target(flags.target)
    if flags.adapter is not None:
        AdapterFolder.read(flags.adapter)
    found = HFConfig.read(flags.source)
    family = find_family(flags.family)
    if found.family in (None, family):  # another one is refused with the weights
        family.hugging_face().import_settings(found.fields, flags.source, vars(flags))
    text = family.text_rules
    rows = found.model_config().vocab_size
    source_tokenizer(found.language_folder, rows, text.tokenizer_legacy, text.added_tokens)


def check_export_flags(flags: argparse.Namespace) -> None:
    """Refuse what an export's flags and folders alone show to be wrong, and fill in the checkpoint and its tokenizer.

    Args:
        flags: of the command. Afterwards `source` is the folder of one iteration, if one is named, `tokenizer` the file
            that is exported, or None, and `tokenizer_kind` how it is read.

    Raises:
        ConfigError, CheckpointError: naming the flag or the folder, and the remedy.
    """
    published = flags.format == "published"
    for problem in find_family(flags.family).hugging_face().check_export_flags(published, vars(flags)):
        raise ConfigError(problem)
    shard_bytes(flags.max_shard_size)
    flags.source = named_checkpoint(flags.source, flags.ckpt_step, "--source")
    _check_export_folders(flags)
    iteration = CheckpointStore(flags.source).latest()
    if iteration is None:
        raise CheckpointError(
            f"{flags.source}: no checkpoint there; name the folder that --save of a run, or an import, wrote"
        )
    if flags.format == "adapter":
        if flags.tokenizer is not None:
            raise ConfigError("--tokenizer: the folder of an adapter has none; leave it out")
        saved = read_common(CheckpointStore(flags.source).folder(iteration)) or {}
        if not saved.get("config", {}).get("lora", {}).get("lora_rank"):
            raise ConfigError(
                f"--format adapter: {flags.source} was made without adapters (--lora-rank); export its weights with "
                "--format published or transformers"
            )
        return
    _choose_tokenizer(flags, CheckpointStore(flags.source).folder(iteration), needed=not published)


def _choose_tokenizer(flags: argparse.Namespace, checkpoint: Path, needed: bool) -> None:
    """Refuse another tokenizer than the checkpoint's; where one is needed, the one that it records stands in."""
    try:
        tokenizer, warning = open_tokenizer(checkpoint, flags.tokenizer, "--tokenizer")
    except ConfigError as error:
        if flags.tokenizer is not None:
            raise
        if not needed:
            return
        raise ConfigError(
            "--format transformers: the processor needs a tokenizer; add --tokenizer DIR: "
            + str(error).removeprefix("--tokenizer: ")
        ) from None
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if flags.tokenizer is None:
        print(f"tokenizer: {tokenizer.path}, with which the checkpoint was trained", file=sys.stderr)
    flags.tokenizer, flags.tokenizer_kind = Path(tokenizer.path), tokenizer.kind


def _check_export_folders(flags: argparse.Namespace) -> None:
    """Is the source no model folder, and the target new?"""
    _check_folders(flags)
    if flags.target.exists() or flags.target.is_symlink():
        raise ConfigError(f"{flags.target}: exists already; choose another --target")
    if not (flags.source / TRACKER).is_file() and (flags.source / "config.json").is_file():
        raise ConfigError(
            f"--source {flags.source}: is a model in Hugging Face layout already; an export takes a checkpoint, the "
            "folder that --save of a run, or an import, wrote"
        )


def _check_folders(flags: argparse.Namespace) -> None:
    """Is the source there, and can the target be made?"""
    source, target = flags.source, flags.target
    if source.exists() and not source.is_dir():
        raise ConfigError(f"--source {source}: is a file; name its folder")
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ConfigError(f"--target {target}: is the --source; choose another --target")
    parent = next((place for place in target.absolute().parents if place.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ConfigError(f"--target {target}: {parent} is a file, not a folder; choose another --target")
    if parent is not None and not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--target {target}: {parent} cannot be written to; choose another --target")
