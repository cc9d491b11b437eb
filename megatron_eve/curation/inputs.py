"""`Inputs`, the list of parquet shards that a curation reads. It is fixed by the first stage, in WORK/inputs.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_eve.curation.json_files import write_json
from megatron_eve.data.errors import DataError
from megatron_eve.data.sources.parquet import count_rows
from megatron_eve.data.sources.recognise import input_files

INPUTS = "inputs.json"
_OTHERS = "give the same --input, or another --work"


def shard_files(patterns: Sequence[str]) -> list[Path]:
    """Absolute paths of the shards that --input names; the files of a pattern are sorted by name.

    Raises:
        DataError: no file matches, or one is not .parquet.
    """
    files = [file.resolve() for file in input_files(patterns)]
    other = next((file for file in files if file.suffix != ".parquet"), None)
    if other is not None:
        raise DataError(
            f"--input {other}: curation reads parquet shards of records (.parquet); make them with "
            "tools/prepare_data.py"
        )
    return files


@dataclass(frozen=True)
class Inputs:
    """Shards of records, in the order in which they were given; a shard is known by its number in this list.

    Attributes:
        files: absolute paths of the shards.
        rows: number of rows of each.
        sizes: of each file, in bytes.
    """

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Inputs:
        """The shards that --input names.

        Raises:
            DataError: see `shard_files`; or a file is no parquet file with rows of text and images.
        """
        files = shard_files(patterns)
        return cls(tuple(files), tuple(map(count_rows, files)), tuple(file.stat().st_size for file in files))

    @classmethod
    def read(cls, folder: Path) -> Inputs | None:
        """The list that a work folder has; None where it has none.

        Raises:
            DataError: it is damaged.
        """
        path = folder / INPUTS
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
            return cls(
                tuple(Path(shard["file"]) for shard in shards),
                tuple(int(shard["rows"]) for shard in shards),
                tuple(int(shard["bytes"]) for shard in shards),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): choose another --work and begin anew") from error

    def write(self, folder: Path) -> None:
        """Write the list into a work folder."""
        write_json(folder / INPUTS, {"shards": self._shards()})

    @cached_property
    def digest(self) -> str:
        """The sha256 of the list, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._shards()).encode()).hexdigest()

    def compare(self, patterns: Sequence[str], folder: Path) -> None:
        """Check that --input still names these shards; the files are not opened, as each task of an array does this.

        Args:
            patterns: of --input.
            folder: the work folder, for the message.

        Raises:
            DataError: see `shard_files`; or it names others.
        """
        files, path = shard_files(patterns), folder / INPUTS
        for number, (old, new) in enumerate(zip(self.files, files, strict=False)):
            if old != new:
                raise DataError(
                    f"shard {number} of {path} is {old}, and --input now has {new} in its place: {_OTHERS}"
                )
            self.check(number)
        if len(files) != len(self):
            raise DataError(f"{path} lists {len(self)} shards, and --input now names {len(files)}: {_OTHERS}")

    def check(self, shard: int) -> None:
        """Raise DataError if a shard is not the file that it was when the list was made."""
        file, size = self.files[shard], self.sizes[shard]
        try:
            found = file.stat().st_size
        except OSError as error:
            raise DataError(
                f"{file} (shard {shard}) cannot be read ({error.strerror}): put it back, or begin anew in another "
                "--work"
            ) from error
        if found != size:
            raise DataError(
                f"{file} (shard {shard}) has {found:,} bytes, and had {size:,} when the curation began: put the old "
                "file back, or begin anew in another --work"
            )

    def _shards(self) -> list[dict[str, str | int]]:
        return [
            {"file": str(file), "rows": rows, "bytes": size}
            for file, rows, size in zip(self.files, self.rows, self.sizes, strict=True)
        ]
