"""Drawings of the VILA-U example: tools/draw.py by a command, the codes that it draws, and the stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from runs import Runs
from vila_u_tiny import inputs

from megatron_eve.data.format.code_part import CodePart

if TYPE_CHECKING:
    from megatron_eve.models.vila_u.tower import UnifiedTower

Codes = NDArray[np.int64]
"""Of a picture: int64 [h, w, D]."""


def drawing_folder(runs: Runs, name: str) -> Path:
    """The folder of a set of drawings; drawing i is 0000i_00.png there, and its codes 0000i_00.npy."""
    return runs.output / "drawings" / name


def draw(
    runs: Runs, run: str, sentences: Sequence[str], name: str, guidance: float = 1.0, show: bool = False
) -> list[Codes]:
    """Draw a picture of each sentence, of the most likely codes; one process.

    Args:
        runs: the folder of the example.
        run: whose model draws.
        sentences: what to draw.
        name: of the set of drawings.
        guidance: 1 is without, 0 does not heed the sentence.
        show: show the command.

    Returns:
        The codes of each.
    """
    folder, prompts = drawing_folder(runs, name), runs.data / f"prompts-{name}.txt"
    prompts.write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
    runs.tool(
        "tools/draw.py", f"draw-{name}", "--model-path", runs.folder(run), "--prompt-file", prompts, "--conv-mode",
        inputs.TEMPLATE, "--cfg", guidance, "--temperature", 0, "--batch-size", 16, "--output-dir", folder, show=show,
    )  # fmt: skip
    return drawn_codes(folder, len(sentences))


def drawn_codes(folder: Path, count: int) -> list[Codes]:
    """The codes of the first drawings in a folder of tools/draw.py."""
    return [np.load(folder / f"{number:05d}_00.npy") for number in range(count)]


def draw_with_transformers(folder: Path, sentences: Sequence[str]) -> list[Codes]:
    """Draw the same pictures as `draw` without guidance, by transformers alone.

    Args:
        folder: what tools/convert_checkpoint.py export --format transformers wrote; its own code runs.
        sentences: what to draw.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = processor.drawing_inputs(sentences, guidance=False)
    return list(model.draw(**inputs, guidance=1.0, temperature=0)[:, 0].numpy())


def stored_codes(prefix: Path, drawn: Sequence[int]) -> list[Codes]:
    """The codes of pictures of a dataset of `inputs.write_rows`, as they are drawn; pictures by number."""
    part = CodePart(prefix)
    return [part.codes(inputs.image_to_draw(number)).astype(np.int64) for number in drawn]


def equal_share(one: Codes, other: Codes) -> float:
    """The share of codes that are equal in both pictures, 0 to 1."""
    return float((one == other).mean())


def code_sums(tower: Path, codes: Sequence[Codes]) -> NDArray[np.float32]:
    """Sums of the codebook vectors of codes: float32 [pictures, h, w, F]."""
    import torch

    return _load(tower).quantizer.embed(torch.from_numpy(np.stack(codes))).numpy()


def save_pictures(tower: Path, codes: Sequence[Codes], folder: Path) -> None:
    """Make the pictures of codes by a tower, as PNG files named like those of tools/draw.py."""
    import torch
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pictures = _load(tower).decode(torch.from_numpy(np.stack(codes))).round().byte().numpy()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:05d}_00.png")


def _load(tower: Path) -> UnifiedTower:
    import torch

    from megatron_eve.models.vila_u.tower import load_tower
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder

    return load_tower(read_tower_folder(tower), torch.device("cpu"), torch.float32)
