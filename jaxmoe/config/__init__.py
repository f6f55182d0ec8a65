"""Configuration: frozen dataclasses that validate themselves.

Everything a run depends on is one `RunConfig`; a mistake in it is an error when it is built, in the words of
whoever wrote it.
"""

from jaxmoe.config.data import (
    SOURCE_KINDS,
    DataConfig,
    KnowledgeSource,
    QuestionAnswerSource,
    ReasoningSource,
    SourceConfig,
    TextSource,
    TokensSource,
)
from jaxmoe.config.errors import ConfigError, nearest
from jaxmoe.config.grpo import GRPOConfig
from jaxmoe.config.mesh import MESH_AXES, MESH_PRESETS, MeshConfig, check_mesh, parse_mesh
from jaxmoe.config.model import DType, ModelConfig, MoEConfig
from jaxmoe.config.run import EvaluationConfig, RunConfig, TestTimeConfig, TrainConfig
from jaxmoe.config.values import config_hash, from_dict, to_dict

__all__ = [
    "MESH_AXES",
    "MESH_PRESETS",
    "SOURCE_KINDS",
    "ConfigError",
    "DType",
    "DataConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "KnowledgeSource",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "QuestionAnswerSource",
    "ReasoningSource",
    "RunConfig",
    "SourceConfig",
    "TestTimeConfig",
    "TextSource",
    "TokensSource",
    "TrainConfig",
    "check_mesh",
    "config_hash",
    "from_dict",
    "nearest",
    "parse_mesh",
    "to_dict",
]
