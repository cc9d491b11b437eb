"""A small VILA-U with random weights as a checkpoint, and the tower of its codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron_eve.config import RunConfig
from tests.families.suite import with_weights
from tests.families.vila_u import run_config
from tests.golden_dir import find_golden
from tests.layouts import ONE
from tests.models.vila_u.towers import write_tower
from tests.ranks import RankPool


class Model(NamedTuple):
    """The files of a model.

    Attributes:
        run: folder of the checkpoint.
        tower: folder that the checkpoint names.
        tokenizer: file of the tokenizer.
        config: of the run.
    """

    run: Path
    tower: Path
    tokenizer: Path
    config: RunConfig

    @property
    def flags(self) -> list[str]:
        """Of the tools."""
        return ["--model-path", str(self.run), "--tokenizer-model", str(self.tokenizer)]


def write_model(folder: Path, ranks: RankPool) -> Model:
    """Write them into a new folder."""
    tower = write_tower(folder / "tower")
    config = run_config(ONE.parallel)
    config = replace(
        config,
        vision=replace(config.vision, visual_codebook_size=64, vision_tokenizer=str(tower)),
        # The tokenizer's pieces, and the four control tokens.
        model=replace(config.model, vocab_size=388),
    )
    (folder / "run").mkdir()
    with_weights(config, ranks, folder / "run")
    return Model(folder / "run", tower, find_golden("tokenize") / "tokenizer.model", config)
