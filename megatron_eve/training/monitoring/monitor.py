"""Reports each iteration: a log line, losses.jsonl for exact comparison, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.loader import Step
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.training.loop.step_result import StepResult

_LONGEST_LINE = 1 << 20  # bytes of a line in losses.jsonl or valid_losses.jsonl


class Monitor:
    """Reports on the last rank, which has the losses; does nothing on other ranks.

    Args:
        config: of the run.
        active: True on the rank that reports.
        start: iteration that the run resumes from. Later iterations that a killed run reported stay in losses.jsonl,
            where the last line of an iteration is valid; TensorBoard drops them.
    """

    def __init__(self, config: RunConfig, active: bool, start: int) -> None:
        self._config = config
        self.active = active
        self._started = time.perf_counter()
        self._losses: Any = None
        self._held_out: Any = None
        self._board: Any = None
        if active and config.checkpoint.save:
            self._losses = _JsonLinesFile(Path(config.checkpoint.save) / "losses.jsonl")
            if config.training.eval_interval:
                self._held_out = _JsonLinesFile(Path(config.checkpoint.save) / "valid_losses.jsonl")
        if active and config.logging.tensorboard_dir:
            self._board = _TensorBoardWriter(config.logging.tensorboard_dir, start)

    def start(self) -> None:
        """Start the timer of an iteration."""
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
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.bad is not None,
            "samples": len(step.sample_ids),
            # The same in two runs that had the same samples in the same order.
            "sample_ids_sha256": hashlib.sha256(step.sample_ids.astype("<i8").tobytes()).hexdigest()[:16],
            "tokens": step.num_tokens,
            "labels": step.num_labels,
            "images": step.num_images,
            "seconds": seconds,
            "pack_fill": step.capacity_fraction,
            "tflops_per_gpu": flops / seconds / 1e12,
        }
        if self._losses:
            self._losses.add(record)
        if self._board:
            scalars = {
                name: record[name] for name in (*values, "lr", "grad_norm", "pack_fill", "tflops_per_gpu")
            }
            scalars["samples_per_second"] = len(step.sample_ids) / seconds
            scalars["tokens_per_second"] = step.num_tokens / seconds
            self._board.add(scalars, iteration)
        if self.is_due(iteration) or result.bad:
            print(self._line(record, result.losses), flush=True)

    def is_due(self, iteration: int) -> bool:
        """True if a log line is printed after this iteration."""
        return iteration % self._config.logging.log_interval == 0

    def report_bad_step(self, iteration: int, result: StepResult, step: Step, names: list[str]) -> None:
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
                    stream.write(_json_line(record))
            except OSError as error:  # such as a full disk, which must not end this rank alone
                print(f" {path} could not be written ({error.strerror}): {record}", flush=True)
        print(f" iteration {iteration}: {reason}; its update is not made", flush=True)

    def _line(self, record: dict[str, Any], losses: dict[str, float]) -> str:
        seconds = record["seconds"]
        named = "".join(f" {name}: {loss:.6E} |" for name, loss in losses.items())
        return (
            f" iteration {record['iteration']:8d}/{self._config.total_iterations:8d} |"
            f" consumed samples: {record['consumed_samples']:12d} |"
            f" elapsed time per iteration (ms): {1000 * seconds:.1f} |"
            f" learning rate: {record['lr']:.6E} |"
            f" global batch size: {record['samples']:5d} |"
            f"{named}"
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
            self._held_out.add({"iteration": iteration, "dataset": name, **values})
        if self._board:
            self._board.add({f"{loss} validation/{name}": value for loss, value in values.items()}, iteration)
        formatted = "".join(f" {loss} value: {value:.6E} |" for loss, value in losses.items())
        language = NextToken.name
        perplexity = math.exp(losses[language]) if losses[language] < 20.0 else math.inf
        print(
            f" validation loss at iteration {iteration} on {name} |{formatted} {language} PPL: {perplexity:.6E} |",
            flush=True,
        )

    def close(self) -> None:
        """Close all files."""
        for writer in (self._losses, self._held_out, self._board):
            if writer:
                writer.close()


class _OutputFile:
    """An output file of a run. A failed write does not end the run; it is reported once.

    Args:
        path: of the file or folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._failed = path, False

    def _try(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._failed:
                reason = error.strerror or error
                print(f" {self._path} could not be written ({reason}); the run goes on", flush=True)
            self._failed = True
            return False
        return True


class _JsonLinesFile(_OutputFile):
    """A file of JSON lines, opened for appending; an incomplete last line (after a kill or a full disk) is cut off."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: TextIO | None = None
        self._try(self._open)

    def add(self, record: dict[str, Any]) -> None:
        """Append a line. If it cannot be written completely, the file is reopened for the next line."""
        if not self._try(lambda: self._write(_json_line(record))):
            self.close()

    def close(self) -> None:
        stream, self._file = self._file, None
        if stream:
            self._try(stream.close)

    def _open(self) -> None:
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as stream:
                begin = max(0, stream.seek(0, os.SEEK_END) - _LONGEST_LINE)
                stream.seek(begin)
                os.truncate(path, begin + stream.read(_LONGEST_LINE).rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def _write(self, line: str) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.write(line)
        self._file.flush()


class _TensorBoardWriter(_OutputFile):
    """TensorBoard's event file; iterations after `start` are dropped. After a failed write nothing more is written.

    Not torch's SummaryWriter, whose writer thread ends with a traceback when the disk is full.
    """

    def __init__(self, folder: str, start: int) -> None:
        super().__init__(folder)
        self._file: BinaryIO | None = None
        if not self._try(lambda: self._begin(start)):
            self.close()

    def add(self, values: dict[str, float], iteration: int) -> None:
        """Add a value to each of these scalars."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        if self._file and not self._try(lambda: self._write({"step": iteration, "summary": points})):
            self.close()

    def close(self) -> None:
        stream, self._file = self._file, None
        if stream:
            self._try(stream.close)

    def _begin(self, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder = Path(self._path)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files of this name, sorted by name; host and PID separate runs that start at the same time.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write({"file_version": "brain.Event:2"})
        # TensorBoard drops earlier events of this iteration and of later ones.
        self._write({"step": start + 1, "session_log": SessionLog(status=SessionLog.START)})

    def _write(self, fields: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def _json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON; NaN and infinity, which JSON lacks, become null."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: clean(value) for name, value in record.items()}, allow_nan=False) + "\n"
