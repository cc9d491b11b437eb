"""`RunConfig` and the command line, typed for one family: what pydantic and tyro build a parser from.

`RunConfig.vision` may be the settings of any family. A parser has to know which, and which stages there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import TypeAdapter
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from megatron_eve.config.presets import PRESETS
from megatron_eve.config.schema import RunConfig, TrainingConfig
from megatron_eve.models.family import ModelFamily

# How tyro reads flags, for `tyro.cli`.
FLAG_RULES = ConstructorRegistry()
_ANSWERS = {"true": True, "false": False}


@FLAG_RULES.primitive_rule
def _optional_flag(hint: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | None] | None:
    """A flag that alone means yes, and that may be left to the machine: a setting of the type `bool | None`."""
    if set(get_args(hint.type)) != {bool, NoneType}:
        return None
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[true|false]",
        instance_from_str=lambda words: _ANSWERS[words[0].lower()] if words else True,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(_ANSWERS),
    )


@dataclass(frozen=True)
class CommandLine:
    """Pretrain a vision-language model. Every setting has a default, a place in the recipe, and a flag.

    Order of precedence: flags, then the recipes of --config, the last one first, then the sizes of --preset, then the
    defaults shown.
    """

    run: RunConfig
    config: tuple[str, ...] = ()
    """YAML recipes; their sections are the groups below, and a later one overrides the earlier ones key by key."""
    preset: str | None = None
    """Model sizes by name. A recipe may name one too (`preset: NAME`)."""


def adapter(family: ModelFamily) -> TypeAdapter[RunConfig]:
    """pydantic's parser of nested dictionaries; see `plain` for what it makes."""
    return _adapter(_run_type(family))


def plain(typed: RunConfig) -> RunConfig:
    """Convert a parser's result to a `RunConfig`, so that runs of all families have one class."""
    return RunConfig(**{**vars(typed), "training": TrainingConfig(**vars(typed.training))})


def command_line_of(
    family: ModelFamily, run: RunConfig, config: tuple[str, ...], preset: str | None
) -> CommandLine:
    """The defaults of the flags: an instance of the class from which tyro builds its parser.

    Args:
        family: whose flags there are.
        run: the values without any flag.
        config: recipes that are named.
        preset: likewise.
    """
    run_type = _run_type(family)
    training = _training_type(_stage_names(family))(**vars(run.training))
    typed = run_type(**{**vars(run), "training": training})
    return _command_line_type(run_type, ", ".join(PRESETS))(run=typed, config=config, preset=preset)


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
    hint = Annotated[Literal[numbers], tyro.conf.arg(help=f"What trains: {named}.")]  # type: ignore[valid-type]
    usual = TrainingConfig.stage
    return _with_types(TrainingConfig, stage=(hint, usual if usual in numbers else numbers[0]))


@cache
def _command_line_type(run: type[RunConfig], presets: str) -> type[CommandLine]:
    preset = f"Model sizes by name: {presets}. A recipe may name one too (`preset: NAME`)."
    return _with_types(
        CommandLine,
        run=(Annotated[run, tyro.conf.arg(name="")], field()),
        preset=(Annotated[str | None, tyro.conf.arg(help=preset)], None),
    )


@cache
def _adapter(run: type[RunConfig]) -> TypeAdapter[RunConfig]:
    return TypeAdapter(run)


def _with_types(base: type[Any], **types: tuple[Any, Any]) -> type[Any]:
    """A subclass of a dataclass with other types and defaults of some fields.

    tyro reads the docstrings of fields from the source of the class, which it finds by module and name.
    """
    fields = [(name, hint, default) for name, (hint, default) in types.items()]
    made = make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    made.__module__, made.__qualname__, made.__doc__ = base.__module__, base.__qualname__, base.__doc__
    return made
