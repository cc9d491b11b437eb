"""Finds the stages by their names: each is a module of its own in `stages/`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_names import STAGES

_MODULES = "megatron_eve.curation.stages"


class StageModule(Protocol):
    """What the module of a stage has."""

    add_flags: Callable[[argparse.ArgumentParser], None]
    from_flags: Callable[[argparse.Namespace], Stage]
    __doc__: str | None


def stage_modules() -> dict[str, StageModule]:
    """The modules of the stages by name, in their order."""
    return {name: cast(StageModule, import_module(f"{_MODULES}.{name}")) for name in STAGES}
