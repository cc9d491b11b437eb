"""Every reason for which a row is skipped is in the one table, with what to do about it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron_eve.data.reasons import REASONS
from tests.data.helpers import ROOT

DATA = ROOT / "megatron_eve" / "data"
_ERRORS = ("SkipRow", "ConversationError", "ImageError")
# Of prompts, which are no rows: `prompt_text`.
_OF_PROMPTS = {"image_in_answer"}


def strings(node: ast.AST) -> Iterator[str]:
    """The texts in an expression, or its first element if it is a tuple of a reason and a detail."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple) and node.elts:
        yield from strings(node.elts[0])
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)


def reasons_of(tree: ast.AST) -> Iterator[str]:
    """Reasons of a module: of the errors it raises, of `reason` variables, and of pairs (reason, detail)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name in _ERRORS and node.args:
                yield from strings(node.args[0])
            elif name == "RawRow" and len(node.args) == 4:
                yield from strings(node.args[3])
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id in ("reason", "problem") for target in node.targets
        ):
            yield from strings(node.value)
        elif isinstance(node, ast.FunctionDef) and "tuple[str, str]" in ast.unparse(
            node.returns or ast.Pass()
        ):
            for one in ast.walk(node):
                if isinstance(one, ast.Return) and isinstance(one.value, ast.Tuple | ast.IfExp):
                    yield from strings(one.value)


def test_every_reason_has_a_remedy_and_is_used() -> None:
    used: dict[str, Path] = {}
    constants: set[str] = set()
    for path in DATA.rglob("*.py"):
        if path.name == "reasons.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "inspecting" not in path.parts:
            used |= dict.fromkeys(reasons_of(tree), path)
        constants |= {
            one.value
            for one in ast.walk(tree)
            if isinstance(one, ast.Constant) and isinstance(one.value, str)
        }
    assert len(used) > 40
    assert not used.keys() - REASONS.keys() - _OF_PROMPTS, used
    assert not REASONS.keys() - constants  # none that no row is skipped for
    for name, (what, remedy) in REASONS.items():
        assert what and remedy, name
        assert not what.endswith(".") and not remedy.endswith("."), name  # clauses, that others stand in


def test_the_documentation_lists_every_reason() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [name for name in REASONS if f"`{name}`" not in page]
    assert not missing
