"""Configuration: the dataclass tree, presets, recipes and flags, and the checks of combinations."""

from typing import TYPE_CHECKING, Any

from megatron_eve.config.blend import Blend, parse_blend, parse_split
from megatron_eve.config.errors import ConfigError
from megatron_eve.config.lora import LoRAConfig
from megatron_eve.config.presets import PRESETS
from megatron_eve.config.schema import (
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.config.validate import TRACKER, validate, validate_sizes

if TYPE_CHECKING:
    from megatron_eve.config.recipe import from_dict, from_saved, load_recipe, parse

__all__ = [
    "PRESETS",
    "TRACKER",
    "Blend",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "FaultConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "from_dict",
    "from_saved",
    "load_recipe",
    "parse",
    "parse_blend",
    "parse_split",
    "validate",
    "validate_sizes",
]


def __getattr__(name: str) -> Any:
    """What reads recipes and flags, on first use: other processes start without the libraries that it needs."""
    if name in ("from_dict", "from_saved", "load_recipe", "parse"):
        from megatron_eve.config import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
