"""Types of settings that say more than Python's: how `--help` shows them, and what a recipe may write for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Flag:
    """How `--help` shows a setting, as metadata of its type: `folder: Annotated[str | None, Flag("DIR", "none")]`.

    Attributes:
        metavar: what stands for the value: DIR, FILE, PX ...; where it is empty, N or X for a number.
        unset: what holds while the setting is None or empty, shown as its default.
        text: the setting's text, where it is not the docstring below the field.
    """

    metavar: str = ""
    unset: str = ""
    text: str = ""


class _Words:
    """Annotates words of which a recipe may leave the brackets of a single one out, and write a weight as a number.

    Asked by pydantic, which is not imported here: a process that reads no recipe starts without it.
    """

    @staticmethod
    def as_words(value: Any) -> Any:
        """What the recipe holds, as words where it is words or numbers."""
        if value is None:
            return []
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple):
            return words
        return [str(word) if isinstance(word, int | float) else word for word in words]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.as_words, handler(source))


Words = Annotated[tuple[str, ...], _Words()]
