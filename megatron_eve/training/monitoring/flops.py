"""Model FLOPs of one optimizer step, for TFLOP/s/GPU and MFU: the whole model, at true lengths.

Counted is what the published model computes, independent of the code, the layout and the packing.
The decoder is counted here, what a family adds to it in its folder, under the same conventions:

- Matrix products and attention products, a multiply-add as 2. Norms, softmax, activations, biases, poolings
  and losses are not counted, nor are lookups.
- Forward and backward. Backward is twice forward: the gradient of the input and that of the weight. A frozen
  matrix has only the first, pixels have none, and frozen target models run forward only. Attention products have no
  weight but two inputs, so that their backward is twice forward in a frozen decoder too. Recomputation is never
  counted.
- Tokens of samples, not of packs: no padding. Causal attention has the pairs that exist, ``n (n + 1) / 2`` for a
  sample of n tokens. The output layer has the rows with a label, and the tokenizer's own vocabulary.
- Modules in their published form: an equivalent computation that saves work does not lower the figure.
- Where the decoder is frozen, the gradient passes through it at every token, as in a pack that holds an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config import LoRAConfig, RunConfig
from megatron_eve.config.lora_checks import projection_sizes
from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.dataset import VisionDataset
from megatron_eve.models.flops import FROZEN, TRAINED, attention, decoder_layer, matrix
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.models.stages import stage_of


def step_work(dataset: VisionDataset, sample_ids: Sequence[int] | NDArray[np.int64]) -> Work:
    """Count tokens, labels and images of samples from their records alone; no text and no image is read.

    Args:
        dataset: where the samples lie.
        sample_ids: [n] rows of the dataset, as in `Step.sample_ids`; one that comes twice counts twice.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    samples, lengths = dataset.samples[ids], dataset.lengths(ids)
    plans = [
        dataset.image_plan(image)
        for first, count in zip(samples["first_image"].tolist(), samples["num_images"].tolist(), strict=True)
        for image in range(first, first + count)
    ]
    return Work(
        tokens=int(lengths.sum()),
        attended=int((lengths * (lengths + 1) // 2).sum()),
        labels=int(samples["labels"].sum()),
        images=sum(plan.tiles for plan in plans),
        merged_patches=sum(plan.tiles * plan.grid[0] * plan.grid[1] for plan in plans),
        image_rows=sum(plan.rows for plan in plans),
        visual_labels=int(dataset.visual_labels(ids).sum()),
    )


def model_flops(config: RunConfig, work: Work) -> dict[str, float]:
    """FLOPs of a step, forward and backward, by part of the model; add them up for the total.

    The conventions stand at the top of this module. The time of a step in seconds times the number of GPUs divides
    the sum to FLOP/s/GPU.

    Args:
        config: of the run.
        work: what the step holds, on all ranks.

    Returns:
        The family's front end, the decoder (see `decoder_flops`), its adapters if it has any, the family's objectives.
    """
    family = find_family(config.family).flops(config, work)
    stage = stage_of(config)
    decoder = decoder_flops(
        config.model, work, decoder_trains=stage.decoder_trains, experts_train=stage.experts_train
    )
    adapters = {"adapters": adapter_flops(config.model, config.lora, work)} if config.lora.enabled else {}
    parts = {**family.front_end, **decoder, **adapters, **family.objectives}
    return {part: float(flops) for part, flops in parts.items()}


def decoder_flops(
    model: ModelConfig, work: Work, *, decoder_trains: bool, experts_train: bool = False
) -> dict[str, int]:
    """FLOPs of "decoder" (its matrices), "attention" (its products) and "output_layer".

    Args:
        model: sizes.
        work: what the step holds.
        decoder_trains: False where decoder, token embedding and output layer are frozen.
        experts_train: with `--modality-experts`, True where those that work on rows of images are not.
    """
    factor = TRAINED if decoder_trains else FROZEN
    experts = (TRAINED if experts_train else FROZEN) if model.modality_experts else factor
    rows = factor * (work.tokens - work.image_rows) + experts * work.image_rows
    return {
        "decoder": rows * model.num_layers * decoder_layer(model),
        "attention": TRAINED * model.num_layers * attention(work.attended, model.hidden_size),
        "output_layer": factor * work.labels * matrix(model.hidden_size, model.vocab_size),
    }


def adapter_flops(model: ModelConfig, lora: LoRAConfig, work: Work) -> int:
    """FLOPs of the adapters' two matrices, in all layers; they train."""
    sizes = projection_sizes(model)
    token = sum(matrix(sum(sizes[name]), lora.lora_rank or 0) for name in lora.lora_target)
    return TRAINED * work.tokens * model.num_layers * token
