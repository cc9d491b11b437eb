"""Which folders a conversion may write to. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import TRACKER, ConfigError


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
