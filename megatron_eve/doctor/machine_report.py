"""The report of `tools/doctor.py`: machine, packages, what a run would use, and problems with remedies."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.doctor.packages import EXTENSION, Package, Packages, inspect_packages
from megatron_eve.doctor.perceptual_files import perceptual_files
from megatron_eve.doctor.plan import ReportLine, describe_plan
from megatron_eve.doctor.problems import Problem, capability, find_problems
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.machine import Gpu, Machine, inspect_machine

_LABEL, _WIDTH = 18, 118


def examine(
    pyproject: Path, perceptual_weights: Path | None = None, perceptual_linear: Path | None = None
) -> tuple[str, bool]:
    """Inspect this machine and write the report.

    Args:
        pyproject: this project's pyproject.toml, which names the wanted versions.
        perceptual_weights: file with the weights of the perceptual loss; None looks at none.
        perceptual_linear: file with its five maps, if they are not in that one.

    Returns:
        The report, and True if a run can start here and nothing installed is broken or wrong.

    Raises:
        OSError: `pyproject` cannot be read.
    """
    with _quiet():
        machine, packages = inspect_machine(), inspect_packages(pyproject)
        problems = find_problems(machine, packages)
        try:
            plan = describe_plan(accelerator(), packages)
        except Exception as error:  # a broken installation can raise anything
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            plan = [("nothing", reason)]
            if not any(problem.breaks for problem in problems):
                problems = [Problem(f"no run can be prepared: {reason}", "make install"), *problems]
        if perceptual_weights is not None:
            line, problem = perceptual_files(perceptual_weights, perceptual_linear)
            plan, problems = [*plan, line], [*([problem] if problem else []), *problems]
    return report(machine, packages, plan, problems), not any(problem.breaks for problem in problems)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about missing packages while packages are imported; the report lists those."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def report(
    machine: Machine, packages: Packages, plan: Sequence[ReportLine], problems: Sequence[Problem]
) -> str:
    """The report as text, in groups."""
    breaks = [problem for problem in problems if problem.breaks]
    advice = [problem for problem in problems if not problem.breaks]
    groups = [
        ("machine", map(_line, _machine_rows(machine))),
        ("packages", map(_line, _package_rows(packages))),
        ("what a run would take here, with --bf16", map(_line, plan)),
        ("problems", map(_item, breaks)),
        ("could be better", map(_item, advice)),
    ]
    text = "\n\n".join("\n".join([title, *lines]) for title, found in groups if (lines := list(found)))
    number = (
        f"{len(breaks)} problem{'s' * (len(breaks) > 1)} to solve first" if breaks else "a run can start here"
    )
    return f"{text}\n\n{number}"


def _line(line: ReportLine) -> str:
    return _fill(line[1], f"  {line[0]:<{_LABEL}} ", " " * (_LABEL + 3))


def _item(problem: Problem) -> str:
    return f"{_fill(problem.what, '  - ', '    ')}\n{_fill(f'remedy: {problem.remedy}', '    ', '    ')}"


def _fill(text: str, first: str, others: str) -> str:
    """Wrap a paragraph, with a prefix for its first line and one for the others; flags are not split at hyphens."""
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _machine_rows(machine: Machine) -> Iterator[ReportLine]:
    yield "Python", f"{machine.python}, {machine.executable}"
    yield "system", machine.system
    yield "cores", str(machine.cores)
    yield "memory", f"{_gib(machine.memory)}, {_gib(machine.free_memory)} free"
    yield "free space", f"{_gib(machine.disk)} in this folder, {_gib(machine.shm)} in /dev/shm"
    yield "GPUs", _gpus(machine)
    torch = machine.torch
    if torch is not None:
        libraries = [
            f"{name} {version or 'none'}"
            for name, version in (("CUDA", torch.cuda), ("cuDNN", torch.cudnn), ("NCCL", torch.nccl))
        ]
        yield "torch was built", f"with {', '.join(libraries)}" if torch.cuda else "for CPUs"
        if torch.peers is not None:
            yield "between GPUs", f"each can{'' if torch.peers else 'not'} read the others' memory"
    there = "sbatch and srun are here; srun python tools/doctor.py looks at a node"
    yield "Slurm", there if machine.slurm else "none"


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size:,.1f} GiB"


def _gpus(machine: Machine) -> str:
    """The GPUs, and which of them a run can use."""
    gpus = machine.gpus or machine.driver_gpus
    if not gpus:
        return "none" if machine.driver is None else f"none, with driver {machine.driver}"
    text = ", ".join(f"{number} x {_gpu(gpu)}" for gpu, number in Counter(gpus).items())
    if machine.driver is not None:
        text += f"; driver {machine.driver}"
    if machine.hidden:
        text += "; hidden by CUDA_VISIBLE_DEVICES"
    elif len(gpus) < len(machine.driver_gpus):
        text += f"; torch sees {len(gpus)} of {len(machine.driver_gpus)}"
    return text


def _gpu(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.memory:.1f} GiB, {capability(gpu)})"


def _package_rows(packages: Packages) -> Iterator[ReportLine]:
    """The most important packages on a line each, the others on one line."""
    shown = ("torch", "megatron-core", "transformers")
    for name in shown:
        yield name, _state(packages.one(name))
    yield "TransformerEngine", _state(packages.engine)
    yield "flash-attn", _state(packages.flash_attention)
    yield "NVIDIA's apex", _apex(packages)
    yield "DALI", _state(packages.dali) + (f" ({packages.dali.name})" if packages.dali.version else "")
    yield "triton", _state(packages.triton)
    yield "gradio", f"{_state(packages.gradio)} (for tools/chat.py --web)"
    others = [package for package in packages.required if package.name not in shown and package.version]
    yield "others", ", ".join(f"{package.name} {_state(package)}" for package in others) or "not installed"


def _state(package: Package) -> str:
    if package.version is None:
        return "not installed"
    if package.error is not None:
        return f"{package.version} does not import"
    return package.version if package.fits else f"{package.version}, wanted {package.wanted}"


def _apex(packages: Packages) -> str:
    if packages.extension.works:
        return f"{EXTENSION} imports"
    apex = {"NVIDIA": "installed", "another project": "what is called apex here is another project"}
    broken = "does not import" if packages.extension.version else "is not there"
    return f"{apex.get(packages.apex or '', 'not installed')}; {EXTENSION} {broken}"
