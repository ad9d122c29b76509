"""Holds the configuration. It is a leaf: it imports nothing of ours but `types`."""

from eepo_fast.config.files import dump_config, is_file, load_config, make_config, under_new_names
from eepo_fast.config.schema import (
    AepoConfig,
    CheckpointConfig,
    ColumnsConfig,
    Config,
    DataConfig,
    EepoConfig,
    EvaluationConfig,
    GrpoConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AepoConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EepoConfig",
    "EvaluationConfig",
    "GrpoConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "dump_config",
    "is_file",
    "load_config",
    "make_config",
    "under_new_names",
]
