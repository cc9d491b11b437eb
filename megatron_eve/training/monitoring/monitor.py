"""Reports each iteration (a log line, losses.jsonl for exact comparison, TensorBoard), and sums up a run at its end."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_eve.config import RunConfig
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.training.loop.run import StepSamples
from megatron_eve.training.loop.step_result import StepResult
from megatron_eve.training.monitoring.log_line import LogLine
from megatron_eve.training.monitoring.output_files import JsonLinesFile, TensorBoardWriter, json_line
from megatron_eve.training.monitoring.summary import RunEnd, RunTotals, format_run_summary


class Monitor:
    """Reports on the last rank, which has the losses; does nothing on other ranks.

    Args:
        config: of the run.
        active: True on the rank that reports.
        start: iteration that the run resumes from. Later iterations that a killed run reported stay in losses.jsonl,
            where the last line of an iteration is valid; TensorBoard drops them.
        epoch_samples: samples of the training data, None if it has no size.
    """

    def __init__(self, config: RunConfig, active: bool, start: int, epoch_samples: int | None = None) -> None:
        self._config = config
        self.active = active
        self._started = self._begun = time.perf_counter()
        self._line = LogLine(
            config.total_iterations, config.total_samples, epoch_samples, gpu=accelerator().name == "cuda"
        )
        self._totals = RunTotals()
        self._reported: tuple[dict[str, Any], StepResult] | None = None
        self._losses: Any = None
        self._held_out: Any = None
        self._board: Any = None
        if active and config.checkpoint.save:
            self._losses = JsonLinesFile(Path(config.checkpoint.save) / "losses.jsonl")
            if config.training.eval_interval:
                self._held_out = JsonLinesFile(Path(config.checkpoint.save) / "valid_losses.jsonl")
        if active and config.logging.tensorboard_dir:
            self._board = TensorBoardWriter(config.logging.tensorboard_dir, start)

    def start(self) -> None:
        """Start the timer of an iteration."""
        self._started = time.perf_counter()

    def report(
        self,
        iteration: int,
        consumed_samples: int,
        step: StepSamples,
        result: StepResult,
        learning_rate: float,
        flops: float,
    ) -> None:
        """Take note of an iteration that just ended, for `write`.

        Args:
            iteration, consumed_samples: after this iteration.
            step: the iteration's data.
            result: of the iteration.
            learning_rate: of parameters without their own learning rate.
            flops: model FLOPs of the iteration on each rank (see `training/monitoring/flops.py`).
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
            **{name.replace(" ", "_"): value for name, value in result.figures.items()},
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.bad is not None,
            "samples": len(step.sample_ids),
            # The same in two runs that had the same samples in the same order.
            "sample_ids_sha256": hashlib.sha256(step.sample_ids.astype("<i8").tobytes()).hexdigest()[:16],
            **step.counts,
            "seconds": seconds,
            "tflops_per_gpu": flops / seconds / 1e12,
        }
        self._reported = record, result

    def write(self, data_wait: float, peak_memory: float) -> None:
        """Write what `report` took note of: losses.jsonl, TensorBoard and, if one is due, a log line.

        Args:
            data_wait: seconds that the slowest rank waited for data in this iteration.
            peak_memory: bytes, of the rank with most, see `peak_memory`.
        """
        if self._reported is None:
            return
        (record, result), self._reported = self._reported, None
        record |= {"data_wait_seconds": data_wait, "peak_memory_bytes": int(peak_memory)}
        self._line.add(record)
        self._totals.add(record, result.losses, result.figures)
        if self._losses:
            self._losses.add(record)
        if self._board:
            values = [name.replace(" ", "_") for name in (*result.losses, *result.figures)]
            scalars = {
                name: record[name]
                for name in (*values, "lr", "grad_norm", "pack_fill", "tflops_per_gpu", "data_wait_seconds")
                if name in record
            }
            scalars["step_seconds"] = record["seconds"]
            scalars["peak_memory_gib"] = peak_memory / 2**30
            scalars["samples_per_second"] = record["samples"] / record["seconds"]
            for name in ("tokens", "codes"):
                if name in record:
                    scalars[f"{name}_per_second"] = record[name] / record["seconds"]
            self._board.add(scalars, record["iteration"])
        if self.is_due(record["iteration"]) or result.bad:
            print(self._line.text(result.losses, datetime.now()), flush=True)

    def is_due(self, iteration: int) -> bool:
        """True if a log line is printed after this iteration."""
        return iteration % self._config.logging.log_interval == 0

    def report_bad_step(
        self, iteration: int, result: StepResult, step: StepSamples, names: list[str]
    ) -> None:
        """Print what is wrong with a step, and list its samples in bad_steps.jsonl.

        Args:
            iteration: of the step.
            result: of the step.
            step: its data.
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
                    stream.write(json_line(record))
            except OSError as error:  # such as a full disk, which must not end this rank alone
                print(f" {path} could not be written ({error.strerror}): {record}", flush=True)
        print(f" iteration {iteration}: {reason}; its update is not made", flush=True)

    def print_summary(self, end: RunEnd) -> None:
        """Print what the run added up to and how it ended; see `RunEnd`, whose `seconds` are filled in here."""
        if self.active:
            end = replace(end, seconds=time.perf_counter() - self._begun)
            print(format_run_summary(self._config, self._totals, end), flush=True)

    def report_held_out(self, iteration: int, name: str, losses: dict[str, float]) -> None:
        """Report an evaluation of one dataset: a log line, valid_losses.jsonl, TensorBoard ("... validation/NAME")."""
        if not self.active:
            return
        self._totals.held_out[name] = losses
        values = {loss.replace(" ", "_"): value for loss, value in losses.items()}
        if self._held_out:
            self._held_out.add({"iteration": iteration, "dataset": name, **values})
        if self._board:
            self._board.add({f"{loss} validation/{name}": value for loss, value in values.items()}, iteration)
        formatted = "".join(f" {loss} value: {value:.6E} |" for loss, value in losses.items())
        language = NextToken.name
        if language in losses:
            perplexity = math.exp(losses[language]) if losses[language] < 20.0 else math.inf
            formatted += f" {language} PPL: {perplexity:.6E} |"
        print(f" validation loss at iteration {iteration} on {name} |{formatted}", flush=True)

    def close(self) -> None:
        """Close all files."""
        for writer in (self._losses, self._held_out, self._board):
            if writer:
                writer.close()
