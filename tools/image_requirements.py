#!/usr/bin/env python3
"""What to install into a container image that brings torch and TransformerEngine, and what to leave as it is there.

    python tools/image_requirements.py requirements

Run by the Python of the image, from the root of the checkout (the Dockerfile does so). It stops when the image's
TransformerEngine is not one that megatron-core works with, and otherwise writes

    FOLDER/kept.txt           the versions of torch, TransformerEngine, DALI and their like that the image has
    FOLDER/tested.txt         versions of constraints/cu13.txt for packages that the image lacks
    FOLDER/requirements.txt   this package's dependencies, without torch

torch is left out: an image's own build has a pre-release version (2.10.0a0+...), which does not satisfy `torch>=2.10`,
so pip would install another.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What megatron-core 0.16.1 asks for.
LOWEST, BELOW = (2, 9), (2, 12)
# Compiled against each other in the image; pip must not bring others.
KEPT = re.compile(
    r"torch|torchvision|(pytorch-)?triton|transformer-engine.*|flash-attn.*|apex|nvidia-.*|cuda-.*"
)


def normalised(name: str) -> str:
    """A package's normalised name, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_transformer_engine(installed: dict[str, str]) -> None:
    """Stop unless the image has a TransformerEngine of the right versions."""
    version = installed.get("transformer-engine")
    if version is None:
        sys.exit(
            "error: this image has no TransformerEngine; build from an NVIDIA PyTorch image (--build-arg BASE=...)"
        )
    numbers = tuple(int(number) for number in version.split("+")[0].split(".")[:2])
    if not LOWEST <= numbers < BELOW:
        sys.exit(
            f"error: this image has TransformerEngine {version}, and megatron-core 0.16.1 takes >=2.9,<2.12; choose "
            "another month of NVIDIA's PyTorch image (--build-arg BASE=...)"
        )


def plan(installed: dict[str, str]) -> dict[str, list[str]]:
    """The lines of the three files, for an image with these packages (normalised name -> version)."""
    kept = [f"{name}=={version}" for name, version in sorted(installed.items()) if KEPT.fullmatch(name)]
    pins = [
        line.strip()
        for line in (ROOT / "constraints" / "cu13.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    lacking = [line for line in pins if normalised(line.split("==")[0]) not in installed]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [line for line in project["dependencies"] if not re.match(r"torch\b", line)]
    if not any(name.startswith("nvidia-dali") for name in installed):
        requirements += [line for line in lacking if line.startswith("nvidia-dali")]
    return {"kept": kept, "tested": lacking, "requirements": requirements}


def main() -> None:
    """Check and write."""
    # This package is not installed in the image yet.
    sys.path.insert(0, str(ROOT))
    from megatron_eve.runtime.command_line import command_parser_of

    parser = command_parser_of(__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder to write; it is made if it is missing"
    )
    folder: Path = parser.parse_args().folder
    installed = {normalised(one.metadata["Name"]): one.version for one in metadata.distributions()}
    check_transformer_engine(installed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in plan(installed).items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(
        f"torch {installed.get('torch')} and TransformerEngine {installed['transformer-engine']} stay as they are"
    )


if __name__ == "__main__":
    main()
