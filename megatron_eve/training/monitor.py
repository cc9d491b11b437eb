"""What a run says of itself: a log line an iteration, losses.jsonl for exact comparison, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_eve.config import RunConfig
from megatron_eve.data.loader import Step
from megatron_eve.training.step import StepResult


class Monitor:
    """Reports on the last rank, which holds the losses; silent elsewhere.

    Args:
        config: of the run.
        active: True on the rank that reports.
        start: iteration that the run goes on from. Iterations after it that a killed run reported stay in
            losses.jsonl, where the last line of an iteration counts; TensorBoard drops them.
    """

    def __init__(self, config: RunConfig, active: bool, start: int) -> None:
        self._config = config
        self.active = active
        self._started = time.perf_counter()
        self._losses: Any = None
        self._held_out: Any = None
        self._board: Any = None
        if active and config.checkpoint.save:
            Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
            self._losses = _open_lines(Path(config.checkpoint.save) / "losses.jsonl")
            if config.training.eval_interval:
                self._held_out = _open_lines(Path(config.checkpoint.save) / "valid_losses.jsonl")
        if active and config.logging.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(config.logging.tensorboard_dir, purge_step=start + 1)

    def start(self) -> None:
        """Begin to time an iteration."""
        self._started = time.perf_counter()

    def report(
        self,
        iteration: int,
        consumed_samples: int,
        step: Step,
        result: StepResult,
        learning_rate: float,
        flops: float,
    ) -> None:
        """Report an iteration that just ended.

        Args:
            iteration, consumed_samples: where the run stands now.
            step: what the iteration held.
            result: what came of it.
            learning_rate: of parameters without a rate of their own.
            flops: model FLOPs of the iteration on each rank (see `training/flops.py`).
        """
        if not self.active:
            return
        seconds = time.perf_counter() - self._started
        values = {name.replace(" ", "_"): loss for name, loss in result.losses.items()}
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            **values,
            **{f"{name}_hex": value.hex() for name, value in values.items()},
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.bad is not None,
            "samples": len(step.sample_ids),
            # Two runs that agree in this saw the same samples in the same order.
            "sample_ids_sha256": hashlib.sha256(step.sample_ids.astype("<i8").tobytes()).hexdigest()[:16],
            "tokens": step.num_tokens,
            "labels": step.num_labels,
            "images": step.num_images,
            "seconds": seconds,
            "pack_fill": step.capacity_fraction,
            "tflops_per_gpu": flops / seconds / 1e12,
        }
        if self._losses:
            self._losses.write(json.dumps(record) + "\n")
            self._losses.flush()
        if self._board:
            for name in (*values, "lr", "grad_norm", "pack_fill", "tflops_per_gpu"):
                self._board.add_scalar(name, record[name], iteration)
            self._board.add_scalar("samples_per_second", len(step.sample_ids) / seconds, iteration)
            self._board.add_scalar("tokens_per_second", step.num_tokens / seconds, iteration)
        if self.is_due(iteration) or result.bad:
            print(self._line(record), flush=True)

    def is_due(self, iteration: int) -> bool:
        """Is there a log line after this iteration?"""
        return iteration % self._config.logging.log_interval == 0

    def report_bad_step(self, iteration: int, result: StepResult, step: Step, names: list[str]) -> None:
        """Say what is wrong with a step, and list its samples in bad_steps.jsonl.

        Args:
            iteration: of the step.
            result: what came of it.
            step: what it held.
            names: of its samples.
        """
        reason = result.bad or "not the same when it was run again"
        if self._config.checkpoint.save:
            record = {
                "iteration": iteration,
                "reason": reason,
                "update": "stopped" if result.exit_code else "skipped",
                **{name.replace(" ", "_"): value for name, value in result.values.items()},
                "samples": dict(zip(step.sample_ids.tolist(), names, strict=True)),
            }
            path = Path(self._config.checkpoint.save) / "bad_steps.jsonl"
            try:
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
            except OSError as error:  # a full disk must not end one rank alone
                print(f" {path} could not be written ({error.strerror}): {record}", flush=True)
        print(f" iteration {iteration}: {reason}; its update is not made", flush=True)

    def _line(self, record: dict[str, Any]) -> str:
        seconds = record["seconds"]
        aligning = f" align loss: {record['align_loss']:.6E} |" if "align_loss" in record else ""
        return (
            f" iteration {record['iteration']:8d}/{self._config.total_iterations:8d} |"
            f" consumed samples: {record['consumed_samples']:12d} |"
            f" elapsed time per iteration (ms): {1000 * seconds:.1f} |"
            f" learning rate: {record['lr']:.6E} |"
            f" global batch size: {record['samples']:5d} |"
            f" lm loss: {record['lm_loss']:.6E} |{aligning}"
            f" grad norm: {record['grad_norm']:.3f} |{' update skipped |' * record['skipped']}"
            f" samples/s: {record['samples'] / seconds:.1f} |"
            f" tokens/s: {record['tokens'] / seconds:.0f} |"
            f" pack fill: {record['pack_fill']:.3f} |"
            f" throughput per GPU (TFLOP/s/GPU): {record['tflops_per_gpu']:.4g} |"
        )

    def report_held_out(self, iteration: int, name: str, losses: dict[str, float]) -> None:
        """Report an evaluation of one dataset: a log line, valid_losses.jsonl, TensorBoard ("... validation/NAME")."""
        if not self.active:
            return
        values = {loss.replace(" ", "_"): value for loss, value in losses.items()}
        if self._held_out:
            self._held_out.write(json.dumps({"iteration": iteration, "dataset": name, **values}) + "\n")
            self._held_out.flush()
        if self._board:
            for loss, value in values.items():
                self._board.add_scalar(f"{loss} validation/{name}", value, iteration)
        told = "".join(f" {loss} value: {value:.6E} |" for loss, value in losses.items())
        perplexity = math.exp(losses["lm loss"]) if losses["lm loss"] < 20.0 else math.inf
        print(
            f" validation loss at iteration {iteration} on {name} |{told} lm loss PPL: {perplexity:.6E} |",
            flush=True,
        )

    def close(self) -> None:
        """Finish writing."""
        for writer in (self._losses, self._held_out, self._board):
            if writer:
                writer.close()


def _open_lines(path: Path) -> TextIO:
    """A file of lines, to append to; what a kill left of a line is taken off."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def print_rank_0(text: str) -> None:
    """Print once a run."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)
