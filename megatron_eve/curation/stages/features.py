"""The stage `features`: one vector of each picture, by a frozen vision tower.

Rows with several images have the vector of the first. Rows whose image does not decode, or that have none, get no
vector and are counted; they are not selected.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from megatron_eve.config import ConfigError
from megatron_eve.curation.feature_files import (
    FEATURES,
    ROWS_SUFFIX,
    VECTORS_SUFFIX,
    feature_counts,
    write_features,
)
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.models.towers.hf_tower import file_digests
from megatron_eve.runtime.command_line import whole_number

if TYPE_CHECKING:
    import torch

    from megatron_eve.curation.image_tower import ImageTower
    from megatron_eve.data.images.interface import ImageDecoder

FLAG = "--tower"
_WITH_VECTOR = "vectors"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class FeaturesStage(Stage):
    """Vectors of the pictures of a shard.

    Attributes:
        tower: folder of the vision tower.
        tower_sha256: of the files in it that decide what it computes.
        trust_remote_code: let Python files in it run.
        dtype: it computes in.
        batch_size: pictures that go through it together.
    """

    name: ClassVar[str] = FEATURES
    suffixes: ClassVar[tuple[str, ...]] = (VECTORS_SUFFIX, ROWS_SUFFIX)
    workers: ClassVar[int | None] = 1  # decoding and the tower use all cores, or the GPU

    tower: Path
    tower_sha256: str
    trust_remote_code: bool
    dtype: Dtype
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """See `Stage`: where the tower's folder lies decides nothing."""
        return {"tower_sha256": self.tower_sha256, "dtype": self.dtype}

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: the counts are those of rows without a vector by reason, and of rows with one."""
        import torch

        from megatron_eve.curation.image_tower import ImageTower
        from megatron_eve.data.images.backends import open_decoder
        from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS
        from megatron_eve.data.images.interface import DecodeSettings
        from megatron_eve.data.tokenizing.worker import code_device

        device = code_device()
        tower = ImageTower(
            self.tower,
            trust_remote_code=self.trust_remote_code,
            dtype=getattr(torch, self.dtype),
            device=device,
        )
        rows = work.kept_rows(shard, before=self.name)
        vectors = np.empty((len(rows), tower.width), dtype=np.float16)
        numbers = np.empty(len(rows), dtype=np.int64)
        counts: Counter[str] = Counter()
        decoder = open_decoder(
            "auto",
            DecodeSettings(apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS),
            threads=torch.get_num_threads(),
            gpu=device.index if device.type == "cuda" else None,
        )
        count = 0
        try:
            for some, features in self._batches(work.records(shard, rows), tower, decoder, counts):
                if not (finite := features.isfinite().all(dim=1)).all():
                    raise DataError(
                        f"--tower {self.tower}: its vector of row {some[int(finite.int().argmin())]} of shard {shard} "
                        f"is not finite in {self.dtype}; delete {work.stage_folder(self.name)} and give --dtype float32"
                    )
                numbers[count : count + len(some)] = some
                vectors[count : count + len(some)] = features.cpu().numpy()
                count += len(some)
        finally:
            decoder.close()
        write_features(work, shard, vectors[:count], numbers[:count])
        counts[_WITH_VECTOR] = count
        return counts

    def _batches(
        self,
        records: Iterator[tuple[int, Record | SkipRow]],
        tower: ImageTower,
        decoder: ImageDecoder,
        counts: Counter[str],
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Numbers of rows and their vectors, float32 [rows, D] on the tower's device."""
        ahead: tuple[list[int], torch.Tensor] | None = None
        for rows, files in self._files(records, counts):
            numbers, views = _decoded(rows, files, tower, decoder, counts)
            # The next batch is decoded while the GPU still computes this one.
            if ahead is not None:
                yield ahead
            ahead = (numbers, self._vectors(tower, views)) if numbers else None
        if ahead is not None:
            yield ahead

    def _files(
        self, records: Iterator[tuple[int, Record | SkipRow]], counts: Counter[str]
    ) -> Iterator[tuple[list[int], list[bytes]]]:
        """Numbers of rows, and the files of their first images; rows without one are counted."""
        rows: list[int] = []
        files: list[bytes] = []
        for row, record in records:
            if isinstance(record, SkipRow):
                counts[record.reason] += 1
            elif not record.images:
                counts["no_picture"] += 1
            elif (data := record.images[0].data) is None:
                counts["picture_not_in_shard"] += 1
            else:
                rows.append(row)
                files.append(data)
            if len(rows) == self.batch_size:
                yield rows, files
                rows, files = [], []
        if rows:
            yield rows, files

    def _vectors(self, tower: ImageTower, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """float32 [views, D]. A batch that is not full is filled up, so that all have one shape, and sums one order."""
        import torch

        filled = torch.stack([*views, *[views[-1]] * (self.batch_size - len(views))])
        try:
            return tower(filled)[: len(views)]
        except torch.cuda.OutOfMemoryError as error:
            raise DataError(
                f"the memory of the GPU is too small for --batch-size {self.batch_size}: give a smaller one"
            ) from error

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        counts, width = record.counts(work), feature_counts(work)[1]
        total = counts.pop(_WITH_VECTOR, 0)
        return [
            ("vectors", f"{total:,} of {width} numbers, {2 * total * width / 1e6:,.1f} MB"),
            *(
                ("without one", f"{count:,}  {name}: {find_reason(name).what}")
                for name, count in counts.most_common()
            ),
        ]


def _decoded(
    rows: Sequence[int],
    files: Sequence[bytes],
    tower: ImageTower,
    decoder: ImageDecoder,
    counts: Counter[str],
) -> tuple[list[int], list[torch.Tensor]]:
    """Numbers of the rows whose files decode, and their views; the others are counted."""
    from megatron_eve.data.images.decode import ImageError
    from megatron_eve.data.images.interface import ImageTask

    tasks = [ImageTask(file, {"tower": tower.preprocessing.view}) for file in files]
    numbers, views = [], []
    for row, found in zip(rows, decoder.prepare(tasks), strict=True):
        if isinstance(found, ImageError):
            counts[found.reason] += 1
        else:
            numbers.append(row)
            views.append(found["tower"])
    return numbers, views


def tower_sha256(folder: Path) -> str:
    """One sha256 of all files that decide what a tower computes.

    Raises:
        ConfigError: the folder is no model folder, or has a file of weights that is something else.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{FLAG} {folder}: no config.json there; name a model folder in Hugging Face layout"
        )
    digests = file_digests(folder, FLAG)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    parser.add_argument(
        FLAG,
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the vision tower in Hugging Face layout: CLIP, SigLIP, DINOv2, or EVA-CLIP with "
        "--trust-remote-code",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let Python files in the folder of the tower run"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the tower; the last two are faster on GPUs",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="pictures that go through the tower together",
    )


def from_flags(flags: argparse.Namespace) -> FeaturesStage:
    """The stage with the settings of the command line.

    Raises:
        ConfigError: --tower is no model folder.
    """
    return FeaturesStage(
        tower=flags.tower.absolute(),
        tower_sha256=tower_sha256(flags.tower),
        trust_remote_code=flags.trust_remote_code,
        dtype=flags.dtype,
        batch_size=flags.batch_size,
    )
