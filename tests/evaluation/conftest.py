"""Fixtures that come from another folder."""

from tests.hf.conftest import exported

__all__ = ["exported"]
