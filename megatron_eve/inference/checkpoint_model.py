"""The model of a checkpoint on this rank, as the flags of a command lay it out (see `opening.add_model_flags`).

torch is loaded by the functions that need it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config import RunConfig
from megatron_eve.runtime.errors import UserError
from megatron_eve.runtime.ranks import global_rank, world_size

if TYPE_CHECKING:
    from megatron_eve.models.decoder.model import VisionLanguageModel


def read_saved(folder: Path) -> dict[str, Any]:
    """What `common.pt` of a folder's latest checkpoint holds; empty if it has none that can be read."""
    from megatron_eve.checkpoint.saved_state import read_common
    from megatron_eve.checkpoint.store import CheckpointStore

    try:
        store = CheckpointStore(folder)
        iteration = store.latest()
        saved = read_common(store.folder(iteration)) if iteration is not None else None
    except (OSError, UserError):  # the opening of the model says it
        return {}
    return saved or {}


def checkpoint_config(flags: argparse.Namespace) -> RunConfig:
    """The configuration under which the model of a checkpoint is run, as `add_model_flags` lays it out.

    Raises:
        ConfigError, CheckpointError: a checkpoint that cannot be read, or a layout that its model does not fit.
    """
    from megatron_eve.checkpoint.state import saved_config
    from megatron_eve.config import from_saved, validate
    from megatron_eve.inference.generate import generation_config

    folder = str(flags.model_path)
    saved, note = from_saved(saved_config(folder), folder)
    warn(note)
    saved = replace(saved, training=replace(saved.training, bf16=saved_in_bfloat16(flags.model_path)))
    config = generation_config(
        saved,
        flags.tensor_model_parallel_size,
        flags.pipeline_model_parallel_size,
    )
    validate(config, world_size())
    return config


@contextmanager
def checkpoint_model(flags: argparse.Namespace, config: RunConfig) -> Iterator[VisionLanguageModel]:
    """This rank's stage of a checkpoint's model, with its weights, while its process groups last.

    Args:
        flags: of `add_model_flags`, checked.
        config: of `checkpoint_config`.
    """
    from megatron_eve.checkpoint.files import weights_fingerprint
    from megatron_eve.checkpoint.state import load_weights, saved_common
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import distributed

    checkpoint, _ = saved_common(str(flags.model_path))
    say(f"weights: {checkpoint}, sha256 {weights_fingerprint(checkpoint)}")
    with distributed(config):
        (model,) = build_chunks(config, freeze=False)
        load_weights(str(flags.model_path), [model], config)
        yield model


def saved_in_bfloat16(folder: Path) -> bool:
    """Whether the weights of a folder's latest checkpoint are bfloat16; an import has no run that was told so."""
    import torch

    from megatron_eve.checkpoint.store import CheckpointStore
    from megatron_eve.models.dist_folder import DistFolder

    store = CheckpointStore(folder)
    iteration = store.latest()
    assert iteration is not None, "its configuration was read"
    weights = DistFolder(store.folder(iteration))
    return any(weights.dtype(key) == torch.bfloat16 for key in weights)


def say(line: str) -> None:
    """A line on standard error, once: standard output has the results."""
    if global_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def warn(sentence: str | None) -> None:
    """A warning on standard error, once; None is none."""
    if sentence:
        say(f"warning: {sentence}")
