"""What a conversion reads beside weights, and which folders it may write to. Needs no torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.checkpoint.files import sync_to_disk
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.checkpoint.tokenizer_record import TOKENIZER_FILE, TOKENIZER_JSON, TokenizerRecord
from megatron_eve.config import TRACKER, ConfigError
from megatron_eve.data.errors import DataError
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.runtime.wrong_content import wrong_content

_SMALL_FILES = (
    64 << 20
)  # bytes that an import reserves for what stands beside the tensors; an export needs fewer


def check_target(target: Path) -> None:
    """Is this a folder that an import may write, new or with what one left that was cut short?

    Raises:
        ConfigError: it holds a run or a model already, or is a file.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file; choose another --target")
    if (target / "config.json").exists():
        raise ConfigError(f"{target}: holds a model in Hugging Face layout; choose another --target")
    store = CheckpointStore(target)
    # An iteration 0 that no tracker names was written by an import that was killed before it did so.
    if (store.root / TRACKER).exists() or any(store.iterations()):
        raise ConfigError(f"{target}: holds a run already; choose another --target")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder, which gets its name when all is written and on the disk; nothing is left of one that is not.

    Args:
        target: the name.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: the name is taken.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another --target")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{target.name}.partial.*"):  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial.", dir=target.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for path in (*unfinished.rglob("*"), unfinished):
            sync_to_disk(path)
        unfinished.rename(target)
        sync_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_room(target: Path, size: int) -> None:
    """Refuse a disk without room for a folder.

    Args:
        target: the new folder.
        size: bytes of its weights.

    Raises:
        ConfigError: so much is not free there.
    """
    there = next(place for place in (target, *target.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size + _SMALL_FILES:
        raise ConfigError(
            f"--target {target}: {decimal_size(free)} are free there, and the weights take {decimal_size(size)}; "
            "free some space, or choose another --target"
        )


def decimal_size(size: int) -> str:
    """Bytes as text: in GB, or in MB below 1 GB, the units of --max-shard-size."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def source_tokenizer(
    source: Path, rows: int, legacy: bool, added: Sequence[str] = ()
) -> TokenizerRecord | None:
    """The tokenizer.model beside the weights of an import, else a tokenizer.json of bytes; None without one.

    Args:
        source: the folder.
        rows: of the model's embedding.
        legacy: how a tokenizer.model is read (`TextRules.tokenizer_legacy` of the family).
        added: its control tokens (`TextRules.added_tokens`), which an embedding may lack.

    Raises:
        ConfigError: it cannot be read (its fingerprint would shut out the right one later), or has more pieces than the
            embedding has rows.
    """
    tokenizer = _tokenizer_of(source, rows, legacy, added)
    return None if tokenizer is None else TokenizerRecord.of(tokenizer)


def rows_of_vocabulary(source: Path, rows: int, legacy: bool, added: Sequence[str]) -> int:
    """Rows that the embedding of a language model gets when it becomes a family's model.

    Args:
        source, rows, legacy, added: as `source_tokenizer`'s. Without a tokenizer no row is a control token's.

    Raises:
        ConfigError: see `source_tokenizer`.
    """
    tokenizer = _tokenizer_of(source, rows, legacy, added)
    return rows + len(added) if tokenizer is None else max(rows, tokenizer.vocab_size)


def _tokenizer_of(source: Path, rows: int, legacy: bool, added: Sequence[str]) -> TextTokenizer | None:
    """See `source_tokenizer`; a tokenizer.json without bytes is made of a tokenizer.model, and gives other ids."""
    path = source / TOKENIZER_FILE
    if not path.is_file():
        path = source / TOKENIZER_JSON
        if not (path.is_file() and (source / "tokenizer_config.json").is_file()):
            return None
    if other := wrong_content(path):
        raise ConfigError(f"{path}: cannot be read: it {other}")
    try:
        tokenizer = load_tokenizer(path, legacy, added)
    except DataError as error:
        raise ConfigError(f"{error}; or take it out of --source") from None
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.byte_level:
        return None
    if tokenizer.vocab_size - len(added) > rows:
        raise ConfigError(
            f"{path}: has {tokenizer.vocab_size} pieces, and the embedding {rows} rows, so it is not "
            "this model's tokenizer; copy the right one there, or take this one out of --source"
        )
    return tokenizer
