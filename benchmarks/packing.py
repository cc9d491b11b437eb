"""Benefit of packing: fraction of real tokens in a batch, and balance of work over data-parallel ranks.

Packed steps are compared with samples padded to the longest of a micro-batch, and balanced packs with samples assigned
in arrival order (rank r of R takes every R-th, as a distributed sampler does), on steps of a manifest of 33M rows.

    python benchmarks/packing.py --seq-length 8192 --steps 20

No model and no pixels are needed: token lengths follow from image sizes and caption lengths. The samples are captioned
photos at 672 pixels (stage 2 of EVE): shapes in about the proportions of web photos and SA-1B (3:2 and 4:3, mostly
landscape, some wide, some square), captions log-normal with a median of 130 tokens (28 GB of JSON for 33M pairs).
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.batch import padded_lengths, padding_multiples
from megatron_eve.data.sampling.packing import assign_packs, pack_step, sample_work
from megatron_eve.data.sampling.permutation import sample_order
from megatron_eve.models.eve.geometry import image_geometry
from megatron_eve.runtime.command_line import command_parser_of

# Width, height, share.
SHAPES = [
    (1500, 1000, 0.34),
    (1000, 1500, 0.10),
    (1600, 1200, 0.24),
    (1200, 1600, 0.10),
    (1920, 1080, 0.12),
    (1080, 1920, 0.02),
    (1000, 1000, 0.08),
]
IMAGE_SIZE = 672
CAPTION_MEDIAN = 130.0
CAPTION_SIGMA = 0.35  # 95 % of the captions have 65 to 260 tokens, the mean is 138
GLOBAL_BATCH_SIZE = 512
PUBLISHED_MICRO_BATCH = 16
MANIFEST_ROWS = 33_000_000


def sample_lengths(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """[count] tokens of captioned photos: begin of text, image rows, caption, newline."""
    rows = np.array([image_geometry(width, height, IMAGE_SIZE).tokens for width, height, _ in SHAPES])
    shares = np.array([share for _, _, share in SHAPES])
    captions = random.lognormal(np.log(CAPTION_MEDIAN), CAPTION_SIGMA, count).astype(np.int64)
    return 2 + random.choice(rows, count, p=shares) + np.maximum(captions, 1)


def padded_share(lengths: NDArray[np.int64]) -> float:
    """Fraction of real tokens if each micro-batch is padded to its longest sample."""
    batches = lengths.reshape(-1, PUBLISHED_MICRO_BATCH)
    return float(batches.sum() / (batches.max(axis=1).sum() * PUBLISHED_MICRO_BATCH))


def packed_shares(
    lengths: NDArray[np.int64], seq_length: int, data_parallel: int, tensor: int, context: int
) -> tuple[float, float, float]:
    """(real tokens / tokens of padded packs, real tokens / capacity, tokens of the slowest rank / mean)."""
    sizes = padded_lengths(lengths, context)
    packs = pack_step(sizes, seq_length, data_parallel)
    _, multiple = padding_multiples(tensor, context)
    totals = [-(-int(sizes[pack].sum()) // multiple) * multiple for pack in packs]
    ranks = [
        sum(int(lengths[pack].sum()) for pack in rank_packs)
        for rank_packs in assign_packs(packs, sizes, data_parallel)
    ]
    real = int(lengths.sum())
    return real / sum(totals), real / (len(packs) * seq_length), max(ranks) * data_parallel / real


def spread(lengths: NDArray[np.int64], seq_length: int, data_parallel: int) -> tuple[float, float]:
    """Work of the slowest rank over the mean, for balanced packs and for arrival order."""
    work = sample_work(lengths)
    assigned = assign_packs(pack_step(lengths, seq_length, data_parallel), lengths, data_parallel)
    ours = [sum(float(work[pack].sum()) for pack in rank_packs) for rank_packs in assigned]
    arrival = [float(work[rank::data_parallel].sum()) for rank in range(data_parallel)]
    mean = float(work.sum()) / data_parallel
    return max(ours) / mean, max(arrival) / mean


def show_spread(steps: int, seq_length: int, random: np.random.Generator) -> None:
    """Print the balance for 2 to 128 ranks, and the time to compute the sample order of a step."""
    lengths = sample_lengths(MANIFEST_ROWS, random)
    seconds, drawn = [], []
    for step in random.integers(0, MANIFEST_ROWS // GLOBAL_BATCH_SIZE, steps):
        positions = np.arange(GLOBAL_BATCH_SIZE, dtype=np.int64) + step * GLOBAL_BATCH_SIZE
        start = time.perf_counter()
        ids = sample_order(positions, MANIFEST_ROWS, 1234, True)
        seconds.append(time.perf_counter() - start)
        drawn.append(lengths[ids])
    print(f"\norder of a step of {GLOBAL_BATCH_SIZE} out of {MANIFEST_ROWS:,} rows: "
          f"{1000 * statistics.median(seconds):.2f} ms, nothing stored")  # fmt: skip
    print(f"{'slowest rank over mean':46} {'balanced':>11} {'arrival':>9}")
    for data_parallel in (2, 4, 8, 16, 32, 64, 128):
        pairs = [spread(some, seq_length, data_parallel) for some in drawn]
        ours, arrival = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{f'DP {data_parallel}':46} {ours:11.4f} {arrival:9.4f}")


def main() -> None:
    """Measure some steps and print a table of medians."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens that a pack may hold")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of {GLOBAL_BATCH_SIZE} samples")
    arguments = parser.parse_args()

    random = np.random.default_rng(0)
    steps = [sample_lengths(GLOBAL_BATCH_SIZE, random) for _ in range(arguments.steps)]
    everything = np.concatenate(steps)
    print(
        f"{arguments.steps} steps of {GLOBAL_BATCH_SIZE} captioned photos at {IMAGE_SIZE} px, "
        f"{everything.mean():.0f} tokens a sample ({everything.min()} .. {everything.max()})"
    )
    print(f"{'':46} {'real tokens':>11} {'pack fill':>9} {'worst rank':>10}")
    padded = statistics.median(padded_share(lengths) for lengths in steps)
    print(f"{f'micro-batches of {PUBLISHED_MICRO_BATCH} padded to the longest':46} {padded:11.4f}")
    for data_parallel, tensor, context in [(1, 1, 1), (4, 2, 1), (4, 8, 1), (8, 2, 2), (8, 4, 4)]:
        shares = [packed_shares(step, arguments.seq_length, data_parallel, tensor, context) for step in steps]
        packed, fill, worst = (statistics.median(column) for column in zip(*shares, strict=True))
        layout = f"packs of {arguments.seq_length}, DP {data_parallel}, TP {tensor}, CP {context}"
        print(f"{layout:46} {packed:11.4f} {fill:9.4f} {worst:10.4f}")

    seconds = []
    for lengths in steps:
        start = time.perf_counter()
        pack_step(lengths, arguments.seq_length, 4)
        seconds.append(time.perf_counter() - start)
    print(f"packing a step of {GLOBAL_BATCH_SIZE}: {1000 * statistics.median(seconds):.1f} ms")
    show_spread(arguments.steps, arguments.seq_length, random)


if __name__ == "__main__":
    main()
