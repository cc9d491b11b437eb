"""Which packages are installed, in which versions, and whether they import."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Packages whose module has another name.
_MODULES = {
    "megatron-core": "megatron.core",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "pyyaml": "yaml",
}
_NAMESPACES = ("megatron", "nvidia")
EXTENSION = "fused_weight_gradient_mlp_cuda"  # of NVIDIA's apex; megatron-core imports it by this name


@dataclass(frozen=True)
class Package:
    """A package on this machine.

    Attributes:
        name: as pip calls it.
        version: None if it is not installed, "of unknown version" if there are only modules.
        wanted: versions that a run can use, such as ">=2.9,<2.12"; empty for any.
        error: the error of importing it; None if it imports or was not tried.
    """

    name: str
    version: str | None
    wanted: str = ""
    error: str | None = None

    @property
    def fits(self) -> bool:
        """True if it is installed in a wanted version."""
        return self.version is not None and satisfies(self.version, self.wanted)

    @property
    def works(self) -> bool:
        """True if it is installed in a wanted version and imports."""
        return self.fits and self.error is None


@dataclass(frozen=True)
class Packages:
    """The packages that matter to a run.

    Attributes:
        python: versions of Python that are wanted.
        required: the project's dependencies, torch and megatron-core among them.
        engine: TransformerEngine.
        flash_attention, dali, triton: optional, for GPUs.
        gradio: optional, for the chat's web page.
        extension: the part of NVIDIA's apex that accumulates weight gradients inside the matrix product.
        apex: which apex is installed, "NVIDIA" or "another project"; None if there is none.
    """

    python: str
    required: tuple[Package, ...]
    engine: Package
    flash_attention: Package
    dali: Package
    triton: Package
    gradio: Package
    extension: Package
    apex: str | None = None

    def one(self, name: str) -> Package:
        """A required package by its name; a `Package` without a version if it is not among them."""
        return next((package for package in self.required if package.name == name), Package(name, None))


def inspect_packages(pyproject: Path) -> Packages:
    """Look up all packages, and import those that a run imports.

    Args:
        pyproject: this project's pyproject.toml, which names the wanted versions.

    Raises:
        OSError: `pyproject` cannot be read.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = dict(map(_split, project["dependencies"]))
    return Packages(
        python=project["requires-python"],
        required=tuple(_inspect(name, versions) for name, versions in wanted.items()),
        engine=_inspect("transformer-engine", engine_versions(), "transformer_engine.pytorch"),
        flash_attention=_inspect("flash-attn"),
        dali=_inspect(_dali_name(), "", "nvidia.dali"),
        triton=_inspect("triton"),
        gradio=_inspect("gradio", module=None),  # takes seconds to import, and no run needs it
        extension=_inspect(EXTENSION),
        apex=_whose_apex(),
    )


def _inspect(name: str, wanted: str = "", module: str | None = "") -> Package:
    """Look up a package, and import its module unless that is None."""
    module = _MODULES.get(name, name.replace("-", "_")) if module == "" else module
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None and (module is None or not _is_there(module)):
        return Package(name, None, wanted)
    # Not megatron-core: `runtime.without_cuda` must run before it is imported, which `describe_plan` does later.
    error = None if module is None or name == "megatron-core" else import_error(module)
    return Package(name, version or "of unknown version", wanted, error)


def _is_there(module: str) -> bool:
    """True if the module is installed. Imports no code, so only namespace packages are searched for submodules."""
    top = module.split(".")[0]
    try:
        return importlib.util.find_spec(module if top in _NAMESPACES else top) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def import_error(module: str) -> str | None:
    """Import a module; returns the error in one line, or None if there was none."""
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled packages raise anything: OSError, RuntimeError, AssertionError ...
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line}"
    return None


def engine_versions() -> str:
    """TransformerEngine versions that the installed megatron-core requires; empty if that is not installed."""
    try:
        requirements = metadata.requires("megatron-core") or []
    except metadata.PackageNotFoundError:
        return ""
    return dict(map(_split, requirements)).get("transformer-engine", "")


def _dali_name() -> str:
    """Name of the installed DALI package, which contains its CUDA version."""
    names = (one.metadata["Name"] or "" for one in metadata.distributions())
    return next((name for name in names if name.startswith("nvidia-dali")), "nvidia-dali")


def _whose_apex() -> str | None:
    """Which apex is installed. PyPI's `apex` is another project; NVIDIA's always has one of these two folders."""
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    ours = any((folder / name).is_dir() for folder in folders for name in ("normalization", "contrib"))
    return "NVIDIA" if ours else "another project"


def _split(requirement: str) -> tuple[str, str]:
    """Name and versions of a requirement in pip's format, without extras and markers."""
    match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", requirement)
    assert match is not None
    return match[1].lower(), match[2].replace(" ", "").strip("()")


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without trailing zeros: (2, 10) for "2.10.0a0+local"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def satisfies(version: str, wanted: str) -> bool:
    """True if a version is among those wanted (clauses of >=, < and ==).

    Pre-releases count as their release, since containers have builds such as 2.10.0a0; an unknown version satisfies.
    """
    if not numbers(version):
        return True
    compare = {"==": numbers(version).__eq__, ">=": numbers(version).__ge__, "<": numbers(version).__lt__}
    clauses = re.findall(r"(>=|==|<)([\w.+]+)", wanted)
    return all(compare[sign](numbers(bound)) for sign, bound in clauses)
