"""What hardware a machine has: asked of the operating system, of NVIDIA's driver and of torch, each of which may lack.

Nothing but the standard library is imported before it is known to be there, and nothing is built or computed.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, memory in GiB, and compute capability such as (9, 0)."""

    name: str
    memory: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for, and what it sees.

    Attributes:
        version: such as "2.10.0+cu128".
        cuda: version of CUDA that it was built with, None for a CPU build.
        cudnn, nccl: versions of the libraries that it brings, None where it has none.
        architectures: what it holds kernels for, such as ("sm_80", "compute_90").
        gpus: that it can use.
        peers: can every two of them read each other's memory (NVLink or PCIe)? None below two.
        refusal: why it can use none although it was built with CUDA, else None.
    """

    version: str
    cuda: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    peers: bool | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Machine:
    """A machine as a run would find it; sizes in GiB, None where the operating system does not say.

    Attributes:
        python: version of this interpreter, such as "3.11.9".
        executable: its path.
        system: operating system and architecture.
        cores: that this process may use.
        memory, free_memory: of the machine, or of the control group that this process is in if that has less.
        shm: free in /dev/shm.
        disk: free in the current folder.
        driver: version of NVIDIA's driver, None without one.
        driver_gpus: what the driver sees, whatever torch does.
        hidden: CUDA_VISIBLE_DEVICES hides all of them.
        torch: None if torch does not import.
        slurm: are sbatch and srun on the PATH?
    """

    python: str
    executable: str
    system: str
    cores: int
    memory: float | None = None
    free_memory: float | None = None
    shm: float | None = None
    disk: float | None = None
    driver: str | None = None
    driver_gpus: tuple[Gpu, ...] = ()
    hidden: bool = False
    torch: TorchBuild | None = None
    slurm: bool = False

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """What a run can use, or should be able to: torch's, or else the driver's unless they are hidden."""
        if self.torch is not None and self.torch.gpus:
            return self.torch.gpus
        return () if self.hidden else self.driver_gpus


def inspect_machine() -> Machine:
    """Describe this machine. Imports torch, if it can be; raises nothing."""
    driver, gpus = _query_driver()
    memory, free_memory = _memory()
    shm = Path("/dev/shm")
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory,
        free_memory=free_memory,
        shm=shutil.disk_usage(shm).free / _GIB if shm.is_dir() else None,
        disk=shutil.disk_usage(".").free / _GIB,
        driver=driver,
        driver_gpus=gpus,
        hidden=_gpus_hidden(),
        torch=_inspect_torch(),
        slurm=all(shutil.which(command) for command in ("sbatch", "srun")),
    )


def memory_of_a_rank(local_ranks: int, *, started_here: bool = True) -> tuple[float, str] | None:
    """The memory that each of the ranks of this node has in GiB, and what has it; None where nobody says.

    Asks NVIDIA's driver and the operating system, and does not import torch.

    Args:
        local_ranks: of this node, which share its memory where they do not run on GPUs.
        started_here: the ranks are on this machine. Else one without GPUs says nothing of a run that may have them.
    """
    on_cpus = _gpus_hidden() or _torch_is_for_cpus()
    gpus = () if on_cpus else _query_driver()[1]
    if gpus:
        smallest = min(gpus, key=lambda gpu: gpu.memory)
        return smallest.memory, f"one {smallest.name}"
    total, _ = _memory()
    if total is None or not (started_here or on_cpus):
        return None
    shared = f", shared by {local_ranks} ranks" if local_ranks > 1 else ""
    return total / local_ranks, f"this machine's memory{shared}"


def _torch_is_for_cpus() -> bool:
    """Was the installed torch built without CUDA? Then a run takes the CPU, whatever GPUs there are."""
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _gpus_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _memory() -> tuple[float | None, float | None]:
    """All memory and what is free of it, in GiB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    try:  # A job or a container may have less than the machine.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) / _GIB for name in ("max", "current"))
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, limit - used)


def _query_driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and the GPUs that it sees, from nvidia-smi; none where that is not there or fails."""
    query = "--query-gpu=driver_version,memory.total,compute_cap,name"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
        return parse_driver(answer)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, ()


def parse_driver(answer: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and its GPUs from lines of "version, MiB, capability, name".

    Raises:
        ValueError: if a line is of another kind.
    """
    driver, gpus = None, []
    for line in filter(None, answer.splitlines()):
        driver, memory, capability, name = (word.strip() for word in line.split(",", 3))
        major, minor = capability.split(".")
        gpus.append(Gpu(name, int(memory) / 2**10, (int(major), int(minor))))
    return driver, tuple(gpus)


def _inspect_torch() -> TorchBuild | None:
    try:
        import torch
    except Exception:  # whatever a broken installation throws; `doctor.packages` says what
        return None
    version = str(torch.__version__)
    if torch.version.cuda is None:
        return TorchBuild(version)
    cudnn = torch.backends.cudnn.version()
    nccl: Any = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    known: dict[str, Any] = {
        "version": version,
        "cuda": torch.version.cuda,
        # 91002 is 9.10.2
        "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
    }
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return TorchBuild(**known, refusal=str(error).splitlines()[0])
    devices = range(torch.cuda.device_count())
    found = [torch.cuda.get_device_properties(device) for device in devices]
    pairs = itertools.permutations(devices, 2)
    return TorchBuild(
        **known,
        architectures=tuple(torch.cuda.get_arch_list()),
        gpus=tuple(Gpu(one.name, one.total_memory / _GIB, (one.major, one.minor)) for one in found),
        peers=all(torch.cuda.can_device_access_peer(*pair) for pair in pairs) if len(found) > 1 else None,
    )


def cudnn_attends_to_packs(capability: tuple[int, int] | None) -> bool:
    """Has cuDNN a fast attention over packs (format thd) for GPUs of this compute capability? None is no GPU.

    On Hopper and data-centre Blackwell (TransformerEngine's nvte_get_fused_attn_backend and get_attention_backend).
    """
    return capability is not None and (9, 0) <= capability < (12, 0)
