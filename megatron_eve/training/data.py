"""The run's samples, their order and its loader, checked against the configuration before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_eve.accelerator import accelerator
from megatron_eve.accelerator.transfer import Uploader
from megatron_eve.config import RunConfig, parse_blend, parse_split
from megatron_eve.data.batch import VisionDataset, decode_settings
from megatron_eve.data.cache import cached_array
from megatron_eve.data.errors import DataError
from megatron_eve.data.fitting import PackLimits
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.indexed import IndexedVisionDataset
from megatron_eve.data.joined import JoinedDataset
from megatron_eve.data.loader import StepLoader
from megatron_eve.data.mock import MockDataset
from megatron_eve.data.sampling import (
    BlendedOrder,
    GroupedOrder,
    Order,
    Part,
    ShuffledOrder,
    by_modality,
    split_dataset,
)
from megatron_eve.training.microbatch import decodes_pixels
from megatron_eve.training.shapes import fixed_length
from megatron_eve.training.teaching import teacher_share

if TYPE_CHECKING:
    from megatron_eve.data.tokenizer import Tokenizer

MOCK_SAMPLES = 4096


@dataclass(frozen=True)
class RunData:
    """What a run trains and is judged on.

    Attributes:
        dataset: all samples, those of several datasets counted through.
        order: which of them stands at which position of the run.
        training: what is trained on of each dataset.
        held_out: what losses are measured on, of each dataset that has such samples.
        identity: what must stay the same for a checkpoint's place in the order to mean anything.
        dropped: a sentence for each dataset with samples that no pack can hold, which are in neither.
    """

    dataset: VisionDataset
    order: Order
    training: tuple[Part, ...]
    held_out: tuple[Part, ...]
    identity: dict[str, Any]
    dropped: tuple[str, ...] = ()


def open_data(config: RunConfig) -> RunData:
    """Open `--data-path` and `--valid-data-path` (or make `--mock-data`), and refuse what this run cannot take.

    Raises:
        DataError: damaged files; another tokenizer, vocabulary or image size; a split, or samples that no pack can
            hold, leave nothing of a dataset; datasets that do not go together.
        ConfigError: a flag that cannot be read.
    """
    data = config.data
    if data.mock_data:
        model = config.model
        mock = MockDataset(
            MOCK_SAMPLES,
            vocab_size=model.vocab_size,
            image_size=model.image_size,
            teacher_size=model.teacher_size,
            seq_length=_limits(config).longest,
            seed=config.training.seed,
        )
        return data_in_memory(config, mock)
    blend, others = parse_blend(data.data_path), parse_blend(data.valid_data_path, "--valid-data-path")
    prefixes = (*blend.prefixes, *others.prefixes)
    tokenizer = None
    if data.tokenizer_model:
        from megatron_eve.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(data.tokenizer_model)
    datasets = [_open(config, prefix, tokenizer) for prefix in prefixes]
    training, held_out, dropped = _divide(config, prefixes, datasets, len(blend.prefixes))
    dataset = datasets[0] if len(datasets) == 1 else JoinedDataset(datasets)
    trained = datasets[: len(training)]
    identity = {
        "samples": [len(dataset) for dataset in trained],
        "tokens": [dataset.info.num_tokens for dataset in trained],
        "tokenizer_sha256": trained[0].info.tokenizer_sha256,
        "templates": sorted({dataset.info.template for dataset in trained}),
        "shares": [round(weight / sum(blend.weights), 9) for weight in blend.weights]
        if blend.weights
        else [],
        "dropped samples": dropped_fingerprints(training),
    }
    modalities = partial(
        cached_array,
        data.data_cache_path,
        _cache_name(trained, training),
        partial(by_modality, dataset.samples, training),
    )
    order = _order(config, training, blend.weights, modalities)
    return RunData(dataset, order, tuple(training), tuple(held_out), identity, tuple(dropped))


def dropped_fingerprints(parts: Sequence[Part]) -> list[str]:
    """Which samples the order leaves out, for a checkpoint; an empty list where it leaves out none."""
    fingerprints = [part.dropped_fingerprint() for part in parts]
    return fingerprints if any(fingerprints) else []


def _limits(config: RunConfig) -> PackLimits:
    data = config.data
    return PackLimits(data.seq_length, config.model.max_position_embeddings, data.max_images_per_pack)


def _divide(
    config: RunConfig, prefixes: Sequence[str], datasets: Sequence[IndexedVisionDataset], trained: int
) -> tuple[list[Part], list[Part], list[str]]:
    """Divide datasets, of which the first `trained` are trained on.

    Returns:
        What is trained on, what is held out, and a sentence for each dataset with samples that are in neither.
    """
    share, limits = parse_split(config.data.split), _limits(config)
    names = [Path(prefix).name for prefix in prefixes]
    training, held_out, said, first = [], [], [], 0
    for number, (prefix, dataset) in enumerate(zip(prefixes, datasets, strict=True)):
        name = names[number] if names.count(names[number]) == 1 else prefix
        kept, out = split_dataset(name, first, len(dataset), share if number < trained else 1.0)
        first += len(dataset)
        if number < trained:
            _check_split(config, prefix, kept, out)
        rows = limits.beyond(dataset.samples, dataset.info.longest_length)
        if len(rows):
            said.append(limits.describe(dataset.samples, rows, dataset.sample_name))
            kept, out = (_without(part, rows, prefix, said[-1]) for part in (kept, out))
        if number < trained:
            training.append(kept)
        if len(out):
            held_out.append(out)
    return training, held_out, said


def _without(part: Part, rows: NDArray[np.int64], prefix: str, message: str) -> Part:
    left = part.without(rows)
    if len(part) and not len(left):
        raise DataError(f"nothing is left of {prefix} to train on or to hold out: {message}")
    return left


def _check_split(config: RunConfig, name: str, kept: Part, held_out: Part) -> None:
    if not len(kept) or (parse_split(config.data.split) and not len(held_out)):
        raise DataError(
            f"--split {config.data.split} leaves nothing to {'hold out' if len(kept) else 'train on'} of the "
            f"{kept.size} samples of {name}: change the shares, or leave the dataset out"
        )


def data_in_memory(config: RunConfig, dataset: VisionDataset) -> RunData:
    """A dataset that has no files, split and ordered as the configuration says."""
    training, held_out = split_dataset("mock", 0, len(dataset), parse_split(config.data.split))
    _check_split(config, "the mock dataset", training, held_out)
    identity = {
        "samples": [len(dataset)],
        "tokens": [int(dataset.lengths(np.arange(len(dataset))).sum())],
        "tokenizer_sha256": "mock",
        "shares": [],
    }
    order = _order(config, [training], None, partial(by_modality, dataset.samples, [training]))
    return RunData(dataset, order, (training,), (held_out,) if len(held_out) else (), identity)


def _open(config: RunConfig, prefix: str, tokenizer: Tokenizer | None) -> IndexedVisionDataset:
    model = config.model
    dataset = IndexedVisionDataset(prefix, mmap_bin_files=config.data.mmap_bin_files)
    dataset.check_compatible(
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        vocab_size=model.vocab_size,
        image_size=model.image_size,
        teacher_size=model.teacher_size,
    )
    if tokenizer and dataset.info.template == "plain":
        tokenizer.check_newline()
    if not dataset.info.num_images:  # made for whatever sizes, none of which its samples know of
        dataset.info = dataclasses.replace(
            dataset.info, image_size=model.image_size, teacher_size=model.teacher_size
        )
    return dataset


def _order(
    config: RunConfig,
    parts: Sequence[Part],
    weights: Sequence[float] | None,
    modalities: Callable[[], NDArray[np.int64]],
) -> Order:
    """The order that the flags ask for; `modalities` computes what `GroupedOrder` wants to know."""
    seed, shuffle = config.training.seed, config.data.shuffle
    if config.data.group_by_modality:
        return GroupedOrder(parts, modalities(), config.training.global_batch_size, seed)
    if weights:
        return BlendedOrder(parts, weights, seed, shuffle)
    return ShuffledOrder(parts, seed, shuffle)


def _cache_name(datasets: Sequence[IndexedVisionDataset], parts: Sequence[Part]) -> str:
    """A name for what is computed from the manifests of these parts; another copy of a dataset is another one."""
    told = hashlib.sha256()
    for dataset, part in zip(datasets, parts, strict=True):
        path = Path(dataset.prefix + "_samples.npy").resolve()
        status = path.stat()
        told.update(
            f"{path} {status.st_size} {status.st_mtime_ns} {part}{part.dropped_fingerprint()}\n".encode()
        )
    return f"modalities-{told.hexdigest()[:32]}"


def build_loader(config: RunConfig, data: RunData) -> StepLoader:
    """This rank's loader. Packs come in multiples of the pipeline size under the interleaved schedule."""
    parallel = config.parallel
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    teacher = teacher_share(config)
    decoder = None
    if decodes_pixels() or teacher is not None:
        device = accelerator().device
        decoder = open_decoder(
            config.data.image_decoder,
            decode_settings(data.dataset, teacher),
            threads=config.data.num_workers,
            gpu=device.index if device.type == "cuda" else None,
        )
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
        most_images=config.data.max_images_per_pack,
        with_pixels=decodes_pixels(),
        teacher=teacher,
        decoder=decoder,
        upload=Uploader() if accelerator().name == "cuda" else None,
    )
