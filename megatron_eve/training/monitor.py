"""What a run says of itself: a log line an iteration, losses.jsonl for exact comparison, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from megatron_eve.config import RunConfig
from megatron_eve.data.loader import Step


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
        self._active = active
        self._started = time.perf_counter()
        self._losses: Any = None
        self._board: Any = None
        if active and config.checkpoint.save:
            Path(config.checkpoint.save).mkdir(parents=True, exist_ok=True)
            self._losses = (Path(config.checkpoint.save) / "losses.jsonl").open("a", encoding="utf-8")
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
        losses: dict[str, torch.Tensor],
        learning_rate: float,
        grad_norm: float,
    ) -> None:
        """Report an iteration that just ended (losses are read here, which waits for the device)."""
        if not self._active:
            return
        seconds = time.perf_counter() - self._started
        loss = float(losses["lm loss"])
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "lm_loss": loss,
            "lm_loss_hex": loss.hex(),
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "samples": len(step.sample_ids),
            "tokens": step.num_tokens,
            "labels": step.num_labels,
            "images": step.num_images,
            "seconds": seconds,
            "pack_fill": step.capacity_fraction,
        }
        if self._losses:
            self._losses.write(json.dumps(record) + "\n")
            self._losses.flush()
        if self._board:
            for name in ("lm_loss", "lr", "grad_norm", "pack_fill"):
                self._board.add_scalar(name, record[name], iteration)
            self._board.add_scalar("samples_per_second", len(step.sample_ids) / seconds, iteration)
            self._board.add_scalar("tokens_per_second", step.num_tokens / seconds, iteration)
        if iteration % self._config.logging.log_interval == 0:
            print(self._line(record), flush=True)

    def _line(self, record: dict[str, Any]) -> str:
        seconds = record["seconds"]
        return (
            f" iteration {record['iteration']:8d}/{self._config.total_iterations:8d} |"
            f" consumed samples: {record['consumed_samples']:12d} |"
            f" elapsed time per iteration (ms): {1000 * seconds:.1f} |"
            f" learning rate: {record['lr']:.6E} |"
            f" global batch size: {record['samples']:5d} |"
            f" lm loss: {record['lm_loss']:.6E} |"
            f" grad norm: {record['grad_norm']:.3f} |"
            f" samples/s: {record['samples'] / seconds:.1f} |"
            f" tokens/s: {record['tokens'] / seconds:.0f} |"
            f" pack fill: {record['pack_fill']:.3f} |"
        )

    def close(self) -> None:
        """Finish writing."""
        for writer in (self._losses, self._board):
            if writer:
                writer.close()


def print_rank_0(text: str) -> None:
    """Print once a run."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)
