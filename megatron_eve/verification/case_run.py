"""Runs a golden case: its samples as a dataset, and a configuration for them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.config import (
    DataConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.data.dataset import WithoutCodes, planned_tiles, planned_visual_labels
from megatron_eve.data.mock import MockInfo
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.registry import find_family, image_planner
from megatron_eve.verification.cases import ModelCase


class CaseDataset(WithoutCodes):
    """A case's samples with the interface of a dataset, so that the loader packs them as it packs any other."""

    def __init__(self, case: ModelCase) -> None:
        self.info = MockInfo(case.model.vocab_size, apply_exif=False)
        self.planner = image_planner(RunConfig(family=case.family, model=case.model, vision=case.vision))
        self._files = [file for files in case.images for file in files]
        masks = case.inputs["attention_mask"]
        self._texts = [
            (ids[mask].numpy(), labels[mask].numpy())
            for ids, labels, mask in zip(case.inputs["input_ids"], case.inputs["labels"], masks, strict=True)
        ]
        counts = np.array([len(files) for files in case.images], dtype=np.int64)
        self.samples = np.zeros(
            len(counts), dtype=[("labels", np.int64), ("first_image", np.int64), ("num_images", np.int32)]
        )
        ignored = IGNORE_INDEX, IMAGE_TOKEN_ID
        self.samples["labels"] = [(~np.isin(labels[1:], ignored)).sum() for _, labels in self._texts]
        self.samples["first_image"], self.samples["num_images"] = counts.cumsum() - counts, counts
        self._drawn = [
            bool(label == IMAGE_TOKEN_ID)
            for tokens, labels in self._texts
            for label in labels[tokens == IMAGE_TOKEN_ID]
        ]
        self._codes = None if case.codes is None else case.codes.numpy().astype(np.uint16)
        self.code_depth = 0 if self._codes is None else self._codes.shape[-1]

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The case's ids and labels, without padding."""
        return self._texts[index]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens with images expanded."""
        return np.array([self._length(int(i)) for i in indices], dtype=np.int64)

    def tile_counts(self, indices: np.ndarray) -> np.ndarray:
        """Pictures, tile by tile."""
        return planned_tiles(self, indices)

    def visual_labels(self, indices: np.ndarray) -> np.ndarray:
        """Rows of pictures that are to be drawn."""
        return planned_visual_labels(self, indices)

    def drawn(self, image: int) -> bool:
        """As the label at the picture's placeholder says."""
        return self._drawn[image]

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of a picture: [h, w, D]."""
        return super().codes(image) if self._codes is None else self._codes[image]

    def _length(self, index: int) -> int:
        sample = self.samples[index]
        first, count = int(sample["first_image"]), int(sample["num_images"])
        plans = [self.image_plan(image) for image in range(first, first + count)]
        return len(self._texts[index][0]) + sum(plan.rows - plan.tiles for plan in plans)

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages."""
        return f"sample {index} of the case"

    def image_name(self, image: int) -> str:
        """Name of a picture in messages."""
        return f"picture {image} of the case"

    def stored_pixels(self, image: int) -> None:
        """Always None: pictures are files here."""

    def image_bytes(self, image: int) -> bytes:
        """The raw picture file."""
        return self._files[image]

    def will_need(self, indices: np.ndarray) -> None:
        """Does nothing: the files are small."""

    def image_plan(self, image: int) -> ImagePlan:
        """From the picture's own size."""
        with Image.open(io.BytesIO(self._files[image])) as picture:
            return self.planner(*picture.size)


def case_config(case: ModelCase, parallel: ParallelConfig, recompute: bool) -> RunConfig:
    """A configuration for a case; packs are as long as its longest sample, so that there are several."""
    context = parallel.context_parallel_size
    multiple = parallel.tensor_model_parallel_size * (2 * context if context > 1 else 1)
    recomputing = find_family(case.family).golden().recomputing if recompute else {}
    longest = int(CaseDataset(case).lengths(np.arange(len(case.images))).max())
    return RunConfig(
        family=case.family,
        model=case.model,
        # Every rank needs whole gradients, so nothing is sharded over data-parallel ranks.
        parallel=replace(parallel, use_distributed_optimizer=False, variable_seq_lengths=True),
        training=TrainingConfig(
            stage=case.stage,
            global_batch_size=len(case.images),
            train_iters=1,
            transformer_impl="local",
            recompute_granularity="full" if recompute else None,
            recompute_method="uniform" if recompute else None,
            recompute_num_layers=1 if recompute else None,
        ),
        vision=replace(case.vision, **recomputing),
        data=DataConfig(
            seq_length=-(-longest // multiple) * multiple,
            shuffle=False,
            mock_data=True,
            image_decoder="pillow",
        ),
    )
