"""The error for a configuration that cannot run, and the check that every section needs."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.runtime.errors import UserError


class ConfigError(UserError, ValueError):
    """A wrong flag, recipe or combination; the message names it and the remedy."""


def at_least_one(section: object, *names: str) -> Iterator[str]:
    """An error for each of these settings of a section that is below 1; None is left out."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 1:
            yield f"--{name.replace('_', '-')} {value}: must be at least 1"
