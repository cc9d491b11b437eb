"""`RunConfig` typed for one family: what pydantic, and the parser of flags, are made from.

`RunConfig.vision` may be the settings of any family. A parser has to know which, and which stages there are.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter

from megatron_eve.config.flag_types import Flag
from megatron_eve.config.schema import RunConfig, TrainingConfig
from megatron_eve.models.family import ModelFamily


def adapter(family: ModelFamily) -> TypeAdapter[RunConfig]:
    """pydantic's parser of nested dictionaries; see `plain` for what it makes."""
    return _adapter(_run_type(family))


def plain(typed: RunConfig) -> RunConfig:
    """Convert a parser's result to a `RunConfig`, so that runs of all families have one class."""
    return RunConfig(**{**vars(typed), "training": TrainingConfig(**vars(typed.training))})


def typed(family: ModelFamily, run: RunConfig) -> RunConfig:
    """The same values in the types of the family, which `flags.flag_parser` reads."""
    training = _training_type(_stage_names(family))(**vars(run.training))
    made: RunConfig = _run_type(family)(**{**vars(run), "training": training})
    return made


def _stage_names(family: ModelFamily) -> tuple[tuple[int, str], ...]:
    return tuple((number, stage.name) for number, stage in family.stages.items())


def _run_type(family: ModelFamily) -> Any:
    settings: Any = family.Config  # mypy takes no class for hashable
    return _cached_run_type(settings, _stage_names(family))


@cache
def _cached_run_type(vision: type[Any], stages: tuple[tuple[int, str], ...]) -> Any:
    training = _training_type(stages)
    return _with_types(
        RunConfig,
        vision=(vision, field(default_factory=vision)),
        training=(training, field(default_factory=training)),
    )


@cache
def _training_type(stages: tuple[tuple[int, str], ...]) -> type[TrainingConfig]:
    named, numbers = ", ".join(f"{number} {name}" for number, name in stages), tuple(dict(stages))
    hint = Annotated[Literal[numbers], Flag(text=f"What trains: {named}.")]  # type: ignore[valid-type]
    usual = TrainingConfig.stage
    return _with_types(TrainingConfig, stage=(hint, usual if usual in numbers else numbers[0]))


@cache
def _adapter(run: type[RunConfig]) -> TypeAdapter[RunConfig]:
    return TypeAdapter(run)


def _with_types(base: type[Any], **types: tuple[Any, Any]) -> type[Any]:
    """A subclass of a dataclass with other types and defaults of some fields."""
    fields = [(name, hint, default) for name, (hint, default) in types.items()]
    made = make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    made.__module__, made.__qualname__, made.__doc__ = base.__module__, base.__qualname__, base.__doc__
    return made
