"""How close hidden states of pictures and text are, at each depth of the decoder: the deep-alignment curve.

By such a curve the paper arXiv 2312.07533 explains why the decoder has to train with pictures, and not the projector
alone: rows of pictures and of text then get closer in the deep layers, too.

Shapes: T = tokens of a sample with its pictures expanded, V = its picture rows, N = its text rows, D = decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import build_batch
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.inference.alignment_curve import Cosines
from megatron_eve.models.decoder.model import ModelInputs, VisionLanguageModel
from megatron_eve.training.loop.microbatch import (
    DevicePack,
    decoded_views,
    image_rows,
    image_share,
    model_inputs,
)

Measure = Callable[[int, torch.Tensor], None]
"""Gets a depth and the hidden states [T, 1, D] there."""


@torch.no_grad()
def layer_cosines(
    model: VisionLanguageModel,
    config: RunConfig,
    dataset: AnyDataset,
    samples: Sequence[int],
    done: Callable[[str | None], None],
) -> dict[int, Cosines]:
    """Measure samples one by one. Collective over all ranks of the model.

    Args:
        model: this rank's stage, bare, built under `generation_config`.
        config: of the model.
        dataset: where the samples lie, opened for this model.
        samples: which of them; each has pictures and text.
        done: called after each sample, with a sentence where one of its pictures could not be decoded, else None.

    Returns:
        By depth (0: what enters the decoder, n: what leaves its layer n), means over the samples; on every rank.
    """
    model.eval()
    views, shared_views = decoded_views(config)
    sums: dict[int, list[float]] = {}
    for sample in samples:
        batch = build_batch(
            dataset,
            [sample],
            tensor_parallel=1,
            context_parallel=1,
            views=views,
            shared_views=shared_views,
            share=image_share(),
        )
        pictures = image_rows(batch.image_starts, batch.image_rows)
        is_text = torch.ones(len(batch.tokens), dtype=torch.bool)
        is_text[pictures] = False

        def measure(
            depth: int, hidden: torch.Tensor, pictures: Any = pictures, is_text: Any = is_text
        ) -> None:
            rows = hidden[:, 0].cpu()
            both, total = cosines(rows[pictures], rows[is_text]), sums.setdefault(depth, [0.0, 0.0])
            total[0], total[1] = total[0] + both.mean, total[1] + both.nearest

        inputs = model_inputs(DevicePack(batch), model)
        inputs.labels, inputs.heads = None, {}  # no loss is computed
        if inputs.output_rows is not None:
            inputs.output_rows = inputs.output_rows[:1]  # logits are not looked at
        with _measured(model, measure):
            _run(model, inputs)
        done(next(iter(batch.damaged.values()), None))
    means = {depth: Cosines(*(some / len(samples) for some in total)) for depth, total in sums.items()}
    return _of_all_stages(means)


def cosines(pictures: torch.Tensor, text: torch.Tensor) -> Cosines:
    """The cosines of two sets of hidden states.

    Args:
        pictures: [V, D], V > 0.
        text: [N, D], N > 0.
    """
    pairs = _unit(pictures) @ _unit(text).T  # (V, N)
    nearest = (pairs.amax(0).mean() + pairs.amax(1).mean()) / 2
    return Cosines(mean=float(pairs.mean()), nearest=float(nearest))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@contextmanager
def _measured(model: VisionLanguageModel, measure: Measure) -> Iterator[None]:
    """Measure what enters the decoder, on its first stage, and what leaves each layer of this rank."""
    decoder = model.decoder
    with ExitStack() as hooks:
        if model.pre_process:
            hooks.callback(
                decoder.register_forward_pre_hook(
                    lambda _, __, given: measure(0, given["hidden_states"]), with_kwargs=True
                ).remove
            )
        for layer in decoder.layers:
            hooks.callback(
                # A layer gives its hidden states and a context.
                layer.register_forward_hook(
                    lambda layer, _, given: measure(layer.layer_number, given[0])
                ).remove
            )
        yield


def _run(model: VisionLanguageModel, inputs: ModelInputs) -> None:
    """Run one pack through all stages."""

    def forward_step(_: Iterator[None], stage: torch.nn.Module) -> tuple[torch.Tensor, object]:
        return stage(inputs), lambda logits: (logits.new_zeros(()), logits)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=model,
        num_microbatches=1,
        seq_length=1,  # unused: stages exchange shapes
        micro_batch_size=1,
        forward_only=True,
    )


def _of_all_stages(means: dict[int, Cosines]) -> dict[int, Cosines]:
    """The depths of all pipeline stages; tensor-parallel ranks have measured the same."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, means)
    return dict(sorted({depth: some for part in found for depth, some in part.items()}.items()))
