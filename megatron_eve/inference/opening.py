"""Which model answers: the flags that the commands have in common, and the engine that they stand for."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_eve.checkpoint.hf.config import refuse_adapter
from megatron_eve.config import TRACKER, ConfigError
from megatron_eve.convert.usage import family_of_source
from megatron_eve.data.text.templates import prompt_templates, templates, without_conversation
from megatron_eve.inference.checkpoint_model import (
    checkpoint_config,
    checkpoint_model,
    read_saved,
    say,
    warn,
)
from megatron_eve.inference.code_tower import ModelTower
from megatron_eve.inference.engine import Engine
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.runtime.command_line import whole_number
from megatron_eve.runtime.errors import UserError, show_error
from megatron_eve.runtime.ranks import world_size

# Of a folder that transformers loads: transformers 5 saves the image processor's settings in the first.
_MODEL, _PROCESSORS = "config.json", ("processor_config.json", "preprocessor_config.json")


def add_model_flags(
    parser: argparse.ArgumentParser, required: bool = True, also: str = ""
) -> argparse._ArgumentGroup:
    """The flags that say which model answers, and under which layout; returns their group.

    Args:
        parser: of the command.
        required: whether `--model-path` is.
        also: further folders that it may name, for its help.
    """
    model = parser.add_argument_group("model", "Which model answers, and on how many processes.")
    add_checkpoint_flags(
        model,
        "folder of the model: a checkpoint (what --save of a run or an import wrote, or one iter_ folder in "
        "it), or a folder for transformers (what tools/convert_checkpoint.py export --format transformers, or "
        f"save_pretrained of model and processor, wrote){also}",
        required,
    )
    model.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="FILE",
        help="tokenizer.model or tokenizer.json that the checkpoint was trained with, or its folder (default: the one "
        "whose path the checkpoint holds, if it is still there and the same; a folder for transformers has its own)",
    )
    model.add_argument(
        "--ignore-exif-orientation",
        action="store_true",
        help="do not rotate images as their EXIF data says; for models whose dataset was made with the same flag",
    )
    return model


def add_checkpoint_flags(group: argparse._ArgumentGroup, folder: str, required: bool = True) -> None:
    """The flags that say which checkpoint a model is of, and under which layout it runs.

    Args:
        group: of the flags.
        folder: the help of `--model-path`.
        required: whether that flag is.
    """
    group.add_argument("--model-path", required=required, type=Path, metavar="DIR", help=folder)
    group.add_argument(
        "--ckpt-step",
        type=whole_number(1),
        metavar="N",
        help="iteration of a run to take (default: the latest)",
    )
    for name, what in (("tensor", "tensor-parallel ranks"), ("pipeline", "pipeline stages")):
        group.add_argument(
            f"--{name}-model-parallel-size",
            type=whole_number(1),
            default=1,
            metavar="N",
            help=f"{what}; more than 1 needs torchrun",
        )


def add_conv_mode_flag(group: argparse._ArgumentGroup) -> None:
    """The flag that says how questions are written."""
    group.add_argument(
        "--conv-mode",
        type=_conv_mode,
        choices=prompt_templates(),
        metavar="NAME",
        help="prompt template, the one that the model was trained with: plain (captions only) before the stage that "
        f"trains on conversations, else one of {', '.join(prompt_templates()[1:])}, of which chat_template is that of "
        "the tokenizer's folder (default: that of the checkpoint's conversations, else that of the last stage of the "
        "model's family)",
    )


def _conv_mode(text: str) -> str:
    if text in templates() and text not in prompt_templates():
        first, *others = prompt_templates()
        raise argparse.ArgumentTypeError(
            f"data of the template {text} is text without questions, which no prompt fits: use {first} or "
            f"{', '.join(others)}, whichever the model was trained on since"
        )
    return text


def is_exported(folder: Path) -> bool:
    """Is it a folder in Hugging Face layout, and no run's?

    Raises:
        ConfigError: it holds an adapter of PEFT alone, with or without a processor.
    """
    refuse_adapter(folder, f"--model-path {folder}", "save_pretrained of model and processor")
    run = (folder / TRACKER).is_file()
    return not run and any((folder / name).is_file() for name in (_MODEL, *_PROCESSORS))


def _lacking(folder: Path) -> str | None:
    """What a folder in Hugging Face layout lacks to be answered from."""
    for names in ((_MODEL,), ("tokenizer.json",), _PROCESSORS):
        if not any((folder / name).is_file() for name in names):
            return names[0]
    return None


def chat_template(folder: Path) -> str:
    """Template of conversations with the model of a folder: of the conversations that a checkpoint was trained on, if
    they had one, or that an export was made for, else its family's. Imports no torch.
    """
    if is_exported(folder) and (written := folder / "chat_template.jinja").is_file():
        from megatron_eve.convert.transformers_folder import template_of_chat_template

        if name := template_of_chat_template(written.read_text(encoding="utf-8", errors="replace")):
            return name
    dataset = read_saved(folder).get("dataset") or {}
    trained = [name for name in dataset.get("templates", ()) if not without_conversation(name)]
    if len(trained) == 1 and trained[0] in prompt_templates():
        return str(trained[0])
    return find_family(family_of_source(folder) or DEFAULT_FAMILY).chat_template()


def check_model_flags(flags: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported, and fill in the checkpoint's folder and its tokenizer.

    Args:
        flags: of `add_model_flags`. Afterwards `model_path` is the folder of one iteration, if one is named, and
            `tokenizer_model` the file to use with a checkpoint.

    Raises:
        ConfigError, CheckpointError: naming the flag and the remedy.
    """
    from megatron_eve.checkpoint.store import CheckpointStore, named_checkpoint

    flags.model_path = named_checkpoint(flags.model_path, flags.ckpt_step, "--model-path")
    exported = is_exported(flags.model_path)
    if not exported and CheckpointStore(flags.model_path).latest() is None:
        raise ConfigError(
            f"--model-path {flags.model_path}: neither a checkpoint (no {TRACKER} there) nor an exported folder (no "
            f"{_MODEL}); name the folder that --save of a run wrote, or one of tools/convert_checkpoint.py, import "
            "or export --format transformers"
        )
    if exported and (lacking := _lacking(flags.model_path)):
        raise ConfigError(
            f"--model-path {flags.model_path}: has no {lacking}; if transformers saved the folder, save the processor "
            "there too (AutoProcessor.from_pretrained(EXPORTED).save_pretrained); of the published layout make a "
            "checkpoint (tools/convert_checkpoint.py import), and name that with its --tokenizer-model"
        )
    if exported and flags.tokenizer_model is not None:
        raise ConfigError(f"--tokenizer-model: {flags.model_path} has a tokenizer of its own; leave this out")
    if flags.tokenizer_model is not None and not flags.tokenizer_model.exists():
        raise ConfigError(f"--tokenizer-model {flags.tokenizer_model}: no such file")
    if exported and max(_ranks(flags), world_size()) > 1:
        raise ConfigError("an exported folder is answered from by one process; several share a checkpoint")
    _check_layout(flags)
    if not exported:
        _choose_tokenizer(flags)


def check_checkpoint_flags(flags: argparse.Namespace) -> None:
    """Refuse what is no checkpoint, or another number of processes, before torch is imported.

    Args:
        flags: of `add_checkpoint_flags`. Afterwards `model_path` is the folder of one iteration, if one is named.

    Raises:
        ConfigError, CheckpointError: naming the flag and the remedy.
    """
    from megatron_eve.checkpoint.store import CheckpointStore, named_checkpoint

    flags.model_path = named_checkpoint(flags.model_path, flags.ckpt_step, "--model-path")
    if is_exported(flags.model_path) or CheckpointStore(flags.model_path).latest() is None:
        raise ConfigError(
            f"--model-path {flags.model_path}: not a checkpoint (no {TRACKER} there); name the folder that --save of "
            "a run wrote, or make a checkpoint of a folder in Hugging Face layout (tools/convert_checkpoint.py import)"
        )
    _check_layout(flags)


def _check_layout(flags: argparse.Namespace) -> None:
    ranks, started = _ranks(flags), world_size()
    if ranks != started:
        raise ConfigError(
            f"--tensor-model-parallel-size x --pipeline-model-parallel-size = {ranks} ranks, but {started} were "
            f"started; use torchrun --nproc-per-node {ranks}"
        )


def _ranks(flags: argparse.Namespace) -> int:
    """Ranks that the flags lay a model out over."""
    ranks: int = flags.tensor_model_parallel_size * flags.pipeline_model_parallel_size
    return ranks


def _choose_tokenizer(flags: argparse.Namespace) -> None:
    """Refuse another tokenizer than the checkpoint's; without `--tokenizer-model`, take the one that it records."""
    from megatron_eve.checkpoint.store import CheckpointStore
    from megatron_eve.checkpoint.tokenizer_record import open_tokenizer

    store = CheckpointStore(flags.model_path)
    iteration = store.latest()
    assert iteration is not None, "there is a checkpoint"
    tokenizer, _ = open_tokenizer(store.folder(iteration), flags.tokenizer_model)
    if flags.tokenizer_model is None:
        say(f"tokenizer: {tokenizer.path}, with which the checkpoint was trained")
    flags.tokenizer_model = Path(tokenizer.path)


def family_title(folder: Path) -> str:
    """What messages call a model of a folder's family; "" where the folder does not say."""
    from megatron_eve.checkpoint.compatibility import family_of
    from megatron_eve.checkpoint.hf.config import HFConfig
    from megatron_eve.checkpoint.saved_state import read_common
    from megatron_eve.checkpoint.store import CheckpointStore
    from megatron_eve.models.registry import find_family

    try:
        if is_exported(folder):
            family = HFConfig.read(folder).family
            return family.hugging_face().title if family else ""
        store = CheckpointStore(folder)
        iteration = store.latest()
        saved = read_common(store.folder(iteration)) if iteration is not None else None
        return find_family(family_of(saved)).hugging_face().title if saved and "config" in saved else ""
    except UserError:  # the opening of the model says it
        return ""


def model_name(folder: Path) -> str:
    """What a model is called: by its folder, and one iteration of a run by the run's folder and its own."""
    folder = folder.resolve()
    one = re.fullmatch(r"iter_\d+", folder.name)
    return f"{folder.parent.name}_{folder.name}" if one else folder.name


def run_with_engine(
    flags: argparse.Namespace,
    conv_mode: str,
    work: Callable[[Engine], int] | None,
    tower: ModelTower | None = None,
) -> int:
    """Open the model and work with it on rank 0, while the other ranks follow.

    Args:
        flags: of `add_model_flags`, checked.
        conv_mode: the template of the prompts.
        work: gets the engine on rank 0, and returns the exit status; None on the other ranks.
        tower: of a model that reads pictures as codes; without it, it is asked about text alone.

    Returns:
        The exit status. A rank that fails ends its process.
    """
    if is_exported(flags.model_path):
        return run_on_rank(lambda: _with_exported(flags, conv_mode, work))
    return run_on_rank(lambda: _with_checkpoint(flags, conv_mode, work, tower))


def run_on_rank(work: Callable[[], int]) -> int:
    """Work on this rank with its signals and errors taken care of; returns the exit status.

    A rank that fails says so in one line and ends its process.
    """
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    from megatron_eve.runtime.ranks import run_rank

    status = 0

    def rank() -> None:
        nonlocal status
        try:
            status = work()
        except (UserError, OSError) as error:
            status = show_error(error)
            if "RANK" in os.environ:  # as run_rank does: others may wait for this rank
                os._exit(status)

    run_rank(rank)
    return status


def _with_exported(flags: argparse.Namespace, conv_mode: str, work: Callable[[Engine], int] | None) -> int:
    from megatron_eve.inference.hf_engine import HFEngine

    assert work is not None, "there is one process"
    say(f"weights: {flags.model_path}, a folder for transformers")
    engine = HFEngine(flags.model_path, conv_mode, apply_exif=not flags.ignore_exif_orientation)
    _check_answer_length(flags, engine.max_length)
    return work(engine)


def _with_checkpoint(
    flags: argparse.Namespace,
    conv_mode: str,
    work: Callable[[Engine], int] | None,
    tower: ModelTower | None,
) -> int:
    from megatron_eve.checkpoint.compatibility import unlike_training
    from megatron_eve.checkpoint.state import saved_common
    from megatron_eve.checkpoint.tokenizer_record import check_tokenizer, tokenizer_kind
    from megatron_eve.data.text.load_tokenizer import load_kind
    from megatron_eve.inference.megatron_engine import MegatronEngine
    from megatron_eve.inference.picture_codes import PictureCodes

    config = checkpoint_config(flags)
    _check_answer_length(flags, config.model.max_position_embeddings)
    checkpoint, common = saved_common(str(flags.model_path))
    tokenizer = load_kind(flags.tokenizer_model, tokenizer_kind(common))
    warn(check_tokenizer(checkpoint, common, tokenizer))
    for sentence in unlike_training(checkpoint, common, conv_mode, not flags.ignore_exif_orientation):
        warn(sentence)
    picture_codes = PictureCodes(tower) if tower and work else None  # refused before the model is loaded
    with checkpoint_model(flags, config) as model:
        engine = MegatronEngine(
            model,
            config,
            tokenizer,
            conv_mode,
            apply_exif=not flags.ignore_exif_orientation,
            picture_codes=picture_codes,
        )
        if work is None:
            engine.follow()
            return 0
        status = work(engine)  # its error ends the process, and torchrun the others'
        engine.dismiss()
        return status


def _check_answer_length(flags: argparse.Namespace, max_length: int) -> None:
    """Refuse an answer that leaves no room for any prompt; without a limit for all answers, each prompt is checked."""
    if flags.max_new_tokens is not None and flags.max_new_tokens >= max_length:
        raise ConfigError(
            f"--max-new-tokens {flags.max_new_tokens}: the model takes {max_length} tokens, prompt and answer "
            "together; ask for fewer"
        )


def show_any_text() -> None:
    """Print characters that the terminal's encoding lacks as escapes, where Python would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
