"""Toy datasets in the hub's layout: a README with configs, and parquet files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(shade: int, size: tuple[int, int] = (60, 40)) -> dict[str, Any]:
    """A grey picture as a dataset holds it."""
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade % 256, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{shade}.png"}


def write_split(
    folder: Path,
    split: str,
    rows: Sequence[Mapping[str, Any]],
    config: str | None = None,
    images: Sequence[str] = ("image",),
) -> Path:
    """Write one parquet file of a dataset's folder, and its README anew.

    Args:
        folder: of the dataset.
        split: its name.
        rows: by column.
        config: of the README; None: one without a name.
        images: columns with pictures, or with lists of them.
    """
    place = Path(config or "data")
    path = folder / place / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    features = {name: _image(table.schema.field(name).type) for name in images if name in table.column_names}
    kinds = {
        name: _feature(table.schema.field(name).type) for name in table.column_names if name not in features
    }
    info = {"info": {"features": {name: {**kinds, **features}[name] for name in table.column_names}}}
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    _write_readme(folder)
    return path


def _image(kind: pyarrow.DataType) -> dict[str, Any]:
    image = {"_type": "Image"}
    return {"feature": image, "_type": "List"} if pyarrow.types.is_list(kind) else image


def _feature(kind: pyarrow.DataType) -> Any:
    if pyarrow.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pyarrow.types.is_struct(kind):
        return {
            kind.field(number).name: _feature(kind.field(number).type) for number in range(kind.num_fields)
        }
    return {"dtype": str(kind), "_type": "Value"}


def _write_readme(folder: Path) -> None:
    lines = ["---", "configs:"]
    for place in sorted({path.parent for path in folder.rglob("*.parquet")}):
        name = "default" if place.name == "data" else place.name
        lines += [f"- config_name: {name}", "  data_files:"]
        for path in sorted(place.glob("*.parquet")):
            split = path.name.partition("-")[0]
            lines += [f"  - split: {split}", f"    path: {place.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A toy"]), encoding="utf-8")


def write_pope(root: Path, count: int = 6, split: str = "test") -> Path:
    """POPE with questions "Is there a thing N in the image?"; odd ones are to be answered yes."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a thing {number} in the image?",
            "answer": "yes" if number % 2 else "no",
            "image_source": f"COCO_{number}",
            "image": picture(20 * number),
            "category": ("random", "popular", "adversarial")[number % 3],
        }
        for number in range(count)
    ]
    return write_split(root / "lmms-lab-encoder" / "POPE", split, rows)
