"""Families stay apart: nothing outside a family's folder names a family, its teacher, or its settings.

Read are the package, `tools/` and `slurm/launch.sh`. What is looked for comes from the registry: the names of the
families of the package and the fields of their configurations, and a few words that only a family has a use for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_eve.models.registry import code_families, family_names, find_family

ROOT = Path(__file__).resolve().parents[1]
OWN = [
    name for name in (*family_names(), *code_families()) if (ROOT / "megatron_eve" / "models" / name).is_dir()
]

# Where a family may be named: its own folder, the registry (which has the default), and `import megatron_eve.hf`,
# which stays the public entry for transformers.
MAY_NAME = tuple(
    [f"megatron_eve/models/{name}/" for name in OWN] + ["megatron_eve/hf/", "megatron_eve/models/registry.py"]
)

# What may stay: by file or folder, what is matched there and why.
EXCEPTIONS = {
    "megatron_eve/curation/": {
        "EVE": "a paper whose data is made, and its published instructions",
        "eve": "the name of these instructions, eve_hd",
        "VILA": "a paper whose selection is a flag's default",
        "CLIP": "a type of towers, and the scores of published metadata",
        "clip": "in the names of these scores",
        "image_size": "transformers' name in the config.json of a vision tower",
    },
    "megatron_eve/data/text/questions.py": {"EVE": "a paper, whose words for questions these are"},
    "megatron_eve/data/format/compatible.py": {"vision-tower": "the flag that is the remedy"},
    "megatron_eve/doctor/perceptual_files.py": {"vila": "a page of the documentation"},
    "megatron_eve/evaluation/tasks/": {
        "eve": "tasks are named by the paper whose protocol they follow, as eve_pope",
        "EVE": "the paper",
        "vila": "as vila_okvqa",
        "VILA": "the paper",
    },
    "megatron_eve/models/towers/normalisation.py": {"clip": "a type of towers, beside siglip"},
    "megatron_eve/models/towers/tower_module.py": {
        "CLIP": "transformers' tower that the module is made of",
        "clip": "a model type of transformers",
        "image_size": "transformers' name in the configuration of a vision tower",
    },
    "megatron_eve/models/towers/sizes.py": {
        "CLIP": "a type of towers, beside SigLIP",
        "clip": "a model type of transformers, which loads the towers",
        "image_size": "transformers' name in the config.json of a vision tower",
    },
}


def patterns() -> list[re.Pattern[str]]:
    """What to look for: names of families, names of their settings, and words of theirs."""
    # A name may stand inside an identifier (eve_tiny, EVEConfig), not inside a word; the package's own is no mention,
    # nor is a repository that is cited.
    names = "|".join(map(re.escape, OWN))
    found = [
        re.compile(rf"(?<!megatron[_-])(?<!NVlabs/)(?<![A-Za-z])(?:{names})(?![A-Za-z])", re.IGNORECASE),
        re.compile(rf"(?<![A-Za-z])(?:{names.upper()})(?=v\d|[A-Z][a-z])"),
        re.compile(r"teacher|(?<![a-z])aligning|align[ _-]loss|patch[ _-]?embedding", re.IGNORECASE),
        re.compile(r"\bCLIP\b|(?<=[\"'/])clip(?=[\"'_-])(?!_grad)"),  # not a gradient's, nor a video's
    ]
    settings = {
        field.name for name in family_names() if name in OWN for field in fields(find_family(name).Config)
    }
    written = {setting.replace("_", "[_-]") for setting in settings}
    return [*found, re.compile(rf"(?<![A-Za-z_])(?:{'|'.join(sorted(written))})(?![A-Za-z_])")]


def files(root: Path) -> Iterator[Path]:
    """Files that name no family."""
    for folder in ("megatron_eve", "tools"):
        yield from sorted((root / folder).rglob("*.py"))
    if (launch := root / "slurm" / "launch.sh").exists():
        yield launch


def mentions(root: Path) -> list[str]:
    """`file:line: what: the line` for each mention that nothing excuses."""
    found, sought = [], patterns()
    for path in files(root):
        name = path.relative_to(root).as_posix()
        if name.startswith(MAY_NAME):
            continue
        excused = {what for place, some in EXCEPTIONS.items() if name.startswith(place) for what in some}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            matched = {match.group() for pattern in sought for match in pattern.finditer(line)}
            found += [
                f"{name}:{number}: {what}: {line.strip()[:100]}"
                for what in sorted(matched)
                if what not in excused
            ]
    return found


def test_nothing_outside_its_folder_names_a_family() -> None:
    found = mentions(ROOT)
    assert not found, "\n".join([f"{len(found)} mentions of a family outside its folder:", *found])


@pytest.mark.parametrize(
    "line",
    [
        "# as EVE does",
        'EXAMPLE = "examples/eve_tiny"',
        "from megatron_eve.models.eve.config import upgrade",
        "loss = EVEConfig()",
        "# as EVEv1 does",
        "width = config.vision.teacher_hidden_size",
        '"--teacher-model DIR"',
        "config.vision.tap_interval",
        "add --align-loss-weight 0.5",
        "# the teacher's patches",
        "CLIP ViT-L/14",
        "# The patch embedding",
        "the aligning layer",
    ],
)
def test_a_mention_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "megatron_eve" / "training").mkdir(parents=True)
    planted = tmp_path / "megatron_eve" / "training" / "step.py"
    planted.write_text(f"import math\n{line}\n")
    assert mentions(tmp_path) and all(
        text.startswith("megatron_eve/training/step.py:2") for text in mentions(tmp_path)
    )
    inside = tmp_path / "megatron_eve" / "models" / OWN[0]
    inside.mkdir(parents=True)
    planted.rename(inside / "step.py")
    assert not mentions(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "from megatron_eve.runtime import logs",
        'BATCH = "MEGATRON_EVE_THREADS"',
        "events, every, never, even, Event",
        "np.clip(x, 0, 1); torch.clip(x); clip_grad_norm_(model); 'clip_grad' --clip-grad 1.0",
        "td { text-align: left }  # aligned to 16 bytes",
        "clip.mp4, clip.txt",
        "planner.image_settings",
    ],
)
def test_what_is_no_mention_passes(tmp_path: Path, line: str) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "chat.py").write_text(line)
    assert not mentions(tmp_path)


def test_no_exception_is_left_over() -> None:
    for name, reasons in EXCEPTIONS.items():
        text = "".join(
            path.read_text(encoding="utf-8")
            for path in files(ROOT)
            if str(path.relative_to(ROOT)).startswith(name)
        )
        assert all(what in text for what in reasons), f"{name}: an exception is left over, of {reasons}"
