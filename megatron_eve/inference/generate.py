"""Generation with a key-value cache, under tensor and pipeline parallelism.

Prompts of unequal length and with any number of images run together as one pack; each later step is a pack of one
token a prompt. Both go through megatron-core's forward-only schedule, so a layout that trains also generates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray

from megatron_eve.config import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.data.batch import PackedBatch, build_batch
from megatron_eve.data.dataset import WithoutCodes, planned_tiles
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.mock import MockInfo
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.inference.sampling import GREEDY, Sampling, next_tokens
from megatron_eve.models.decoder.expert_rows import rows_of_text
from megatron_eve.models.decoder.model import ModelInputs, VisionLanguageModel
from megatron_eve.models.decoder.packed import KeyValueCache, packed_params
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.registry import find_family, image_planner
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.training.loop.microbatch import (
    DevicePack,
    decoded_views,
    image_share,
    model_inputs,
    reads_codes,
)

_PATIENCE_MINUTES = 7 * 24 * 60


@dataclass
class Prompt:
    """A prompt to continue.

    Attributes:
        tokens: ids with IMAGE_TOKEN_ID once for each image (see `encode_prompt`).
        images: the image files' bytes, in order.
        codes: of each image, int64 [h, w, D], where the family reads pictures as codes (see `picture_codes.py`).
        key: of its random numbers (see `Sampling.key`).
    """

    tokens: list[int]
    images: list[bytes] = field(default_factory=list)
    key: int = 0
    codes: list[NDArray[np.int64]] = field(default_factory=list)


def generation_config(config: RunConfig, tensor_parallel: int, pipeline_parallel: int) -> RunConfig:
    """The configuration for generation, from that of a run: sizes of the model, and its precision.

    No sequence parallelism (a step of one token has nothing to split), no interleaving, no recomputation, and the
    torch layers, whose attention keeps the cache, without FP8 and without the parts that only training needs; the same
    checkpoints load. The run's data and schedule are left out, since a converted checkpoint has none.
    """
    # A long timeout: ranks may wait for the next question, and torchrun ends them if one is lost.
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        distributed_timeout_minutes=_PATIENCE_MINUTES,
        variable_seq_lengths=True,
    )
    training = TrainingConfig(
        stage=config.training.stage, bf16=config.training.bf16, transformer_impl="local", train_iters=1
    )
    return RunConfig(
        family=config.family,
        model=config.model,
        vision=find_family(config.family).inference_settings(config.vision),
        parallel=parallel,
        training=training,
        lora=config.lora,
        data=DataConfig(mock_data=True),
    )


def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    apply_exif: bool = True,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continue prompts. Collective over all ranks of the model.

    Arguments are those of `generation_steps`.

    Returns:
        New token ids of each prompt, the same on every rank.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for found in generation_steps(
        model,
        prompts,
        config,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        apply_exif=apply_exif,
        sampling=sampling,
    ):
        for sample, token in found:
            answers[sample].append(token)
    return answers


@torch.no_grad()
def generation_steps(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    apply_exif: bool = True,
    sampling: Sampling = GREEDY,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue prompts, a token of each at a time. Collective: every rank takes the same number of steps.

    Args:
        model: this rank's stage, bare, built under `generation_config`.
        prompts: what to continue.
        config: its model, and its family, which plans the images.
        max_new_tokens: stop after so many.
        stop_ids: a token that ends an answer; it is not part of what is given.
        apply_exif: turn pictures upright, as their dataset did.
        sampling: how a token is chosen.
        ended: called with each (index of the prompt, new token id): does the answer end with it? It must say the same
            on every rank.

    Yields:
        (index of the prompt, new token id) of the prompts whose answer did not end before, after each step.
    """
    if not prompts or max_new_tokens < 1:
        return
    model.eval()
    cache = KeyValueCache()
    inputs, positions = prompt_inputs(model, prompts, config, cache, apply_exif)
    active = list(range(len(prompts)))
    for step in range(max_new_tokens):
        keys = [prompts[sample].key for sample in active]
        choose = partial(next_tokens, sampling=sampling, keys=keys, step=step)
        tokens = run_stages(model, inputs, choose, (len(keys),))
        chosen = list(zip(active, tokens.tolist(), strict=True))
        for sample, token in chosen:
            if token in stop_ids:
                cache.drop(sample)
        found = [(sample, token) for sample, token in chosen if token not in stop_ids]
        if not found:
            return
        yield found
        if ended is not None:
            going = [(sample, token) for sample, token in found if not ended(sample, token)]
            for sample in {sample for sample, _ in found} - {sample for sample, _ in going}:
                cache.drop(sample)
            found = going
        if not found:
            return
        active = [sample for sample, _ in found]
        inputs = step_inputs(
            [token for _, token in found], [positions[s] + step for s in active], active, cache
        )
        if config.model.modality_experts:
            inputs.packed.expert_rows = rows_of_text(len(active), accelerator().device)


def prompt_inputs(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    cache: KeyValueCache | None,
    apply_exif: bool = True,
) -> tuple[ModelInputs, list[int]]:
    """Prompts as one pack whose last rows get logits, and how many positions each takes.

    Args:
        model: this rank's stage.
        prompts: in the order of their samples, whose names in the cache are their numbers.
        config: its family plans the images.
        cache: an empty one, which the pack fills; None where no step follows.
        apply_exif: turn pictures upright.
    """
    batch = _prompt_batch(prompts, config, apply_exif)
    inputs = model_inputs(DevicePack(batch), model)
    inputs.packed.cache, inputs.packed.samples = cache, list(range(len(prompts)))
    inputs.labels, inputs.heads = None, {}  # no loss is computed
    inputs.output_rows = (batch.cu_seqlens[1:].long() - 1).to(accelerator().device)
    return inputs, batch.cu_seqlens.diff().tolist()


def run_stages(
    model: VisionLanguageModel,
    inputs: ModelInputs,
    choose_from: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Run one pack through all stages and tell every rank what the last stage finds, as the next tokens. Collective.

    Args:
        model: this rank's stage.
        inputs: the pack.
        choose_from: what the last stage returns (logits [R, W]), the same on all its tensor-parallel ranks -> the
            result.
        shape: of the result, such as [B].
        dtype: of the result.

    Returns:
        `dtype` of `shape`, on the device.
    """

    def forward_step(_: Iterator[None], stage: torch.nn.Module) -> tuple[torch.Tensor, object]:
        def choose(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss = torch.zeros((), device=output.device)  # which the schedule divides
            return loss, choose_from(output)

        return stage(inputs), choose

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=model,
        num_microbatches=1,
        seq_length=1,  # unused: stages exchange shapes
        micro_batch_size=1,
        forward_only=True,
    )
    chosen = results[0] if results else torch.empty(shape, dtype=dtype, device=accelerator().device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            chosen,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return chosen


def step_inputs(
    tokens: list[int], positions: list[int], samples: list[int], cache: KeyValueCache
) -> ModelInputs:
    """A pack of one token a sample, at the position that follows what the cache holds."""
    device = accelerator().device
    count = len(tokens)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device)
    packed = packed_params(bounds, [1] * count, cache, samples)
    packed.max_seqlen_kv = max(positions) + 1
    return ModelInputs(
        packed=packed,
        position_ids=torch.tensor(positions, device=device),
        tokens=torch.tensor(tokens, device=device),
        output_rows=torch.arange(count, device=device),
    )


class _Prompts(WithoutCodes):
    """Prompts with the interface of a dataset, so that the loader's code packs them."""

    def __init__(self, prompts: Sequence[Prompt], config: RunConfig, apply_exif: bool) -> None:
        self.info = MockInfo(
            config.model.vocab_size,
            apply_exif=apply_exif,
            max_pixels=DEFAULT_MAX_PIXELS,
        )
        self.planner = image_planner(config)
        self._prompts = prompts
        self._images = [data for prompt in prompts for data in prompt.images]
        self._codes = [codes for prompt in prompts for codes in prompt.codes]
        sizes = find_family(config.family).code_sizes(config)
        self.code_depth = sizes.depth if sizes else 0
        counts = np.array([len(prompt.images) for prompt in prompts], dtype=np.int64)
        self.samples = np.zeros(len(prompts), dtype=[("first_image", np.int64), ("num_images", np.int32)])
        self.samples["first_image"], self.samples["num_images"] = counts.cumsum() - counts, counts

    def __len__(self) -> int:
        return len(self._prompts)

    def text(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array(self._prompts[index].tokens, dtype=np.int64)
        return tokens, np.full_like(tokens, IGNORE_INDEX)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self._prompts[i].tokens) for i in indices], dtype=np.int64)

    def tile_counts(self, indices: np.ndarray) -> np.ndarray:
        return planned_tiles(self, indices)

    def stored_pixels(self, image: int) -> None:
        """Always None: pictures are files here."""

    def image_bytes(self, image: int) -> bytes:
        return self._images[image]

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of an image, [h, w, D]."""
        return self._codes[image].astype(np.uint16)

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages."""
        return f"prompt {index}"

    def image_name(self, image: int) -> str:
        """Name of an image in messages."""
        return f"image {image} of the prompts"

    def will_need(self, indices: np.ndarray) -> None:
        """Does nothing: all data is in memory."""

    def image_plan(self, image: int) -> ImagePlan:
        picture = decode_image(
            self._images[image], apply_exif=self.info.apply_exif, max_pixels=self.info.max_pixels
        )
        return self.planner(*picture.size)


def _prompt_batch(prompts: Sequence[Prompt], config: RunConfig, apply_exif: bool) -> PackedBatch:
    views, shared_views = decoded_views(config)
    return build_batch(
        _Prompts(prompts, config, apply_exif),
        range(len(prompts)),
        tensor_parallel=1,
        context_parallel=1,
        views=views,
        shared_views=shared_views,
        share=image_share(),
        codes=reads_codes(config),
    )
