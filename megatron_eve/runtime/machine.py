"""The hardware of this machine, as the operating system, NVIDIA's driver and torch report it; each may be missing.

Only the standard library is imported at the top, and nothing is computed on the hardware.
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
    """The installed torch: what it was built for, and which GPUs it can use.

    Attributes:
        version: such as "2.10.0+cu128".
        cuda: CUDA version that it was built with, None for a CPU build.
        cudnn, nccl: versions of its libraries, None where it has none.
        architectures: GPU architectures that it has kernels for, such as ("sm_80", "compute_90").
        gpus: GPUs that it can use.
        peers: True if every two GPUs can read each other's memory (NVLink or PCIe); None with fewer than two.
        refusal: the error if it was built with CUDA and can use no GPU, else None.
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
    """Hardware and software of a machine. Sizes are in GiB, None where they are unknown.

    Attributes:
        python: version of this interpreter, such as "3.11.9".
        executable: its path.
        system: operating system and architecture.
        cores: CPU cores that this process may use.
        memory, free_memory: of the machine, or of this process's control group if that has less.
        shm: free space in /dev/shm.
        disk: free space in the current folder.
        driver: version of NVIDIA's driver, None without one.
        driver_gpus: GPUs that the driver reports, whether or not torch can use them.
        hidden: True if CUDA_VISIBLE_DEVICES hides all GPUs.
        torch: None if torch does not import.
        slurm: True if sbatch and srun are on the PATH.
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
        """GPUs that torch can use; if there are none, those that the driver reports, unless they are hidden."""
        if self.torch is not None and self.torch.gpus:
            return self.torch.gpus
        return () if self.hidden else self.driver_gpus


def inspect_machine() -> Machine:
    """Describe this machine. Imports torch if it is installed; raises nothing."""
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
    """Memory of each rank of this node in GiB, and a text that says of what; None if unknown.

    Asks NVIDIA's driver and the operating system, and does not import torch.

    Args:
        local_ranks: of this node, which share its memory where they do not run on GPUs.
        started_here: the ranks run on this machine. If not, and it has no GPU, their memory is unknown (None).
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
    """True if the installed torch was built without CUDA; a run then uses the CPU, even if there are GPUs."""
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _gpus_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _memory() -> tuple[float | None, float | None]:
    """Total and free memory in GiB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    try:  # A job or a container may be limited to less than the machine has.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) / _GIB for name in ("max", "current"))
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, limit - used)


def _query_driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and its GPUs, from nvidia-smi; (None, ()) if that is missing or fails."""
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
        ValueError: a line has another format.
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
    except Exception:  # a broken installation can raise anything; `doctor.packages` reports it
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
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    pairs = itertools.permutations(devices, 2)
    return TorchBuild(
        **known,
        architectures=tuple(torch.cuda.get_arch_list()),
        gpus=tuple(Gpu(one.name, one.total_memory / _GIB, (one.major, one.minor)) for one in properties),
        peers=all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        if len(properties) > 1
        else None,
    )


def cudnn_attends_to_packs(capability: tuple[int, int] | None) -> bool:
    """True if cuDNN has fused attention over packs (format thd) for this compute capability.

    None means no GPU. Hopper and data-centre Blackwell have it (source: TransformerEngine's
    nvte_get_fused_attn_backend and get_attention_backend).
    """
    return capability is not None and (9, 0) <= capability < (12, 0)
