"""Is NVIDIA DALI, which decodes images on GPUs, installed?"""

from __future__ import annotations

import importlib.util

DALI_REMEDY = "make install-dev installs it for CPUs, make install-gpu for GPUs; or use threads"
"""What to do where DALI was asked for and is not installed."""


def dali_is_installed() -> bool:
    """Is there a DALI to import? Asked without importing it, which takes a while."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even its parent package
        return False
