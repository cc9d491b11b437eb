"""How evenly the pipeline stages of a run share its work, and the split of the decoder's layers that is most even.

The first stage has the front end beside its layers, the last one the output layer and the heads of objectives with
their frozen models. All stages wait for the one with most work. Work is counted in FLOPs, as `flops.py` counts them,
in units of one decoder layer, so that sizes of the layers drop out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_eve.config import RunConfig
from megatron_eve.config.pipeline_layout import write_layout
from megatron_eve.models.flops import TRAINED
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.models.stages import stage_of
from megatron_eve.training.loop.data import RunData
from megatron_eve.training.monitoring.flops import decoder_flops, step_work

# Samples of the run that are counted, spread over all of it.
_COUNTED = 4096
# A split that saves less of a step than this is not proposed.
_WORTH = 0.005


class EndCosts(NamedTuple):
    """What the ends of a pipeline compute beside decoder layers, in decoder layers.

    Attributes:
        first: the front end.
        last: the output layer, heads of objectives and their frozen models.
    """

    first: float
    last: float


def end_costs(config: RunConfig, work: Work) -> EndCosts:
    """Forward and backward, of what trains and what is frozen, in layers of this run.

    A front end whose pictures are not shared out runs whole on every rank that shares a pack; one that reads codes is
    tensor parallel, and runs whole on every context-parallel rank. Where all decoder layers are recomputed, a layer has
    its forward pass twice; recomputation in the front end is not known here.

    Args:
        config: of the run.
        work: of samples as the run has them; only their proportions matter.
    """
    family, parallel, training = find_family(config.family), config.parallel, config.training
    decoder = decoder_flops(config.model, work, decoder_trains=stage_of(config).decoder_trains)
    layers = decoder["decoder"] + decoder["attention"]
    if training.recompute_granularity == "full" and training.recompute_method == "uniform":
        trained = decoder_flops(config.model, work, decoder_trains=True)
        layers += (trained["decoder"] + trained["attention"]) // TRAINED
    added = family.flops(config, work)
    if family.reads_codes:
        times = parallel.context_parallel_size
    elif all(use.shared for use in family.views(config).values() if use.stage == "first"):
        times = 1
    else:
        times = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    layer = layers / config.model.num_layers
    return EndCosts(
        first=times * sum(added.front_end.values()) / layer,
        last=(decoder["output_layer"] + sum(added.objectives.values())) / layer,
    )


def even_layers(layers: int, stages: int, costs: EndCosts) -> tuple[float, float]:
    """Layers of the first and of the last stage, as fractions, with which all stages have equal work; at least 0."""
    share = (layers + sum(costs)) / stages
    return max(share - costs.first, 0.0), max(share - costs.last, 0.0)


def best_split(layers: int, stages: int, chunks: int, costs: EndCosts) -> tuple[int, ...]:
    """Layers of each model chunk, in the order of the model, with the least work on the fullest stage.

    Args:
        layers: of the decoder.
        stages: of the pipeline, at least 2.
        chunks: of each stage; 1 without the interleaved schedule.
        costs: of the ends.
    """
    of_stages = _fill([costs.first, *[0.0] * (stages - 2), costs.last], layers)
    split = [0] * (stages * chunks)
    for stage, count in enumerate(of_stages):
        # A stage's chunks wait for those of other stages, so they are evened out, too.
        beside = [0.0] * chunks
        beside[0] += costs.first * (stage == 0)
        beside[-1] += costs.last * (stage == stages - 1)
        split[stage::stages] = _fill(beside, count)
    return tuple(split)


def _fill(beside: Sequence[float], layers: int) -> list[int]:
    """Layers of each place, given what else it has to do: each layer goes where the least work is."""
    counts = [0] * len(beside)
    for _ in range(layers):
        place = min(range(len(beside)), key=lambda i: beside[i] + counts[i])
        counts[place] += 1
    return counts


def wasted(split: Sequence[int], stages: int, costs: EndCosts) -> float:
    """Share of a step, 0 to 1, that the stages on average wait for the fullest one; the pipeline's bubble is beside it.

    The interleaved schedule runs the chunks in turns, so each turn takes as long as its fullest chunk.

    Args:
        split: layers of each model chunk, in the order of the model.
        stages: of the pipeline.
        costs: of the ends.
    """
    work = [float(layers) for layers in split]
    work[0] += costs.first
    work[-1] += costs.last
    turns = sum(max(work[i : i + stages]) for i in range(0, len(work), stages))
    return 1 - sum(work) / stages / turns


def typical_work(config: RunConfig, data: RunData) -> tuple[Work, int]:
    """Work of samples from everywhere in the run, and how many they are; no text and no image is read."""
    count = min(config.total_samples, _COUNTED)
    positions = np.arange(count, dtype=np.int64) * config.total_samples // count
    return step_work(data.dataset, data.order(positions)), count


def describe_balance(config: RunConfig, data: RunData) -> str | None:
    """What the ends of the pipeline cost, what an equal split wastes, and the split that wastes least; two lines.

    A third one where an end alone is more than a stage's share of the work, so that no split helps.

    None without a pipeline.
    """
    stages, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    if stages == 1:
        return None
    work, samples = typical_work(config, data)
    costs = end_costs(config, work)
    chunks = config.virtual_pipeline_model_parallel_size or 1
    best = best_split(layers, stages, chunks, costs)
    equal, now, least = (
        wasted(split, stages, costs)
        for split in (_fill([0.0] * stages * chunks, layers), config.chunk_layers, best)
    )
    virtual = "--num-layers-per-virtual-pipeline-stage"
    instead = f" in place of {virtual}" if config.parallel.num_layers_per_virtual_pipeline_stage else ""
    own, share = max(costs), (layers + sum(costs)) / stages
    proposal = (
        f"least, {_percent(least)}, with --pipeline-model-parallel-layout '{write_layout(best)}'{instead}"
        if now - least > _WORTH
        else "no split wastes much less"
    )
    if own > share:
        which = "last" if own == costs.last else "first"
        proposal += (
            f"\nno split is even: without a layer the {which} stage has {own / share:.1f} times its share of the work; "
            "use --pipeline-model-parallel-size 1 with more tensor-parallel ranks"
        )
    return (
        f"pipeline balance (FLOPs of {samples:,} samples of the run): the front end costs {costs.first:.1f} decoder "
        f"layers on the first stage, the output layer and objectives {costs.last:.1f} on the last\n"
        f"an equal split of {layers} layers wastes {_percent(equal)} of a step, this run's "
        f"({write_layout(config.chunk_layers)}) {_percent(now)}; {proposal}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
