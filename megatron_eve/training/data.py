"""The run's dataset and loader, checked against the configuration before the first step."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from megatron_eve.accelerator import accelerator
from megatron_eve.config import RunConfig
from megatron_eve.data.batch import VisionDataset, decode_settings
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.indexed import IndexedVisionDataset
from megatron_eve.data.loader import StepLoader
from megatron_eve.data.mock import MockDataset
from megatron_eve.training.microbatch import decodes_pixels
from megatron_eve.training.teaching import teacher_share

MOCK_SAMPLES = 4096


def open_dataset(config: RunConfig) -> IndexedVisionDataset | MockDataset:
    """Open `--data-path` (or make `--mock-data`) and refuse data that this run's model cannot take.

    Raises:
        DataError: damaged files; another tokenizer, vocabulary or image size; a sample longer than --seq-length.
    """
    data, model = config.data, config.model
    if data.mock_data:
        return MockDataset(
            MOCK_SAMPLES,
            vocab_size=model.vocab_size,
            image_size=model.image_size,
            teacher_size=model.teacher_size,
            seq_length=data.seq_length,
            seed=config.training.seed,
        )
    assert data.data_path is not None
    dataset = IndexedVisionDataset(data.data_path, mmap_bin_files=data.mmap_bin_files)
    sha256 = None
    if data.tokenizer_model:
        from megatron_eve.data.tokenizer import Tokenizer

        sha256 = Tokenizer(data.tokenizer_model).sha256
    dataset.check_compatible(
        tokenizer_sha256=sha256,
        vocab_size=model.vocab_size,
        image_size=model.image_size,
        teacher_size=model.teacher_size,
        seq_length=data.seq_length,
    )
    return dataset


def fingerprint(dataset: IndexedVisionDataset | MockDataset) -> dict[str, Any]:
    """What must stay the same for a checkpoint's place in the data to mean anything."""
    tokens = (
        dataset.info.num_tokens
        if hasattr(dataset.info, "num_tokens")
        else int(dataset.samples["length"].sum())
    )
    tokenizer = getattr(dataset.info, "tokenizer_sha256", "mock")
    return {"samples": len(dataset), "tokens": tokens, "tokenizer_sha256": tokenizer}


def build_loader(config: RunConfig, dataset: VisionDataset) -> StepLoader:
    """This rank's loader. Packs come in multiples of the pipeline size under the interleaved schedule."""
    parallel = config.parallel
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    teacher = teacher_share(config)
    decoder = None
    if decodes_pixels() or teacher is not None:
        device = accelerator().device
        decoder = open_decoder(
            config.data.image_decoder,
            decode_settings(dataset, teacher),
            threads=config.data.num_workers,
            gpu=device.index if device.type == "cuda" else None,
        )
    return StepLoader(
        dataset,
        global_batch_size=config.training.global_batch_size,
        seq_length=config.data.seq_length,
        seed=config.training.seed,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        pack_multiple=parallel.pipeline_model_parallel_size if interleaved else 1,
        tensor_parallel=parallel.tensor_model_parallel_size,
        context_parallel=parallel.context_parallel_size,
        most_images=config.data.max_images_per_pack,
        shuffle=config.data.shuffle,
        with_pixels=decodes_pixels(),
        teacher=teacher,
        decoder=decoder,
    )
