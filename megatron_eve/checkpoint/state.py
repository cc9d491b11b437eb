"""The contents of a checkpoint, and loading: the latest complete checkpoint, under any parallel layout.

The format is megatron-core's distributed one (`torch_dist`). `saver.py` writes it, `store.py` knows the run's folder,
`files.py` the files of one checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing

from megatron_eve.checkpoint.compatibility import (
    CheckpointError,
    check_resume,
    check_weights,
    rank_layout,
    start_note,
    with_upgraded_config,
)
from megatron_eve.checkpoint.files import checked_bytes, compare_checksums, missing_part
from megatron_eve.checkpoint.optimizer_state import make_moments
from megatron_eve.checkpoint.reading import read_tensors
from megatron_eve.checkpoint.rerun_state import rerun_request, rerun_state_to_save, restore_rerun_state
from megatron_eve.checkpoint.rng_state import restore_rng_state, rng_state
from megatron_eve.checkpoint.store import CheckpointStore, path_to_resume
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord
from megatron_eve.config import TRACKER, RunConfig
from megatron_eve.models.build import unwrap
from megatron_eve.models.decoder.experts import copy_experts
from megatron_eve.models.family import ADAPTERS, EXPERTS, begins_at_random
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.progress_bar import byte_progress
from megatron_eve.runtime.ranks import print_rank_0

# A family may add parameters to some layers only, and optimizer state must load under any layout.
# Pass copies of this: megatron-core adds process groups to the dictionary.
CONTENT = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
# Keys of several networks' optimizers differ by the parameters' names; all have to begin with "optimizer".
CONTENT["chained_optim_avoid_prefix"] = True
_EXTRA = "_extra_state"
# A resumed run follows its own flags in these, not those the checkpoint was written under.
_OWN_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
# Ranks that read a checkpoint synchronise this often, since a slow disk may take longer than a collective waits.
_ROUND_SECONDS = 10.0
# Steps whose losses and gradient norms are kept, for finding spikes.
_RECENT_STEPS = 100


@dataclass(frozen=True)
class TrainState:
    """The train state: position and recent losses of a run.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples seen; with the seed, all the state the data order has.
        recent: losses and gradient norms of the last steps whose update was made, for finding spikes.
        skipped_in_a_row: steps just before this whose update was left out.
    """

    iteration: int = 0
    consumed_samples: int = 0
    recent: tuple[dict[str, float], ...] = ()
    skipped_in_a_row: int = 0

    def after(self, samples: int, values: dict[str, float], skipped: bool) -> TrainState:
        """Where a run stands a step later, which took so many samples."""
        recent = self.recent if skipped else (*self.recent, values)[-_RECENT_STEPS:]
        row = self.skipped_in_a_row + 1 if skipped else 0
        return TrainState(self.iteration + 1, self.consumed_samples + samples, recent, row)


def run_state(
    config: RunConfig,
    train_state: TrainState,
    chunks: Sequence[Any],
    optimizer: Any,
    dataset: dict[str, Any],
    frozen: dict[str, Any] | None,
    tokenizer: TokenizerRecord | None = None,
) -> dict[str, Any]:
    """Everything a checkpoint holds, as megatron-core's sharded state.

    Args:
        config: kept with the checkpoint.
        train_state: where the run stands.
        chunks: this rank's model chunks, wrapped or bare.
        optimizer: megatron-core's.
        dataset: what identifies the data (see `megatron_eve.training.loop.data.RunData`).
        frozen: the fingerprint of the frozen models (see `ModelFamily.fingerprint`).
        tokenizer: of the data (see `tokenizer_of_run`).
    """
    make_moments(optimizer)
    model = _model_state(chunks)
    return {
        "checkpoint_version": 3.0,
        **asdict(train_state),
        "config": config.to_dict(),
        "dataset": dataset,
        "frozen": frozen,
        "tokenizer": tokenizer.to_dict() if tokenizer else None,
        **rerun_state_to_save(),
        **model,
        **_fp8_state(chunks, config.to_dict()),
        "rng_state": rng_state(),
        "optimizer": optimizer.sharded_state_dict(model, is_loading=False, metadata=dict(CONTENT)),
    }


def load_checkpoint(
    config: RunConfig,
    chunks: Sequence[Any],
    optimizer: Any,
    dataset: dict[str, Any],
    frozen: dict[str, Any] | None = None,
) -> TrainState:
    """Resume from `--load`, under any layout. Collective.

    Loads the latest checkpoint; if it is damaged, the newest older one that is not, with a message. One that
    `--ckpt-step`, or the path, names is loaded or refused.

    Returns:
        The saved train state; `TrainState()` if the folder has no checkpoint yet.

    Raises:
        CheckpointError: no checkpoint is whole; or the one that is has another model size, or was made with other
            data, another stage, other globs of `--lr-overrides`, other frozen models.
    """
    path = path_to_resume(config.checkpoint)
    assert path is not None
    folder = _best_checkpoint(CheckpointStore(path))
    if folder is None:
        return TrainState()
    saved = dist_checkpointing.load_common_state_dict(str(folder))
    check_resume(folder, saved, config, dataset, frozen)
    settings = [{name: group.get(name) for name in _OWN_SETTINGS} for group in optimizer.param_groups]
    # Loading replaces the groups, and Adam has other settings on GPUs (TransformerEngine's) than on CPUs (torch's).
    built = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    state = _model_state(chunks)
    request = {
        **state,
        "optimizer": optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(CONTENT)),
    }
    same_layout = rank_layout(saved["config"]) == rank_layout(config.to_dict())
    if same_layout:
        request["rng_state"] = rng_state()
    request |= rerun_request(saved, config)
    if _fp8_state_fits(saved["config"], config.to_dict()):
        request |= _fp8_state(chunks, config.to_dict())
    loaded = read_tensors(request, folder)
    _load_model(chunks, loaded)
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded.get(f"scales{i}", {}), strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    for group, own, defaults in zip(optimizer.param_groups, settings, built, strict=True):
        group.update({**defaults, **group, **own})
    if same_layout:
        restore_rng_state(loaded["rng_state"])
    restore_rerun_state(loaded)
    # Some of these entries are missing in checkpoints of older versions.
    return TrainState(**{name: saved[name] for name in asdict(TrainState()) if name in saved})


def load_weights(folder: str, chunks: Sequence[Any], config: RunConfig) -> None:
    """Read only the weights of a checkpoint folder's latest checkpoint, for another stage or for generation.

    A part of the model that the checkpoint lacks keeps its initial weights; one that the model lacks is not read.

    Raises:
        CheckpointError: no checkpoint, an incomplete one, or another model size.
    """
    path = _latest_folder(folder)
    problem = _problem(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}, so this checkpoint is not whole; {_REMEDY}")
    saved = with_upgraded_config(dist_checkpointing.load_common_state_dict(str(path)))
    lacks_adapters = check_weights(path, saved, config)
    if note := start_note(path, saved["config"]["model"], config.model):
        print_rank_0(note)
    family = find_family(config.family)
    lacking = dict(family.missing_parts(saved, config))
    if lacks_adapters:
        lacking[ADAPTERS] = "holds no adapters, so those of this run begin anew"
    if config.model.modality_experts and not saved["config"]["model"].get("modality_experts"):
        lacking[EXPERTS] = "has no experts, so those of this run begin as copies of its weights"
    state = _model_state(chunks)
    is_fresh: Callable[[str], bool] | None = None
    if lacking:
        is_fresh = partial(begins_at_random, family, lacking=tuple(lacking))
        for reason in lacking.values():
            print_rank_0(f"{path}: {reason}")
        for part in state.values():
            for name in [name for name in part if is_fresh(name)]:
                del part[name]
    _load_model(chunks, read_tensors(state, path), optional=is_fresh)
    if EXPERTS in lacking:
        copy_experts(unwrap(chunk) for chunk in chunks)


def saved_config(folder: str) -> dict[str, Any]:
    """The configuration kept in a folder's latest checkpoint, as nested dictionaries.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    path = _latest_folder(folder) / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{path}: missing, so this checkpoint is not whole; {_REMEDY}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def saved_common(folder: str) -> tuple[Path, dict[str, Any]]:
    """The path of a folder's latest checkpoint, and what its `common.pt` holds; no tensor is read.

    Raises:
        CheckpointError: if there is no checkpoint, or its `common.pt` is not there or cannot be read.
    """
    path = _latest_folder(folder)
    try:
        return path, dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(
            f"{path}: common.pt cannot be read ({type(error).__name__}), so this checkpoint is not whole; {_REMEDY}"
        ) from None


_REMEDY = "name another iteration (--ckpt-step), or restore this one"


def _latest_folder(folder: str) -> Path:
    """The folder of a run's latest checkpoint, or of the named one; it must exist."""
    store = CheckpointStore(folder)
    iteration = store.latest()
    if iteration is None:
        raise CheckpointError(
            f"{store.root}: no {TRACKER} and no iter_ folder there, so no checkpoint; name the folder that --save wrote"
        )
    return store.folder(iteration)


def _best_checkpoint(store: CheckpointStore) -> Path | None:
    """The newest complete checkpoint; None if there is no checkpoint. Collective."""
    candidates: list[list[int]] = [[]]
    if torch.distributed.get_rank() == 0:
        store.recover()
        candidates = [store.candidates()]
        if candidates[0] and store.chosen is None and not (store.root / TRACKER).exists():
            print_rank_0(
                f"warning: {store.root} has no {TRACKER}; going on from the newest whole checkpoint there"
            )
    torch.distributed.broadcast_object_list(candidates, src=0)
    problems: list[str] = []
    for iteration in candidates[0]:
        folder = store.folder(iteration)
        problem = _problem(folder, optimizer=True)
        if problem is None:
            for line in problems:
                print_rank_0(f"{line}; going back to iteration {iteration}")
            return folder
        problems.append(f"{folder}: {problem}")
    if problems and store.chosen is not None:
        raise CheckpointError(f"{problems[0]}, and it was asked for by its number; {_REMEDY}")
    if problems:
        raise CheckpointError(
            f"{'; '.join(problems)}: no checkpoint there is whole; restore one of them, or start anew with another "
            "--load"
        )
    return None


def _problem(folder: Path, *, optimizer: bool = False) -> str | None:
    """The missing part or damaged file of a checkpoint, as a message, the same on every rank. Collective.

    Args:
        folder: of the checkpoint.
        optimizer: also check the optimizer state.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    missing: list[str | None] = [missing_part(folder, optimizer=optimizer) if rank == 0 else None]
    torch.distributed.broadcast_object_list(missing, src=0)
    if missing[0]:
        return missing[0]
    work = compare_checksums(folder, rank, ranks, optimizer=optimizer)
    rounds: list[tuple[bool, str | None]] = [(False, None)] * ranks
    size = checked_bytes(folder, rank, ranks, optimizer=optimizer)
    with byte_progress(f"checking {folder.name}", size) as done:
        while not all(ended for ended, _ in rounds):
            torch.distributed.all_gather_object(rounds, _work_for(_ROUND_SECONDS, work, done))
            problem = next((problem for _, problem in rounds if problem), None)
            if problem:
                return problem
    return None


def _work_for(
    seconds: float, work: Iterator[int | str], done: Callable[[int], None]
) -> tuple[bool, str | None]:
    """Consume `work` (bytes done, or a problem) for some seconds; returns whether it ended, and the first problem."""
    deadline = time.monotonic() + seconds
    for item in work:
        if isinstance(item, str):
            return True, item
        done(item)
        if time.monotonic() > deadline:
            return False, None
    return True, None


def _model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Sharded weights. TransformerEngine's extra state (see `_fp8_state`) stays out, so both layer specs read it."""
    states = {}
    for i, chunk in enumerate(chunks):
        state = unwrap(chunk).sharded_state_dict(metadata=dict(CONTENT))
        states[f"model{i}"] = {name: part for name, part in state.items() if not name.endswith(_EXTRA)}
    return states


def _has_fp8_state(config: dict[str, Any]) -> bool:
    """True if a run of this configuration (a dictionary) has FP8 state that is kept between steps."""
    training = config["training"]
    return training.get("fp8_format") is not None and training.get("fp8_recipe") == "delayed"


def _fp8_state_fits(saved: dict[str, Any], config: dict[str, Any]) -> bool:
    """True if a run can load the FP8 state of a checkpoint.

    State of another format does not fit: its largest gradients are 128 times as large, and TransformerEngine's layers
    would load that format together with the scales, while new scales are computed for the run's own.
    """
    if not (_has_fp8_state(saved) and _has_fp8_state(config)):
        return False
    before, now = saved["training"]["fp8_format"], config["training"]["fp8_format"]
    if before != now:
        print_rank_0(
            f"FP8 scales of --fp8-format {before} do not fit {now}: the first step begins without any"
        )
    return bool(before == now)


def _fp8_state(chunks: Sequence[Any], config: dict[str, Any]) -> dict[str, Any]:
    """The state of FP8's delayed recipe (scales and maxima), which TransformerEngine keeps as the layers' extra state.

    A run that resumes without it would take a scale of 1 in its first step, at which gradients vanish in FP8. It is the
    same on all ranks that hold a layer, so that it fits any layout. Other recipes have no state.
    """
    if not _has_fp8_state(config):
        return {}
    states = {}
    for i, chunk in enumerate(chunks):
        state = unwrap(chunk).sharded_state_dict(metadata=dict(CONTENT))
        states[f"scales{i}"] = {name: part for name, part in state.items() if name.endswith(_EXTRA)}
    return states


def _load_model(
    chunks: Sequence[Any], loaded: dict[str, Any], optional: Callable[[str], bool] | None = None
) -> None:
    for i, chunk in enumerate(chunks):
        # megatron-core leaves out a chunk without weights, which an uneven pipeline layout may have.
        result = unwrap(chunk).load_state_dict(loaded.get(f"model{i}", {}), strict=False)
        missing = [name for name in result.missing_keys if not (optional and optional(name))]
        wrong = [name for name in missing if not name.endswith(_EXTRA)] + result.unexpected_keys
        assert not wrong, f"megatron-core loaded other weights than it was asked for: {wrong}"
