"""Trees of settings that older versions wrote, brought into today's form.

Recipes of users, `config.yaml` and the configuration in `common.pt` of checkpoints are nested dictionaries of sections.
Which keys have moved is the family's to know; what concerns every family stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_eve.models.registry import DEFAULT_FAMILY, find_family

LineOf = Callable[[tuple[Any, ...]], int]
"""Keys, outermost first, to the line of a file that they stand on."""


def upgrade_saved(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint in today's form; the tree itself is not changed.

    Args:
        tree: as an older version or this one wrote it. One without a family is from before there were several.

    Raises:
        FamilyError: a family that is not here.
    """
    named = {"family": DEFAULT_FAMILY, **tree}
    return find_family(named["family"]).upgrade(_copy(named))


def upgrade_recipe(recipe: dict[str, Any], family: str, line_of: LineOf) -> tuple[dict[str, Any], LineOf]:
    """A recipe in today's form, and the lines on which its keys stand.

    A key that stands both where it stood and where it stands now is left in the old place, for the parser to refuse.

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
