"""Write the page about a dataset and its sample rows. `tools/inspect_data.py` is the command."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.inspecting.codes import Codes
from megatron_eve.data.inspecting.drawing import MOST_PICTURES, draw_row
from megatron_eve.data.inspecting.layout import RowLayout, row_layout
from megatron_eve.data.inspecting.page import ShownRow, dataset_page
from megatron_eve.data.inspecting.pictures import read_picture
from megatron_eve.data.inspecting.statistics import read_statistics
from megatron_eve.data.text.text_tokenizer import TextTokenizer

PAGE = "index.html"


def draw_sample(dataset: AnyDataset, size: int, seed: int) -> list[int]:
    """Random row numbers without repetition, ascending; all rows if there are at most `size`."""
    size = min(size, len(dataset))
    # Not Generator.choice, which makes a permutation of all rows.
    random, rows = np.random.default_rng(seed), set[int]()
    if 2 * size > len(dataset):
        return sorted(random.permutation(len(dataset))[:size].tolist())
    while len(rows) < size:
        rows.add(int(random.integers(len(dataset))))
    return sorted(rows)


def write_inspection(
    dataset: AnyDataset,
    prefix: str,
    folder: Path,
    rows: list[int],
    tokenizer: TextTokenizer | None,
    codes: Sequence[Codes] = (),
) -> Path:
    """Write index.html and a row_N.png for each row; returns the path of the page.

    The page names each damaged row with the reason; a damaged picture is replaced by the error.

    Args:
        dataset: an open dataset.
        prefix: of the dataset, for the page.
        folder: made if it does not exist.
        rows: row numbers to draw.
        tokenizer: the one that the dataset was made with; None shows token ids.
        codes: of its images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for row in rows:
        try:
            layout = row_layout(dataset, row, tokenizer)
        except DataError as error:
            samples.append(ShownRow(row, problem=str(error)))
            continue
        stream = BytesIO()
        draw_row(layout, read_pictures(dataset, layout)).save(stream, "PNG", optimize=True)
        (folder / f"row_{row}.png").write_bytes(stream.getvalue())
        samples.append(ShownRow(row, layout, stream.getvalue()))
    page = folder / PAGE
    statistics = read_statistics(dataset)
    text = dataset_page(dataset, prefix, statistics, samples, ids_only=tokenizer is None, codes=codes)
    page.write_text(text, encoding="utf-8")
    return page


def read_pictures(dataset: AnyDataset, row: RowLayout) -> list[Image.Image | str]:
    """The pictures of a row that are drawn, each decoded or a text with the error."""
    pictures: list[Image.Image | str] = []
    for image in row.images[:MOST_PICTURES]:
        try:
            pictures.append(read_picture(dataset, image))
        except (DataError, SkipRow) as error:
            pictures.append(str(error))
    return pictures
