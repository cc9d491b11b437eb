"""The one sha256 of a file, which checkpoints, fingerprints and teachers share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_eve.runtime import digests


@pytest.mark.parametrize("size", [0, 9, 10, 25])
def test_a_digest_is_that_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(digests, "_PIECE", 10)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(size)))
    assert digests.file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(digests.file_digest_in_pieces(path)) == size
