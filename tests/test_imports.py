"""The drawing in docs/architecture.md: folders of the package import downwards only, and no import is a loop.

All imports are read from the files: at their tops, in functions, and for type checkers alone.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from megatron_eve.models.registry import families

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_eve"

# A file imports from its own folder and from those of lower levels, so folders import each other without a loop.
LEVELS = (
    {"runtime"},
    {"config"},
    {"data", "models", "hf"},
    {"checkpoint"},
    {"training", "convert"},
    {"inference"},
    {"verification", "evaluation", "curation"},
    {"doctor", "preflight"},
    {"pretrain"},
    {"train_tower"},
)
LEVEL = {folder: number for number, folders in enumerate(LEVELS) for folder in folders}

# Files that count as part of another folder. The interface of model families and the list of them: the settings ask the
# families for presets, stages and checks before torch is loaded, and the interface names the types of the settings.
COUNTS_AS = dict.fromkeys(
    (
        "models.family",
        "models.golden_format",
        "models.hf_format",
        "models.image_codes",
        "models.image_flags",
        "models.image_plan",
        "models.model_parts",
        "models.name_rules",
        "models.registry",
        "models.tensor_layouts",
        "models.text_format",
        "models.tower_family",
    ),
    "config",
)

# Folders of models/ that hold one model family. Nothing outside imports them: a family is handed to those who run it.
FAMILIES = ("models.eve", "models.eve2", "models.vila", "models.vila_u")
# Imports that break a rule and still exist, as (file, imported file). Do not add to this list: it only gets shorter.
EXCEPTIONS: set[tuple[str, str]] = set()


def modules() -> dict[str, Path]:
    """Dotted name below megatron_eve -> file; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the package itself holds its version alone
            found[name] = path
    return found


def imported(name: str, path: Path, known: Container[str]) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it the import stands."""
    package = ["megatron_eve", *name.split(".")][: None if path.stem == "__init__" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for full in names:
            if not full.startswith("megatron_eve."):
                continue
            below = full.removeprefix("megatron_eve.")
            while below and below not in known:
                below = below.rpartition(".")[0]  # a class or function: of the module before it
            if below and below != name:
                yield below


MODULES = modules()
ARROWS = {(name, other) for name, path in MODULES.items() for other in imported(name, path, MODULES)}


def folder(module: str) -> str:
    return COUNTS_AS.get(module, module.split(".")[0])


def of_a_family(module: str, family: str) -> bool:
    return module == family or module.startswith(f"{family}.")


def forbidden(arrows: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that do not point down, and those into a family's folder from outside."""
    return {
        (a, b)
        for a, b in arrows
        if (folder(a) != folder(b) and LEVEL[folder(a)] <= LEVEL[folder(b)])
        or any(of_a_family(b, family) and not of_a_family(a, family) for family in FAMILIES)
    }


def loop(arrows: Iterable[tuple[str, str]]) -> list[str] | None:
    """The members of one loop of arrows, None without any."""
    graph: dict[str, set[str]] = {}
    for start, end in arrows:
        graph.setdefault(start, set()).add(end)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_every_folder_has_a_level() -> None:
    assert {folder(name) for name in MODULES} == set(LEVEL)
    assert all(name in MODULES for name in (*FAMILIES, *COUNTS_AS))


def test_imports_point_down_and_into_no_family() -> None:
    new = sorted(forbidden(ARROWS) - EXCEPTIONS)
    assert not new, "\n".join(f"{a} imports {b}: see LEVELS and FAMILIES above" for a, b in new)


def test_the_code_of_exported_folders_imports_nothing_of_the_package_but_each_other() -> None:
    for family in families():
        presets = [preset.vision for preset in family.presets.values()]
        code = {path.resolve() for vision in presets for path in family.hugging_face().code(vision)}
        copied = {name for name, path in MODULES.items() if path in code}
        assert len(copied) == len(code)
        assert {other for name, other in ARROWS if name in copied} <= copied


def test_every_exception_is_still_needed() -> None:
    gone = sorted(EXCEPTIONS - forbidden(ARROWS))
    assert not gone, f"strike these off EXCEPTIONS: {gone}"


def test_files_import_each_other_without_a_loop() -> None:
    assert loop(ARROWS) is None


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch\n"
        "import megatron_eve.data.batch\n"
        "from megatron_eve.config import RunConfig\n"
        "if TYPE_CHECKING:\n"
        "    from megatron_eve.data.sampling.loader import Step\n"
        "def work():\n"
        "    from megatron_eve.models.decoder import model\n"
        "    from megatron_eve.runtime import errors as e\n"
        "    from ..hf import thing\n"
    )
    known = {
        "data",
        "data.batch",
        "data.sampling.loader",
        "config",
        "models",
        "models.decoder.model",
        "runtime.errors",
        "hf",
    }
    found = set(imported("training.some", file, known))
    assert found == {
        "data.batch",
        "config",
        "data.sampling.loader",
        "models.decoder.model",
        "runtime.errors",
        "hf",
    }


def test_loops_and_forbidden_imports_are_found() -> None:
    assert loop([("a", "b"), ("b", "c")]) is None
    assert set(loop([("a", "b"), ("b", "c"), ("c", "a")]) or ()) == {"a", "b", "c"}
    fine = {("config.schema", "runtime.errors"), ("models.eve.teacher", "models.eve"), ("data.a", "data.b")}
    fine |= {("config.schema", "models.registry"), ("models.family", "config.schema")}
    to_model = ("models.registry", "models.decoder.model")
    up, sideways = ("runtime.errors", "config.schema"), ("data.batch", "models.decoder.model")
    family = ("training.loop.step", "models.eve.teacher")
    assert forbidden({*fine, up, sideways, family, to_model}) == {up, sideways, family, to_model}
