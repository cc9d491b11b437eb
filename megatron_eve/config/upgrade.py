"""Converts configurations of older versions to the current form.

Recipes of users, `config.yaml` and the configuration in `common.pt` of checkpoints are nested dictionaries of sections.
The family knows which of its keys have moved; this file handles what concerns every family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_eve.models.registry import DEFAULT_FAMILY, find_family

LineOf = Callable[[tuple[Any, ...]], int]
"""Maps a key's path, outermost first, to its line in a file."""


def upgrade_saved(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint in the current form; `tree` is not changed.

    Args:
        tree: as an older version or this one wrote it. One without a family is from before there were several.

    Raises:
        FamilyError: a family that is not installed.
    """
    named = {"family": DEFAULT_FAMILY, **tree}
    return find_family(named["family"]).upgrade(_copy(named))


def upgrade_recipe(recipe: dict[str, Any], family: str, line_of: LineOf) -> tuple[dict[str, Any], LineOf]:
    """A recipe in the current form, and the lines of its keys.

    A key that is in both its old and its new place stays in the old one, so that the parser reports it.

    Args:
        recipe: as it was read, without its family.
        family: by name.
        line_of: of the recipe's own keys.
    """
    upgrade = find_family(family).upgrade
    # Upgraded like the recipe itself, a tree of each key's old place tells where it came from.
    places = upgrade(
        {
            section: {key: (section, key) for key in part} if isinstance(part, dict) else (section,)
            for section, part in recipe.items()
        }
    )

    def new_line_of(keys: tuple[Any, ...]) -> int:
        section = places.get(keys[0]) if keys else None
        place = section.get(keys[1]) if isinstance(section, dict) and len(keys) > 1 else None
        return line_of((*place, *keys[2:]) if isinstance(place, tuple) else keys)

    return upgrade(_copy(recipe)), new_line_of


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(part) if isinstance(part, dict) else part for name, part in tree.items()}
