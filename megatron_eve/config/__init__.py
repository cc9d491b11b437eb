"""Configuration: the dataclass tree, presets, recipes and flags, and the judge of combinations."""

from megatron_eve.config.blend import Blend, parse_blend, parse_split
from megatron_eve.config.errors import ConfigError
from megatron_eve.config.presets import PRESETS
from megatron_eve.config.recipe import from_dict, from_saved, load_recipe, parse
from megatron_eve.config.schema import (
    DEFAULT_FAMILY,
    AlignmentConfig,
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
from megatron_eve.config.tower import TowerSizes, tower_sizes
from megatron_eve.config.validate import TRACKER, validate, validate_sizes

__all__ = [
    "DEFAULT_FAMILY",
    "PRESETS",
    "TRACKER",
    "AlignmentConfig",
    "Blend",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "FaultConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TowerSizes",
    "TrainingConfig",
    "from_dict",
    "from_saved",
    "load_recipe",
    "parse",
    "parse_blend",
    "parse_split",
    "tower_sizes",
    "validate",
    "validate_sizes",
]
