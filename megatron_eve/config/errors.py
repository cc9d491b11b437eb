"""The error for a configuration that cannot run."""

from __future__ import annotations

from megatron_eve.runtime.errors import UserError


class ConfigError(UserError, ValueError):
    """A wrong flag, recipe or combination; the message names it and the remedy."""
