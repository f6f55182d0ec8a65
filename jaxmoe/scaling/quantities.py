"""What a member is, in numbers: the quantities that a study holds fixed or varies.

Everything follows from the configuration; nothing here needs a device. N parameters, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe import accounting
from jaxmoe.config import ConfigError, RunConfig, nearest, to_dict

Number = int | float


def flops_per_token(config: RunConfig) -> int:
    """6·N_active, the study's measure of training compute per token (arXiv 2508.18672), every parameter counted."""
    return accounting.flops_per_token(config.model, config.train.sequence_length).approximate


def matmul_flops_per_token(config: RunConfig) -> int:
    """Exact floating-point operations of training per token: every matmul, attention scores and logits included."""
    return accounting.flops_per_token(config.model, config.train.sequence_length).training


def num_experts(config: RunConfig) -> int:
    """E, 0 for a dense model."""
    return config.model.moe.num_experts if config.model.num_moe_layers else 0


def experts_per_token(config: RunConfig) -> int:
    """K, 0 for a dense model."""
    return config.model.moe.experts_per_token if config.model.num_moe_layers else 0


def _parameters(config: RunConfig) -> accounting.ParameterCount:
    return accounting.parameter_count(config.model)


QUANTITIES: dict[str, Callable[[RunConfig], Number]] = {
    "total_parameters": lambda config: _parameters(config).total,
    "active_parameters": lambda config: _parameters(config).active,
    "non_embedding_total_parameters": lambda config: _parameters(config).non_embedding,
    "non_embedding_active_parameters": lambda config: _parameters(config).non_embedding_active,
    "flops_per_token": flops_per_token,
    "matmul_flops_per_token": matmul_flops_per_token,
    "training_flops": lambda config: (  # under GRPO of every response's row
        accounting.training_flops(config.model, config.train) * (config.tokens // config.train.tokens)
    ),
    "approximate_training_flops": lambda config: accounting.approximate_training_flops(
        config.model, config.tokens
    ),
    "tokens": lambda config: config.tokens,
    "tokens_per_parameter": lambda config: config.tokens / _parameters(config).total,
    "sparsity": lambda config: accounting.sparsity(config.model),
    "num_experts": num_experts,
    "experts_per_token": experts_per_token,
}
"""What `held_fixed` and `varies` of a study may name, besides any dotted key of the configuration."""


def quantity(name: str, config: RunConfig) -> Any:
    """The quantity `name` of a member: one of `QUANTITIES`, or a dotted key such as `train.learning_rate`.

    Raises:
      ConfigError: neither; the message gives the nearest name.
    """
    if name in QUANTITIES:
        return QUANTITIES[name](config)
    values = flatten(to_dict(config))
    if "." not in name or name not in values:
        raise ConfigError(f"{name!r} is no quantity of a study.{nearest(name, [*QUANTITIES, *values])}")
    return values[name]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values, and an empty mapping is one."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
