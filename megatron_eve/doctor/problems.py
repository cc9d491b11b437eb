"""Problems of a machine and possible improvements, each with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_eve.doctor.packages import EXTENSION, Package, Packages, numbers, satisfies
from megatron_eve.runtime.machine import Gpu, Machine, cudnn_attends_to_packs

# GiB that NCCL and data workers need in /dev/shm; containers have 64 MiB by default.
_SHM = 1.0
_GPU_INSTALL = "make install-gpu CUDA=12, or CUDA=13"


@dataclass(frozen=True)
class Problem:
    """A problem or a possible improvement of a machine.

    Attributes:
        what: the problem.
        remedy: what to do.
        breaks: True if something installed is broken or wrong, or a run cannot start; False for an improvement.
    """

    what: str
    remedy: str
    breaks: bool = True


def find_problems(machine: Machine, packages: Packages) -> list[Problem]:
    """All known problems of a machine and its packages; those that break a run come first."""
    found = [
        *_python(machine, packages),
        *_required(machine, packages),
        *_torch(machine),
        *_engine(machine, packages),
        *_optional(machine, packages),
        *_apex(machine, packages),
        *_shared_memory(machine),
    ]
    return sorted(found, key=lambda problem: not problem.breaks)


def _python(machine: Machine, packages: Packages) -> Iterator[Problem]:
    if not satisfies(machine.python, packages.python):
        yield Problem(
            f"Python {machine.python}: this project wants {packages.python}", "make install PYTHON=python3.11"
        )


def _required(machine: Machine, packages: Packages) -> Iterator[Problem]:
    install = _GPU_INSTALL if machine.gpus else "make install"
    missing = [package.name for package in packages.required if package.version is None]
    if missing:
        note = " (without psutil, saving a checkpoint hangs)" if "psutil" in missing else ""
        yield Problem(f"not installed: {', '.join(missing)}{note}", install)
    for package in packages.required:
        if package.version is not None and not package.fits:
            # megatron-core: no other version works, so give the reason.
            reason = ", the only version this code was tested with" if package.wanted.startswith("==") else ""
            yield Problem(
                f"{package.name} {package.version}: {package.wanted} is wanted{reason}",
                f"pip install '{package.name}{package.wanted}', or {install}",
            )
        if package.error is not None:
            yield _does_not_import(package, install)


def _does_not_import(package: Package, remedy: str, *, breaks: bool = True) -> Problem:
    return Problem(f"{package.name} {package.version} does not import: {package.error}", remedy, breaks)


def _torch(machine: Machine) -> Iterator[Problem]:
    torch = machine.torch
    if torch is None or not machine.gpus:
        return
    if torch.cuda is None:
        yield Problem(
            f"torch {torch.version} is a build for CPUs, and this machine has {machine.gpus[0].name}",
            _GPU_INSTALL,
        )
    elif torch.refusal is not None:
        yield Problem(
            f"torch {torch.version} cannot use the GPU: {torch.refusal}",
            f"a driver that knows CUDA {torch.cuda} (this is {machine.driver or 'none'}), or torch for an older CUDA",
        )
    for gpu in dict.fromkeys(torch.gpus):
        if not has_kernels(gpu, torch.architectures):
            yield Problem(
                f"torch {torch.version} has no kernels for {gpu.name} ({capability(gpu)}), only for "
                f"{', '.join(torch.architectures)}",
                "a torch that was built for this GPU",
            )
    if torch.cuda is not None and torch.nccl is None:
        yield Problem(f"torch {torch.version} comes without NCCL", _GPU_INSTALL)


def capability(gpu: Gpu) -> str:
    """A GPU's compute capability as text."""
    return f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"


def has_kernels(gpu: Gpu, architectures: tuple[str, ...]) -> bool:
    """True if a build for these architectures runs on a GPU, or if they are unknown.

    Machine code (sm) runs on GPUs of the same major version with the same or a higher minor version, PTX (compute) on
    all newer ones, too; with a letter at the end both run on the same major version only.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if match is None:
            return True
        built = (int(match[2]), int(match[3]))
        anywhere = match[1] == "compute" and not match[4]
        if gpu.capability >= built and (anywhere or gpu.capability[0] == built[0]):
            return True
    return not architectures


def _engine(machine: Machine, packages: Packages) -> Iterator[Problem]:
    engine = packages.engine
    if engine.version is None:
        if machine.gpus:
            yield Problem(
                "a GPU, and no TransformerEngine: layers of torch, neither FP8 nor its attention",
                _GPU_INSTALL,
                breaks=False,
            )
        return
    if not engine.fits:
        yield Problem(
            f"TransformerEngine {engine.version}: megatron-core wants {engine.wanted}",
            f"{_GPU_INSTALL} installs 2.11",
        )
    if engine.error is not None:
        # It is compiled against CUDA and may fail to import without a driver, such as on a login node.
        yield Problem(
            f"TransformerEngine {engine.version} does not import: {engine.error}",
            f"{_GPU_INSTALL}, which compiles it against the torch that is installed"
            if machine.gpus
            else "look again on a machine with a GPU",
            breaks=bool(machine.gpus),
        )
        return
    if not machine.gpus or packages.flash_attention.works:
        return
    if not cudnn_attends_to_packs(machine.gpus[0].capability):
        yield Problem(
            f"{machine.gpus[0].name}: cuDNN has no attention over packs for it, so torch's layers are taken instead of "
            "TransformerEngine's",
            "pip install --no-build-isolation 'flash-attn<3'; optional",
            breaks=False,
        )


def _optional(machine: Machine, packages: Packages) -> Iterator[Problem]:
    """Packages that only make a run on GPUs faster."""
    for package in (packages.flash_attention, packages.triton, packages.dali):
        if package.error is not None:
            remedy = f"install it again, or pip uninstall {package.name}"
            yield _does_not_import(package, remedy, breaks=bool(machine.gpus))
    if not machine.gpus:
        return
    dali, torch = packages.dali, machine.torch
    if dali.version is None:
        yield Problem("no DALI: pictures are decoded on the CPU, by threads", _GPU_INSTALL, breaks=False)
    built = re.search(r"cuda(\d+)0$", dali.name)
    if built and torch is not None and torch.cuda is not None and int(built[1]) != numbers(torch.cuda)[0]:
        yield Problem(
            f"{dali.name} is for CUDA {built[1]}, torch for CUDA {torch.cuda}",
            f"pip install nvidia-dali-cuda{numbers(torch.cuda)[0]}0 in its place",
            breaks=False,
        )
    if packages.triton.version is None:
        yield Problem("no Triton: torch compiles nothing", _GPU_INSTALL, breaks=False)


def _apex(machine: Machine, packages: Packages) -> Iterator[Problem]:
    build = "build NVIDIA's apex from its sources (--cpp_ext --cuda_ext)"
    if packages.apex == "another project":
        yield Problem("`apex` is PyPI's, another project than NVIDIA's", f"pip uninstall apex; or {build}")
    if packages.extension.error is not None and machine.gpus:
        yield Problem(
            f"{EXTENSION} does not import: {packages.extension.error}", f"{build} against this torch"
        )
    elif packages.extension.version is None and machine.gpus:
        without = "NVIDIA's apex was built without" if packages.apex == "NVIDIA" else "no"
        yield Problem(
            f"{without} {EXTENSION}: the output layer's weight gradient takes a kernel more",
            f"{build}; optional",
            breaks=False,
        )


def _shared_memory(machine: Machine) -> Iterator[Problem]:
    if machine.shm is not None and machine.shm < _SHM:
        yield Problem(
            f"/dev/shm has {machine.shm * 1024:,.0f} MiB free: several ranks on this machine may fail",
            "docker run --shm-size=8g, --ipc=host, or remove files there",
            breaks=False,
        )
