"""JSON files of others, such as a folder's config.json: what is wrong with one is a sentence with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.runtime.wrong_content import wrong_content


def read_json(path: Path, named: str = "") -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        named: what messages call it; by default its path.

    Raises:
        ConfigError: it is not JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{named or path}: not JSON ({wrong_content(path) or error}); copy the folder again"
        ) from None


def read_settings(path: Path, remedy: str, flag: str = "") -> dict[str, Any]:
    """Settings by name, as a config.json holds them.

    Args:
        path: of the file.
        remedy: where it cannot be read: what to name instead.
        flag: that names it, for messages; "" for a part of a model's folder.

    Raises:
        ConfigError: it cannot be read, is not JSON, or holds something else.
    """
    named = f"{flag} {path}" if flag else str(path)
    try:
        fields = read_json(path, named)
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror}; {remedy}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{named}: holds no settings by name; copy the folder again")
    return fields
