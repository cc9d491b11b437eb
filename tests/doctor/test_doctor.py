"""The doctor: its command on this machine and on a bare one, and its judgement of machines that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_eve.doctor.machine_report import examine, report
from megatron_eve.doctor.packages import EXTENSION, Package, Packages, inspect_packages, satisfies
from megatron_eve.doctor.problems import find_problems, has_kernels
from megatron_eve.runtime.accelerator import Accelerator
from megatron_eve.runtime.machine import Gpu, Machine
from tests.doctor.machines import A100, LAPTOP, LOGIN, NODE, WHOLE, node, with_required, without, write

ROOT = Path(__file__).resolve().parents[2]


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, with options for Python, anywhere but in the checkout."""
    return subprocess.run(
        [sys.executable, *options, str(ROOT / "tools" / "doctor.py")],
        capture_output=True, text=True, timeout=120, check=False, cwd=os.sep, env={**os.environ, **environment},
    )  # fmt: skip


def rows(text: str) -> dict[str, str]:
    """Name -> value of the report's lines, problems left out."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("  ") and line[2:3].strip(" -")]
    return {line[:19].strip(): line[19:] for line in lines}


def test_this_machine_without_its_gpus() -> None:
    """What the tests run on is what a run can start on."""
    found = doctor(CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.endswith("\n\na run can start here\n") and "\nproblems\n" not in found.stdout
    entries = rows(found.stdout)
    assert entries["torch"] == torch.__version__ and entries["megatron-core"] == "0.16.1"
    assert entries["Python"].endswith(sys.executable)
    assert entries["runs on"] == "the CPU, ranks communicate through gloo"
    assert entries["layers"] == "torch's" and entries["packs"] == "each as long as it is"
    assert entries["FP8 delayed"].startswith("no: needs a GPU and TransformerEngine")
    assert max(map(len, found.stdout.splitlines())) <= 118


def test_a_bare_python_on_a_machine_with_a_gpu(tmp_path: Path) -> None:
    """No package at all (-S), and a driver that answers: all is said, in plain lines."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho '580.65.06, 81559, 9.0, NVIDIA H100 80GB HBM3'\n")
    driver.chmod(0o755)
    found = doctor("-I", "-S", PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0")
    assert found.returncode == 1 and not found.stderr
    entries = rows(found.stdout)
    assert entries["GPUs"] == "1 x NVIDIA H100 80GB HBM3 (79.6 GiB, compute capability 9.0); driver 580.65.06"
    assert (
        entries["torch"]
        == entries["TransformerEngine"]
        == entries["DALI"]
        == entries["others"]
        == "not installed"
    )
    assert entries["nothing"] == "ModuleNotFoundError: No module named 'torch'"
    assert "not installed: torch, megatron-core, numpy" in found.stdout
    assert "(without psutil, saving a checkpoint hangs)" in " ".join(found.stdout.split())
    assert "remedy: make install-gpu CUDA=12, or CUDA=13" in found.stdout
    assert found.stdout.endswith("\n\n1 problem to solve first\n")


BROKEN = {"error": "OSError: libcudart.so.12: no such file"}


def test_a_sound_node_has_no_problems() -> None:
    assert find_problems(NODE, WHOLE) == []
    assert find_problems(LAPTOP, replace(without("engine"), extension=Package(EXTENSION, None))) == []


@pytest.mark.parametrize(
    ("machine", "packages", "what", "remedy", "breaks"),
    [
        (replace(NODE, python="3.10.4"), WHOLE, "Python 3.10.4", "PYTHON=python3.11", True),
        (replace(NODE, python="3.14.0"), WHOLE, ">=3.11,<3.14", "PYTHON=python3.11", True),
        (NODE, with_required("psutil", version=None), "saving a checkpoint hangs", "make install-gpu", True),
        (LAPTOP, with_required("psutil", version=None), "not installed: psutil", "make install", True),
        (NODE, with_required("megatron-core", version="0.15.3"), "tested with", "megatron-core==0.16.1", True),
        (NODE, with_required("transformers", version="4.40.0"), ">=4.57 is wanted", "pip install", True),
        (NODE, with_required("transformers", **BROKEN), "does not import: OSError: libcudart", "make", True),
        (node(cuda=None, gpus=()), WHOLE, "is a build for CPUs", "make install-gpu CUDA=12", True),
        (node(gpus=(), refusal="driver is too old"), WHOLE, "driver is too old", "CUDA 12.8", True),
        (node(Gpu("Tesla V100", 32, (7, 0))), WHOLE, "has no kernels for Tesla V100", "a torch", True),
        (node(nccl=None), WHOLE, "without NCCL", "make install-gpu", True),
        (NODE, without("engine"), "no TransformerEngine: layers of torch", "make install-gpu", False),
        (NODE, without("engine", version="2.13.0"), "megatron-core wants >=2.9.0a0,<2.12.0", "2.11", True),
        (NODE, without("engine", version="2.11.0", **BROKEN), "libcudart.so.12", "compiles it", True),
        (LOGIN, without("engine", version="2.11.0", **BROKEN), "libcudart.so.12", "with a GPU", False),
        (node(A100), without("flash_attention"), "no attention over packs", "flash-attn", False),
        (NODE, without("flash_attention", version="2.8.3", **BROKEN), "flash-attn 2.8.3", "uninstall", True),
        (NODE, without("dali"), "no DALI", "make install-gpu", False),
        (NODE, without("dali", version="2.4.0", **BROKEN), "does not import", "again", True),
        (node(cuda="13.0"), WHOLE, "is for CUDA 12, torch for CUDA 13.0", "nvidia-dali-cuda130", False),
        (NODE, without("triton"), "no Triton", "make install-gpu", False),
        (NODE, without("extension"), "apex was built without", "--cuda_ext", False),
        (NODE, without("extension", version="1", **BROKEN), f"{EXTENSION} does not", "this torch", True),
        (NODE, replace(without("extension"), apex=None), f"no {EXTENSION}", "optional", False),
        (LAPTOP, replace(WHOLE, apex="another project"), "is PyPI's", "pip uninstall apex", True),
        (replace(NODE, shm=0.0625), WHOLE, "/dev/shm has 64 MiB free", "--shm-size", False),
    ],
)  # fmt: skip
def test_one_thing_is_wrong(
    machine: Machine, packages: Packages, what: str, remedy: str, breaks: bool
) -> None:
    (problem,) = find_problems(machine, packages)
    assert what in problem.what and remedy in problem.remedy and problem.breaks is breaks
    text = report(machine, packages, [], [problem])
    assert text.endswith("1 problem to solve first" if breaks else "a run can start here")
    assert f"\n{'problems' if breaks else 'could be better'}\n  - " in text


def test_gpus_that_are_hidden_on_purpose_are_not_missed() -> None:
    hidden = replace(node(gpus=(), refusal="No CUDA GPUs are available"), hidden=True)
    assert find_problems(hidden, without("engine")) == []
    assert rows(report(hidden, WHOLE, [], []))["GPUs"].startswith("8 x NVIDIA H100")
    assert "hidden by CUDA_VISIBLE_DEVICES" in report(hidden, WHOLE, [], [])


def test_what_breaks_a_run_stands_first() -> None:
    found = find_problems(replace(NODE, shm=0.1, python="3.9"), without("triton"))
    assert [problem.breaks for problem in found] == [True, False, False]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_90",), True),
        ((8, 9), ("sm_80",), True),  # the same generation, newer
        ((8, 0), ("sm_89",), False),
        ((10, 0), ("sm_90",), False),
        ((10, 0), ("sm_90", "compute_90"), True),
        ((10, 0), ("compute_90a",), False),
        ((12, 0), ("sm_100", "sm_120"), True),
        ((7, 0), ("sm_75", "compute_75"), False),
        ((9, 0), (), True),
    ],
)
def test_kernels_for_a_gpu(capability: tuple[int, int], architectures: tuple[str, ...], runs: bool) -> None:
    assert has_kernels(Gpu("some", 1, capability), architectures) is runs


def look(folder: Path, *dependencies: str) -> Packages:
    """The packages of a project with these dependencies."""
    write(
        folder,
        "pyproject.toml",
        f'[project]\nrequires-python = ">=3.11"\ndependencies = {list(dependencies)}',
    )
    return inspect_packages(folder / "pyproject.toml")


def test_a_transformer_engine_that_fails_to_import(modules: Path) -> None:
    write(modules, "transformer_engine/__init__.py")
    write(modules, "transformer_engine/pytorch.py", "raise OSError('libcuda.so.1: cannot open\\nmore')")
    write(
        modules, "transformer_engine-2.13.0.dist-info/METADATA", "Name: transformer-engine\nVersion: 2.13.0\n"
    )
    engine = look(modules).engine
    assert (engine.version, engine.error) == ("2.13.0", "OSError: libcuda.so.1: cannot open")
    assert not engine.fits and not engine.works


def test_nvidias_apex_and_the_other(modules: Path) -> None:
    write(modules, "apex/__init__.py", "raise ImportError('pyramid')")
    found = look(modules)
    assert found.apex == "another project"
    assert "another project" in report(NODE, replace(found, extension=Package(EXTENSION, None)), [], [])
    write(modules, "apex/normalization/__init__.py")
    write(modules, f"{EXTENSION}.py")
    found = look(modules)
    assert found.apex == "NVIDIA" and found.extension.works
    assert rows(report(NODE, found, [], []))["NVIDIA's apex"] == f"{EXTENSION} imports"


def test_an_extension_that_fails_to_import(modules: Path) -> None:
    write(modules, f"{EXTENSION}.py", "raise ImportError('undefined symbol: _ZN3c10')")
    extension = look(modules).extension
    assert extension.version is not None and extension.error == "ImportError: undefined symbol: _ZN3c10"


def test_required_packages(modules: Path) -> None:
    write(modules, "broken_package.py", "import nothing_of_that_name")
    found = look(modules, "numpy>=2.0", "pillow>=99", "no-such-package>=1", "broken-package")
    numpy, pillow, missing, broken = found.required
    assert numpy.works
    assert pillow.version is not None and not pillow.fits and pillow.error is None
    assert missing.version is None
    assert broken.error == "ModuleNotFoundError: No module named 'nothing_of_that_name'"


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.10.0a0+a36e1d39eb.nv26.1", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("0.16.1", "==0.16.1", True),
        ("0.16.10", "==0.16.1", False),
        ("2", "==2.0.0", True),
        ("3.14.0", ">=3.11,<3.14", False),
        ("3.13.9", ">=3.11,<3.14", True),
        ("of unknown version", ">=2", True),
        ("1.0", "", True),
    ],
)
def test_versions(version: str, wanted: str, fits: bool) -> None:
    assert satisfies(version, wanted) is fits


def test_the_image_and_the_doctor_take_the_same_transformer_engine() -> None:
    """The one from constants, since its image has no megatron-core yet; the other from megatron-core itself."""
    from megatron_eve.doctor.packages import engine_versions
    from tools.image_requirements import BELOW, LOWEST

    (lowest, below), wanted = ((".".join(map(str, bound)) for bound in (LOWEST, BELOW)), engine_versions())
    assert satisfies(lowest, wanted) and not satisfies(below, wanted)
    assert satisfies("2.11.99", wanted) and not satisfies("2.8.0", wanted)


@pytest.mark.parametrize(
    ("dependencies", "problem"),
    [("[]", "no run can be prepared: RuntimeError: nothing works"), ("['numpy>=99']", "numpy")],
    ids=["unexplained", "explained"],
)
def test_a_machine_on_which_no_run_can_be_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dependencies: str, problem: str
) -> None:
    """It is a problem of its own unless another one explains it."""

    def refuse() -> Accelerator:
        raise RuntimeError("nothing works\nat all")

    monkeypatch.setattr("megatron_eve.doctor.machine_report.accelerator", refuse)
    monkeypatch.setattr("megatron_eve.doctor.machine_report.inspect_machine", lambda: LAPTOP)
    write(tmp_path, "pyproject.toml", f'[project]\nrequires-python = ">=3.11"\ndependencies = {dependencies}')
    text, sound = examine(tmp_path / "pyproject.toml")
    assert not sound and text.endswith("\n1 problem to solve first")
    assert rows(text)["nothing"] == "RuntimeError: nothing works"
    assert f"\nproblems\n  - {problem}" in text
