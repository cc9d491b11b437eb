"""What tools/tokenize_images.py was asked for, as its processes get it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eve.models.image_codes import CodeTower


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Settings of the command.

    Attributes:
        family: name of the model family of the tower.
        tower: its folder, as the family read it.
        square_size: side of the square picture that the tower reads, in pixels.
        input: prefix of the dataset.
        output_prefix: of the codes.
        overwrite: replace codes that are there.
        fit: how a picture becomes a square, of `FITS`, or `AUTO`.
        dtype: in which the tower runs: "float32" or "bfloat16".
        micro_batch_size: pictures that go through the tower together.
        workers: processes, each with a copy of the tower; 0: as many as suit the machine.
        processes: of this machine that share its cores: `workers` of each of its ranks.
    """

    family: str
    tower: CodeTower
    square_size: int
    input: str
    output_prefix: str
    overwrite: bool
    fit: str
    dtype: str
    micro_batch_size: int
    workers: int = 0
    processes: int = 1
