"""The error for a configuration that cannot run."""

from __future__ import annotations


class ConfigError(ValueError):
    """A wrong flag, recipe or combination; the message names it and says what to do."""
