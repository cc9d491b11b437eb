"""The toy once more, whose models lie in folders: the language model, the front end and the colour head in one each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eve.models.family import ModelFamily
from tests.families.toy.family import ToyFamily
from tests.families.toy.hugging_face import ToyFormat


class FoldersFormat(ToyFormat):
    """See `HFFormat.folders`."""

    model_types: tuple[str, ...] = ("toy_in_folders",)

    def folders(self, fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """Those of the public VILA-1.5 models; the toy's tensors have the names that its rules give them."""
        if "llm_cfg" not in fields:
            return super().folders(fields)
        return {
            "llm": {},
            "vision_tower": {"": "model.front_end."},
            "mm_projector": {"": "model.colour_head."},
        }


class FoldersFamily(ToyFamily):
    """See above."""

    name = "tests.convert.toy_in_folders"

    def hugging_face(self) -> FoldersFormat:
        """See `ModelFamily.hugging_face`."""
        return FoldersFormat()


FAMILY: ModelFamily = FoldersFamily()
