"""How long the codes of a position take: each depth once with a cache, or all depths again for every code.

    python benchmarks/drawing.py --preset vila_u_7b --pictures 4

Random weights of the preset's depth transformer on one process; with guidance a picture takes two rows. The codes of
both ways are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config.recipe import parse
from megatron_eve.models.process_groups import distributed
from megatron_eve.models.vila_u.visual_head import VisualHead
from megatron_eve.runtime.accelerator import accelerator


def greedily(logits: torch.Tensor, depth: int) -> torch.Tensor:
    return logits.argmax(-1)


def drawn_without_cache(head: VisualHead, hidden: torch.Tensor) -> torch.Tensor:
    """Codes [R, D], with all depths of every position run for each code."""
    codes = torch.zeros(len(hidden), head.codebook.depth, dtype=torch.int64, device=hidden.device)
    for depth in range(head.codebook.depth):
        sums = head.codebook.cumulative(codes)[:, :-1]
        codes[:, depth] = head.transformer(hidden, sums)[:, depth].argmax(-1)
    return codes


def seconds(work: Callable[[], torch.Tensor], times: int) -> tuple[float, torch.Tensor]:
    found = work()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        found = work()
        if found.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="vila_u_7b")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--times", type=int, default=3)
    flags = parser.parse_args()
    config = parse(["--family", "vila_u", "--preset", flags.preset, "--mock-data", "--train-iters", "1"])
    device = accelerator().device
    transformer = TransformerConfig(
        num_layers=1,
        hidden_size=config.model.hidden_size,
        num_attention_heads=1,
        use_cpu_initialization=device.type == "cpu",
    )
    print("| depths | rows | cache, ms a position | all depths again, ms | ratio |\n|---|---|---|---|---|")
    with distributed(config):
        for depth in flags.depth:
            head = VisualHead(transformer, replace(config.vision, code_depth=depth)).eval()
            for rows in (1, 2 * flags.pictures):
                hidden = torch.randn(rows, config.model.hidden_size, device=device)
                cached, ours = seconds(lambda: head.draw_codes(hidden, greedily), flags.times)
                full, plain = seconds(lambda: drawn_without_cache(head, hidden), flags.times)
                assert ours.equal(plain), "both ways give the same codes"
                print(
                    f"| {depth} | {rows} | {cached * 1e3:.1f} | {full * 1e3:.1f} | {full / cached:.1f} |",
                    flush=True,
                )
            del head


if __name__ == "__main__":
    main()
