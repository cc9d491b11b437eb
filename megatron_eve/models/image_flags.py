"""Settings of pictures that datasets are made for, as flags of tools/preprocess_data.py. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

ImageSetting = int | str
ImageSettings = Mapping[str, ImageSetting]
"""What pictures are made into, by the names of a family's `image_flags`: whole numbers, or words that a flag takes."""


class ImageFlag(NamedTuple):
    """A setting of pictures that datasets are made for, as a flag of tools/preprocess_data.py.

    Attributes:
        default: a whole number, or one of `choices`.
        help: of the flag.
        binds: image storages under which a dataset fits no other value. All, if it decides rows of the sequence; else
            those that store the pixels that it changes: "pixels", and "jpeg" for the first view.
        choices: the words it may be; empty for a whole number.
        metavar: what a number counts.
        at_most: the run's value is an upper limit: a dataset that was made for less fits it, too, and decides itself.
            One that records no value was made for the default.
        beside: a flag with its value that a run's value goes with, such as "--fit tiles", for messages.
        alike: groups of choices that make the same of every picture: a dataset made for one fits them all.
    """

    default: ImageSetting
    help: str
    binds: tuple[Literal["encoded", "jpeg", "pixels"], ...] = ("encoded", "jpeg", "pixels")
    choices: tuple[str, ...] = ()
    metavar: str = "PX"
    alike: tuple[tuple[str, ...], ...] = ()
    at_most: bool = False
    beside: str = ""

    @property
    def decides_rows(self) -> bool:
        """Does it change rows of the sequence, and so bind every dataset?"""
        return "encoded" in self.binds

    def takes(self, value: object) -> bool:
        """Can this be its value? Of a number the type alone is checked."""
        return value in self.choices if self.choices else type(value) is int

    def fits(self, dataset: ImageSetting, run: ImageSetting) -> bool:
        """Can a run with a value train on a dataset that was made for another?"""
        if self.at_most and isinstance(dataset, int) and isinstance(run, int):
            return dataset <= run
        return dataset == run or any(dataset in group and run in group for group in self.alike)
