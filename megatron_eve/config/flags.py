"""The command line of a run: a flag for each setting, made from the dataclasses of `schema.py`.

A field gives its flag a name, a type, a default and, by the docstring below it, a text; `Flag` says the rest.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.flag_types import Flag
from megatron_eve.config.presets import presets_of
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.tower_runs import no_use_in_towers
from megatron_eve.models.registry import DEFAULT_FAMILY, DEFAULT_TOWER_FAMILY, tower_family
from megatron_eve.runtime.command_line import CommandParser, reworded

_EXAMPLES = """\
python -m megatron_eve.pretrain --mock-data --train-iters 5
torchrun --nproc-per-node 2 -m megatron_eve.pretrain --mock-data \\
    --train-iters 5 --tensor-model-parallel-size 2 --save runs/try
"""
_TOWER_EXAMPLES = """\
python -m megatron_eve.train_tower --data-path data/pairs \\
    --global-batch-size 16 --train-iters 100 --save runs/tower
"""
_DESCRIPTION = """\
{what} Each setting has a flag, a default, and a place in a YAML recipe (--config FILE), whose
sections are the groups below.

A flag overrides a recipe, a later recipe an earlier one, and a recipe the sizes of a preset. The defaults below are
those of the recipes and the preset that stand beside --help. The word None unsets what a recipe sets, as in
--exit-interval None.
"""


@dataclass(frozen=True)
class Command:
    """A command that trains.

    Attributes:
        prog: as it is typed.
        trains: what its runs train .
        family: of a run that names none.
        what: it does, in a sentence.
        examples: command lines.
    """

    prog: str
    trains: Literal["decoder", "tower"]
    family: str
    what: str
    examples: str


PRETRAIN = Command(
    "python -m megatron_eve.pretrain",
    "decoder",
    DEFAULT_FAMILY,
    "Train a vision-language model.",
    _EXAMPLES,
)
TRAIN_TOWER = Command(
    "python -m megatron_eve.train_tower",
    "tower",
    DEFAULT_TOWER_FAMILY,
    "Train a vision tower that makes codes of pictures, and pictures of codes, on pairs of a picture and a text.",
    _TOWER_EXAMPLES,
)


class FlagParser(CommandParser):
    """A parser whose mistakes are exceptions, so that the command can show them on one rank."""

    def error(self, message: str) -> NoReturn:
        """Refuse a flag.

        Raises:
            ConfigError: one sentence, or a line for each unknown flag.
        """
        raise ConfigError(reworded(message))


def flag_parser(run: RunConfig, command: Command, others: dict[str, str]) -> FlagParser:
    """The parser of a run's flags; it gives the values of those that are named, as `section.name`.

    Args:
        run: the values without any flag, in the types of a family (`family_types.typed`).
        command: whose page it is.
        others: what flags of other programs are called here.
    """
    presets = presets_of(command.trains)
    parser = FlagParser(
        prog=command.prog,
        description=_DESCRIPTION.format(what=command.what),
        examples=command.examples
        + "".join(f"{command.prog} --preset {name} --help\n" for name in presets[:1]),
        others=others,
        argument_default=argparse.SUPPRESS,
    )
    start = parser.add_argument_group(
        "configuration", "The settings that a run begins with, before other flags."
    )
    start.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="YAML recipes, of which a later one overrides the earlier ones key by key (default: no recipe)",
    )
    start.add_argument(
        "--preset",
        metavar="NAME",
        help=f"model sizes by name: {', '.join(presets)}; a recipe may name one, too (default: the sizes below)",
    )
    start.add_argument(
        "--family",
        metavar="NAME",
        help="model family: a name, or a module that has one (package.module) (default: that of the preset, or "
        f"{run.family})",
    )
    tower = tower_family(run.family) is not None
    for section in fields(run):
        if section.name != "family":
            _add_section(parser, section.name, getattr(run, section.name), tower)
    return parser


def _add_section(parser: CommandParser, name: str, section: Any, tower: bool) -> None:
    """A group of flags, one for each field of a section; the page does not show those that the run has no use for."""
    sentence = " ".join((inspect.getdoc(type(section)) or "").split("\n\n")[0].split())
    hidden = {field.name for field in fields(section) if tower and no_use_in_towers(name, field.name)}
    # Without a shown flag the group is left out of the page, if it has no text either.
    group = parser.add_argument_group(name, None if len(hidden) == len(fields(section)) else sentence)
    hints, texts = get_type_hints(type(section), include_extras=True), _field_texts(type(section))
    for field in fields(section):
        hint = hints[field.name]
        metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        shown = next((one for one in metadata if isinstance(one, Flag)), Flag())
        text = _as_clause(shown.text or texts.get(field.name, ""))
        default = _default_text(getattr(section, field.name), shown)
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"{name}.{field.name}",
            help=argparse.SUPPRESS
            if field.name in hidden
            else f"{text} (default: {default})".strip().replace("%", "%%"),
            **_reading(get_args(hint)[0] if metadata else hint, shown.metavar),
        )


def _as_clause(sentence: str) -> str:
    """A sentence as texts of flags are: without its full stop, and in lower case if it does not begin with a name."""
    first = sentence.partition(" ")[0]
    return (sentence[:1].lower() + sentence[1:] if first[1:].islower() else sentence).rstrip(".")


def _default_text(value: Any, shown: Flag) -> str:
    if value is None or value in ((), {}):
        return shown.unset or "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        value = [word for pair in value.items() for word in pair]
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reading(hint: Any, metavar: str) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    optional = get_origin(hint) in (types.UnionType, Union) and type(None) in get_args(hint)
    if optional:
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    if get_origin(hint) is tuple:
        return {"nargs": "*", "metavar": metavar or "NAME"}
    if get_origin(hint) is dict:
        return {"nargs": "*", "action": _Rates, "metavar": metavar}
    read: Callable[[str], Any] = hint
    if get_origin(hint) is Literal:
        read, metavar = _one_of(get_args(hint)), f"{{{','.join(map(str, get_args(hint)))}}}"
    metavar = metavar or {int: "N", float: "X"}.get(hint, "TEXT")
    return {"type": _or_none(read) if optional else read, "metavar": metavar}


def _truth(word: str) -> bool | None:
    values = {"true": True, "false": False, "none": None}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word}: must be true or false")
    return values[word.lower()]


def _one_of(values: Sequence[Any]) -> Callable[[str], Any]:
    words = {str(value): value for value in values}

    def read(word: str) -> Any:
        if word not in words:
            raise argparse.ArgumentTypeError(f"{word}: must be one of {', '.join(words)}")
        return words[word]

    return read


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def read_or_none(word: str) -> Any:
        return None if word == "None" else read(word)

    read_or_none.__name__ = read.__name__  # argparse names the type where the value is none of it
    return read_or_none


class _Rates(argparse.Action):
    """Reads names and numbers in turns into a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            rates = {name: float(rate) for name, rate in zip(values[::2], values[1::2], strict=True)}
        except ValueError:
            parser.error(f"{option_string}: takes globs and rates in turns, as in 'vision_model.*' 4e-4")
        setattr(namespace, self.dest, rates)


def _field_texts(section: type[Any]) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and its bases."""
    found: dict[str, str] = {}
    for one in reversed(section.__mro__):
        path = getattr(sys.modules.get(one.__module__), "__file__", None)
        if path and one is not object:
            found.update(_module_texts(path).get(one.__name__, {}))
    return found


@cache
def _module_texts(path: str) -> dict[str, dict[str, str]]:
    """Class -> field -> its docstring, of a file of Python."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: dict(_docstrings(node.body)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docstrings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, " ".join(str(below.value.value).split())
