"""Which model answers the requests of tasks: refused before it is opened where it cannot. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eve.checkpoint.files import weights_fingerprint
from megatron_eve.config import ConfigError, from_saved
from megatron_eve.convert.usage import tower_of_source
from megatron_eve.data.text.prompts import drawing_prompt
from megatron_eve.evaluation.answers import TOWER
from megatron_eve.evaluation.picture_answering import PictureAnswering
from megatron_eve.evaluation.picture_tasks import PICTURE_TASKS, PictureTask
from megatron_eve.inference.checkpoint_model import read_saved
from megatron_eve.inference.code_tower import ModelTower, drawn_sizes, model_tower
from megatron_eve.inference.engine import OWN_TEMPLATE
from megatron_eve.inference.engine_choice import check_engine_flags, engine_fingerprint
from megatron_eve.inference.opening import is_exported
from megatron_eve.inference.origin import AnswerOrigin
from megatron_eve.models.registry import find_image_codes
from megatron_eve.runtime.digests import file_digest
from megatron_eve.runtime.ranks import world_size
from megatron_eve.training.monitoring.weight_origin import folder_fingerprint


@dataclass(frozen=True)
class AnsweringModel:
    """What answers.

    Attributes:
        tower: that makes codes of pictures; None of a model without one.
        pictures: answers the tasks of `PICTURE_TASKS`; None without any.
        needs_engine: a language model answers some task; else the tower alone is opened.
    """

    tower: ModelTower | None
    pictures: PictureAnswering | None
    needs_engine: bool

    def origin(self, flags: argparse.Namespace) -> AnswerOrigin:
        """What its answers depend on. It reads the weights, so one rank does.

        Args:
            flags: of the command `answer`, checked.
        """
        name, iteration, sha256 = engine_fingerprint(flags)
        return AnswerOrigin(
            model_path=name,
            iteration=iteration,
            model_sha256=sha256,
            tokenizer_sha256=file_digest(flags.tokenizer_model) if flags.tokenizer_model else None,
            conv_mode=flags.conv_mode,
            max_new_tokens=None,
            apply_exif=not flags.ignore_exif_orientation,
            tower_sha256=self.tower.check_weights() if self.tower else None,
        )

    def data(self) -> dict[str, str]:
        """A digest of the whole tower where answers are pictures, which stands beside the digests of datasets: that of
        the origin is of what makes codes, not pictures.
        """
        if self.pictures is None or self.tower is None:
            return {}
        folder = self.tower.settings.folder
        is_checkpoint = (folder / ".metadata").is_file()
        return {TOWER: weights_fingerprint(folder) if is_checkpoint else folder_fingerprint(folder)}


def find_model(flags: argparse.Namespace, tasks: Sequence[str]) -> AnsweringModel:
    """The model of a command, from its flags, which are filled in as `check_engine_flags` does.

    Args:
        flags: of the command `answer`.
        tasks: that are asked, without groups.

    Raises:
        UserError: a model that cannot answer them; one sentence with the remedy.
    """
    tower = _lone_tower(flags, tasks)
    if tower is not None:
        flags.conv_mode = OWN_TEMPLATE
    else:
        flags.conv_mode = check_engine_flags(flags, flags.conv_mode)
        tower = model_tower(flags, needed=True) if flags.conv_mode != OWN_TEMPLATE else None
    needs_engine = any(name not in PICTURE_TASKS or not PICTURE_TASKS[name].of_tower for name in tasks)
    asked = [PICTURE_TASKS[name] for name in tasks if name in PICTURE_TASKS]
    if asked and not needs_engine and world_size() > 1:
        raise ConfigError(f"--tasks {asked[0].task}: is answered by one process; leave torchrun out")
    return AnsweringModel(tower, _picture_answering(flags, asked, tower) if asked else None, needs_engine)


def _lone_tower(flags: argparse.Namespace, tasks: Sequence[str]) -> ModelTower | None:
    """The tower whose folder `--model-path` names in the place of a model's; None if it names no tower's.

    Raises:
        ConfigError: a task that needs a language model, or a tower that cannot be read.
    """
    family = tower_of_source(flags.model_path) if flags.model_path is not None else None
    if family is None:
        return None
    needy = [name for name in tasks if name not in PICTURE_TASKS or not PICTURE_TASKS[name].of_tower]
    if needy:
        able = ", ".join(name for name, task in PICTURE_TASKS.items() if task.of_tower)
        raise ConfigError(
            f"--model-path {flags.model_path}: is a tower without a language model, which {needy[0]} needs; name a "
            f"model, or ask {able} alone"
        )
    if flags.tower is not None:
        raise ConfigError("--tower: --model-path names the tower itself; leave this out")
    for flag, given in (
        ("--ckpt-step", flags.ckpt_step is not None),
        ("--tokenizer-model", flags.tokenizer_model is not None),
        ("--conv-mode", flags.conv_mode is not None),
        ("--base-url", flags.base_url is not None),
        ("--tensor-model-parallel-size", flags.tensor_model_parallel_size > 1),
        ("--pipeline-model-parallel-size", flags.pipeline_model_parallel_size > 1),
    ):
        if given:
            raise ConfigError(f"{flag}: --model-path names a tower, which has none of it; leave this out")
    return ModelTower(family, find_image_codes(family).read_tower(flags.model_path, vars(flags)))


def _picture_answering(
    flags: argparse.Namespace, asked: Sequence[PictureTask], tower: ModelTower | None
) -> PictureAnswering:
    """What answers tasks that ask for pictures, or classes of pictures.

    Raises:
        ConfigError: a model that draws no pictures or reads no codes.
    """
    if drawn := [task for task in asked if not task.of_tower]:
        _check_draws(flags, drawn[0], flags.conv_mode)
    if tower is None:
        raise ConfigError(
            f"--tasks {asked[0].task}: needs a checkpoint of a model that reads pictures as codes, or the tower of "
            "one, and --model-path names another kind"
        )
    texts = None
    if any(task.kind == "classify" for task in asked):
        texts = find_image_codes(tower.family).text_folder(tower.settings, vars(flags))
    return PictureAnswering(flags.answers, tower, texts, not flags.ignore_exif_orientation)


def _check_draws(flags: argparse.Namespace, task: PictureTask, conv_mode: str) -> None:
    """Refuse a model that does not draw."""
    where = f"--tasks {task.task}: draws pictures"
    if conv_mode == OWN_TEMPLATE or is_exported(flags.model_path):
        raise ConfigError(f"{where}, which a checkpoint of this project does; name one with --model-path")
    saved = read_saved(flags.model_path)
    if "config" not in saved:
        return  # the opening of the model says it
    config, _ = from_saved(saved["config"], str(flags.model_path))
    try:
        drawn_sizes(config)
    except ConfigError as error:
        raise ConfigError(f"{where}; {error}") from None
    try:
        drawing_prompt("", conv_mode)
    except ValueError as error:
        raise ConfigError(f"{where}; --conv-mode {conv_mode}: {error}; name one that does") from None
