"""The run's samples, their order and its loader, checked against the configuration before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_eve.config import RunConfig, parse_split
from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.interface import ImageDecoder
from megatron_eve.data.mock import MockDataset
from megatron_eve.data.opening import check_code_tower, check_split, open_datasets, pack_limits
from megatron_eve.data.pixels import decode_settings
from megatron_eve.data.sampling.cache import cached_array
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.data.sampling.orders import (
    BlendedOrder,
    DatasetSlice,
    GroupedOrder,
    Order,
    ShuffledOrder,
    by_modality,
    split_dataset,
)
from megatron_eve.models.registry import find_family, image_planner
from megatron_eve.models.shapes import fixed_length
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.ranks import global_rank
from megatron_eve.runtime.transfer import Uploader
from megatron_eve.training.loop.microbatch import decoded_views, image_share, reads_codes

MOCK_SAMPLES = 4096


@dataclass(frozen=True)
class RunData:
    """The data of a run: what it trains on, and what it is evaluated on.

    Attributes:
        dataset: all samples; those of several datasets are numbered consecutively.
        order: gives the sample at each position of the run.
        training: the part of each dataset that is trained on.
        held_out: the held-out part of each dataset that has one, for evaluation.
        fingerprint: properties of the data and its order that must be the same when a run resumes.
        dropped: a message for each dataset with samples that are too large for a pack; these are left out.
    """

    dataset: VisionDataset
    order: Order
    training: tuple[DatasetSlice, ...]
    held_out: tuple[DatasetSlice, ...]
    fingerprint: dict[str, Any]
    dropped: tuple[str, ...] = ()


def open_data(config: RunConfig) -> RunData:
    """Open `--data-path` and `--valid-data-path` (or make `--mock-data`), and check that this run can train on them.

    Raises:
        DataError: damaged files; another tokenizer, vocabulary or image size; a split, or samples that no pack can
            hold, leave nothing of a dataset; incompatible datasets.
        ConfigError: a flag that cannot be read.
    """
    data = config.data
    if data.mock_data:
        mock = MockDataset(
            MOCK_SAMPLES,
            vocab_size=config.model.vocab_size,
            planner=image_planner(config),
            seq_length=pack_limits(config).longest,
            seed=config.training.seed,
            codes=find_family(config.family).code_sizes(config),
        )
        return data_in_memory(config, mock)
    opened = open_datasets(config)
    dataset, training = opened.joined(), opened.training
    if global_rank() == 0:
        check_code_tower(config, opened.codes)
    modalities = partial(
        cached_array,
        data.data_cache_path,
        _cache_name(opened.datasets[: len(training)], training),
        partial(by_modality, dataset.samples, training),
    )
    order = _order(config, training, opened.weights, modalities)
    return RunData(dataset, order, training, opened.held_out, opened.fingerprint, opened.dropped)


def data_in_memory(config: RunConfig, dataset: VisionDataset) -> RunData:
    """Data of a run on a dataset without files (`--mock-data`), split and ordered by the configuration."""
    training, held_out = split_dataset("mock", 0, len(dataset), parse_split(config.data.split))
    check_split(config, "the mock dataset", training, held_out)
    fingerprint = {
        "samples": [len(dataset)],
        "tokens": [int(dataset.lengths(np.arange(len(dataset))).sum())],
        "tokenizer_sha256": "mock",
        "shares": [],
    }
    order = _order(config, [training], None, partial(by_modality, dataset.samples, [training]))
    return RunData(dataset, order, (training,), (held_out,) if len(held_out) else (), fingerprint)


def _order(
    config: RunConfig,
    parts: Sequence[DatasetSlice],
    weights: Sequence[float] | None,
    modalities: Callable[[], NDArray[np.int64]],
) -> Order:
    """The sample order that the flags select; `modalities` computes the input of `GroupedOrder`."""
    seed, shuffle = config.training.seed, config.data.shuffle
    if config.data.group_by_modality:
        return GroupedOrder(parts, modalities(), config.training.global_batch_size, seed)
    if weights:
        return BlendedOrder(parts, weights, seed, shuffle)
    return ShuffledOrder(parts, seed, shuffle)


def _cache_name(datasets: Sequence[AnyDataset], parts: Sequence[DatasetSlice]) -> str:
    """Cache name for data computed from these parts; a copy of a dataset in another place gets another name."""
    digest = hashlib.sha256()
    for dataset, part in zip(datasets, parts, strict=True):
        for path in dataset.sample_files:
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns} ".encode())
        digest.update(f"{part}{part.dropped_fingerprint()}\n".encode())
    return f"modalities-{digest.hexdigest()[:32]}"


def open_run_decoder(config: RunConfig, data: RunData) -> ImageDecoder:
    """The decoder of a run's images, on this rank's device."""
    device = accelerator().device
    return open_decoder(
        config.data.image_decoder,
        decode_settings(data.dataset),
        threads=config.data.num_workers,
        gpu=device.index if device.type == "cuda" else None,
    )


def build_loader(config: RunConfig, data: RunData) -> StepLoader:
    """This rank's loader. Packs come in multiples of the pipeline size under the interleaved schedule."""
    parallel = config.parallel
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    views, shared_views = decoded_views(config)
    return StepLoader(
        data.dataset,
        data.order,
        global_batch_size=config.training.global_batch_size,
        seq_length=config.data.seq_length,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        pack_multiple=parallel.pipeline_model_parallel_size if interleaved else 1,
        tensor_parallel=parallel.tensor_model_parallel_size,
        context_parallel=parallel.context_parallel_size,
        row_multiple=config.row_multiple,
        fixed_length=fixed_length(config),
        max_images=config.data.max_images_per_pack,
        image_work=find_family(config.family).image_work(config),
        visual_label_work=find_family(config.family).visual_label_work(config),
        views=views,
        shared_views=shared_views,
        share=image_share(),
        decoder=open_run_decoder(config, data) if views or shared_views else None,
        upload=Uploader() if accelerator().name == "cuda" else None,
        codes=reads_codes(config),
    )
