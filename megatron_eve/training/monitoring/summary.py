"""The summary that closes a run: what it did, where it was saved, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eve.config import RunConfig
from megatron_eve.config.validate import same_folder
from megatron_eve.data.text.templates import without_conversation
from megatron_eve.models.registry import find_family, tower_family
from megatron_eve.models.stages import stage_of


@dataclass
class RunTotals:
    """What this process's part of a run added up to.

    Attributes:
        steps: iterations done, skipped updates included.
        samples, tokens, bad_steps: of these.
        first_losses, last_losses: by the name of the objective; of one that began later, the first that it had.
        figures: of the last step, by name.
        held_out: of the last evaluation, by dataset.
        first_seconds: duration of the first step, which compiles kernels and allocates memory.
        seconds: of the later ones.
        later_tokens: of the later ones.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    bad_steps: int = 0
    first_losses: Mapping[str, float] = field(default_factory=dict)
    last_losses: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    held_out: dict[str, Mapping[str, float]] = field(default_factory=dict)
    first_seconds: float = 0.0
    seconds: float = 0.0
    later_tokens: int = 0

    def add(
        self,
        record: Mapping[str, Any],
        losses: Mapping[str, float],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Add a step: its line of losses.jsonl, its losses, and what else is logged of it."""
        self.first_losses = {**losses, **self.first_losses}  # a loss may begin later
        if self.steps == 0:
            self.first_seconds = record["seconds"]
        else:
            self.seconds += record["seconds"]
            self.later_tokens += record["tokens"]
        self.last_losses, self.figures = losses, figures or {}
        self.steps += 1
        self.samples += record["samples"]
        self.tokens += record["tokens"]
        self.bad_steps += record["skipped"]


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        reason: why it ended before its last iteration; None if it did all.
        start, iteration: the iteration it started from, and the last one.
        consumed_samples: after the last one.
        saved: iteration of the last checkpoint that it wrote; None if it wrote none.
        left_out: samples of the training data that no pack can hold.
        placeholders: damaged images that were replaced.
        seconds: from the first step to the end, with evaluations and checkpoints.
    """

    reason: str | None
    start: int
    iteration: int
    consumed_samples: int
    saved: int | None
    left_out: int
    placeholders: int
    seconds: float = 0.0


def format_run_summary(config: RunConfig, totals: RunTotals, end: RunEnd) -> str:
    """The summary, a row for each subject; see `RunTotals` and `RunEnd`."""
    rows = list(_rows(config, totals, end))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _rows(config: RunConfig, totals: RunTotals, end: RunEnd) -> Iterator[tuple[str, str]]:
    save, load = config.checkpoint.save, config.checkpoint.load
    yield "run ended", end.reason or "all iterations are done"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    resumed = f", resumed from {load} at iteration {end.start}" if end.start else ""
    resumed += f", restart {restarts} of the Slurm job" if restarts != "0" else ""
    yield "iterations", f"{totals.steps:,} done, {end.iteration:,} of {config.total_iterations:,}{resumed}"
    yield "samples", f"{totals.samples:,} ({end.consumed_samples:,} of {config.total_samples:,})"
    yield "tokens", f"{totals.tokens:,}"
    yield "wall time", f"{_clock(end.seconds)} from the first step to the end"
    if totals.steps > 1:
        later = totals.seconds / (totals.steps - 1)
        yield (
            "step time",
            f"{1000 * later:.1f} ms on average ({totals.later_tokens / totals.seconds:,.0f} tokens/s), "
            f"without the first step's {1000 * totals.first_seconds:.1f} ms",
        )
    for name, last in totals.last_losses.items():
        yield name, f"{totals.first_losses[name]:.6f} at first, {last:.6f} at last"
    yield from _numbered(totals.figures)
    for name, values in totals.held_out.items():
        yield f"held out, {name}", ", ".join(f"{loss} {value:.6g}" for loss, value in values.items())
    yield (
        "left out",
        f"{end.left_out:,} samples that no pack can hold, {end.placeholders:,} damaged images replaced by "
        f"placeholder images, {totals.bad_steps:,} updates of bad steps",
    )
    if save is None:
        yield "saved", "nothing: no --save was given"
        return
    yield (
        "saved",
        f"{save}, iteration {end.saved}" if end.saved is not None else "no checkpoint by this start",
    )
    if end.consumed_samples < config.total_samples:
        again = "the same command" if same_folder(load, save) else f"the same command with --load {save}"
        kept = end.saved if end.saved is not None else end.start
        yield "next", f"{again} goes on from iteration {kept}" if kept else f"{again} starts again"
    else:
        yield from _next_steps(config)


def _numbered(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """A row for each figure; those whose names differ in a number at the end, such as that of a depth, on one."""
    rows: dict[str, list[float]] = {}
    for name, value in figures.items():
        rows.setdefault(name.rstrip("0123456789").rstrip(), []).append(value)
    for name, values in rows.items():
        yield name, f"{', '.join(f'{value:.4g}' for value in values)} at last"


def _next_steps(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What to do with a run that is complete: the next training stage, and a first question; or pictures of a tower."""
    if tower_family(config.family):
        yield (
            "try it",
            f"python tools/reconstruct.py --tower {config.checkpoint.save} --input PHOTO --output SHEET.png",
        )
        return
    following = config.training.stage + 1
    if following in find_family(config.family).stages:
        yield (
            "next stage",
            f"python -m megatron_eve.pretrain --stage {following} --pretrained-checkpoint {config.checkpoint.save} "
            "--save ANOTHER_FOLDER ...",
        )
    if not config.data.mock_data:
        asks = not without_conversation(stage_of(config).template)
        tool = "chat.py" if asks else "generate.py --conv-mode plain"
        more = (
            "--image PHOTO"
            if asks
            else "--question-file QUESTIONS --image-folder FOLDER --answers-file ANSWERS"
        )
        yield (
            "try it",
            f"python tools/{tool} --model-path {config.checkpoint.save} "
            f"--tokenizer-model {config.data.tokenizer_model or 'TOKENIZER'} {more}",
        )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
