"""The index of a dataset is the one that megatron-core's own builder writes."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_eve.data import indexed_writer


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_the_index_is_megatron_cores(
    rows: int, dtype: type[np.generic], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_writer, "_INDEX_ROWS", 3)
    lengths = array("i", np.random.default_rng(0).integers(0, 2**31 - 1, rows).tolist())
    ours = indexed_writer._IndexedWriter(str(tmp_path / "ours"), dtype)
    ours._builder.sequence_lengths = lengths  # 2 GiB a row are not written for this
    ours.close()
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    builder.sequence_lengths = lengths
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx.partial").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
