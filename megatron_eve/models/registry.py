"""Model families by name.

A family is found in one of three places: a folder of `megatron_eve/models/` that has a `family.py`, an installed
package with an entry point in the group `megatron_eve.families`, or a module that is named directly
(`package.module`). The first two have a module or an entry point with one object, `FAMILY`; see `family.py`.

A folder whose tower can be trained by itself also has a `tower_family.py` with an object `FAMILY`, whose name is the
folder's with `_tower` behind it; see `models/tower_family.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import get_protocol_members

from megatron_eve.models.family import ImagePlanner, ModelFamily
from megatron_eve.models.tower_family import TowerFamily
from megatron_eve.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron_eve.config.schema import RunConfig
    from megatron_eve.models.image_codes import ImageCodes

ENTRY_POINTS = "megatron_eve.families"
# The family of a run that names none, and of checkpoints from before there were several.
DEFAULT_FAMILY = "eve"
# The family of a run that trains a tower and names none.
DEFAULT_TOWER_FAMILY = "vila_u_tower"


class FamilyError(UserError, LookupError):
    """There is no such family, or it cannot be loaded; the message names it and those there are."""


def family_names() -> tuple[str, ...]:
    """The families there are, without those of towers: the package's own, then those of installed packages."""
    return tuple(dict.fromkeys([*_own_families(), *_installed_families()]))


def families() -> Iterator[ModelFamily]:
    """Every family there is, in the order of `family_names`."""
    return (find_family(name) for name in family_names())


def tower_family_names() -> tuple[str, ...]:
    """The families whose runs train a vision tower alone."""
    paths = sorted(Path(__file__).parent.glob(f"*/{_TOWER_FAMILY}.py"))
    return tuple(f"{path.parent.name}{_TOWER}" for path in paths)


def tower_families() -> Iterator[ModelFamily]:
    """Every one of these."""
    return (find_family(name) for name in tower_family_names())


def loaded_families() -> Iterator[ModelFamily]:
    """Every family there is, and those that this process was given by the name of a module (`find_family`)."""
    yield from families()
    yield from _NAMED.values()


# Ends the name of a family that trains a tower; the module that it is in.
_TOWER, _TOWER_FAMILY = "_tower", "tower_family"
# By name: families that are neither the package's own nor an installed package's.
_NAMED: dict[str, ModelFamily] = {}


@cache
def find_family(name: str, source: str = "--family") -> ModelFamily:
    """The family of this name.

    Args:
        name: a folder of `megatron_eve/models/`, one of `tower_family_names`, an entry point, or a module
            (`package.module`).
        source: what error messages call the place that names it.

    Raises:
        FamilyError: there is none, or it cannot be loaded.
    """
    named = f"{source} {name}"
    installed: EntryPoint | None = None
    if name in _own_families():
        return _checked(named, _family_in(f"megatron_eve.models.{name}.family"))
    if name in tower_family_names():
        return _checked(named, _family_in(f"megatron_eve.models.{name.removesuffix(_TOWER)}.{_TOWER_FAMILY}"))
    try:
        if (installed := _installed_families().get(name)) is not None:
            return _checked(named, installed.load())
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            _NAMED[name] = _checked(named, _family_in(name))
            return _NAMED[name]
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if installed is not None or not f"{name}.".startswith(f"{missing}."):
            raise FamilyError(f"{named}: it needs the module {missing}, which is not here") from None
    except FamilyError:
        raise
    except Exception as error:  # code of others raises whatever it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FamilyError(f"{named}: its module cannot be imported ({reason})") from error
    raise FamilyError(
        f"{named}: no such family; choose one of {', '.join(family_names())}, or name a module that has one "
        "(package.module)"
    )


def tower_family(name: str) -> TowerFamily | None:
    """The family of this name, if its runs train a tower; None if they train a decoder.

    Raises:
        FamilyError: there is none, or it cannot be loaded.
    """
    family = find_family(name)
    return family if isinstance(family, TowerFamily) else None


def code_families() -> tuple[str, ...]:
    """The package's families that have towers which make codes of pictures; see `find_image_codes`."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/image_codes.py")))


def find_image_codes(name: str) -> ImageCodes:
    """What makes codes of pictures: `IMAGE_CODES` of the module `image_codes` in the folder of a family.

    A folder may have that module without a `family.py`: its towers are of use without a decoder that reads codes.

    Args:
        name: of one of `code_families`, or a module beside that module, as for `find_family`.

    Raises:
        FamilyError: there is none.
    """
    folder = f"megatron_eve.models.{name}" if name in code_families() else name.rpartition(".")[0]
    try:
        codes: ImageCodes = import_module(f"{folder}.image_codes").IMAGE_CODES
        return codes
    except (ModuleNotFoundError, TypeError) as error:  # TypeError: a relative name, where the folder is none
        missing = getattr(error, "name", None) or ""
        if folder and not f"{folder}.image_codes.".startswith(f"{missing}."):
            raise FamilyError(f"--family {name}: it needs the module {missing}, which is not here") from None
        raise FamilyError(
            f"--family {name}: has no towers that make codes of pictures; choose one of {', '.join(code_families())}"
        ) from None


def image_planner(config: RunConfig) -> ImagePlanner:
    """What pictures become in a run.

    Raises:
        FamilyError: its family is not here.
        ValueError: image settings that do not go together.
    """
    family = find_family(config.family)
    return family.image_planner(family.image_settings(config))


def _family_in(module: str) -> object:
    return getattr(import_module(module), "FAMILY", None)


def _own_families() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/family.py")))


def _installed_families() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _checked(named: str, family: object) -> ModelFamily:
    """The object, if it has all that a family has."""
    if isinstance(family, ModelFamily):
        return family
    if family is None:
        raise FamilyError(f"{named}: its module has no FAMILY; see megatron_eve/models/family.py")
    lacks = [member for member in sorted(get_protocol_members(ModelFamily)) if not hasattr(family, member)]
    raise FamilyError(f"{named}: its FAMILY lacks {', '.join(lacks)}; see megatron_eve/models/family.py")
