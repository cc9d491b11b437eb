"""Is NVIDIA DALI, which decodes images on GPUs, installed?"""

from __future__ import annotations

import importlib.util


def dali_is_installed() -> bool:
    """Is there a DALI to import? Asked without importing it, which takes a while."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even its parent package
        return False
