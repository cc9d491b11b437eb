"""The memory that a rank of this machine has, asked without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

_GIB = 2**30


def rank_capacity(local_ranks: int) -> tuple[float, str]:
    """What a rank has to hold weights, gradients and optimizer state in.

    Args:
        local_ranks: ranks of this machine; on GPUs each has one of its own.

    Returns:
        GiB, and in words what has them.
    """
    if (gpu := _smallest_gpu()) is not None:
        return gpu, "the smallest GPU of this machine"
    whole = _machine()
    shared = f", shared by {local_ranks} ranks" if local_ranks > 1 else ""
    return whole / max(local_ranks, 1), f"this machine's memory{shared}"


def _smallest_gpu() -> float | None:
    """GiB of the smallest GPU; None where a run takes the CPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return None
    try:
        if metadata.version("torch").endswith("+cpu"):
            return None
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(line) for line in told.split()) / 1024
    except (metadata.PackageNotFoundError, OSError, subprocess.SubprocessError, ValueError):
        return None


def _machine() -> float:
    """GiB of this machine, or of the container that this process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(sizes) / _GIB
