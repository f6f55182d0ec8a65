"""Published models by name, as configurations; counting or building one downloads nothing.

Shapes, norms, rotary bases and router conventions are those of the checkpoints' config.json; the study's members are
those of arXiv 2508.18672 (16 layers, head width 128, F = 2D, a vocabulary of 99,584). Of the auxiliary losses they have
the published coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from jaxmoe.accounting import member_name
from jaxmoe.config import ConfigError, ModelConfig, MoEConfig, nearest

STUDY_WIDTHS = (512, 1024, 2048)
STUDY_EXPERTS = (8, 16, 32, 64, 128, 256)
STUDY_EXPERTS_PER_TOKEN = (2, 4, 8, 16)
STUDY_PREFIX = "optimal-sparsity-math-"
_MEAN_OVER_LAYERS = {"load_balance_definition": "switch_times_k", "auxiliary_reduction": "mean"}


def study_member(width: int, num_experts: int, experts_per_token: int) -> ModelConfig:
    """A member of the paper's family: 16 layers, all routed, heads of 128, F = 2D, untied embeddings.

    Args:
      width: D.
      num_experts: E.
      experts_per_token: K.
    """
    moe = MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, expert_hidden=2 * width)
    return ModelConfig(vocab_size=99_584, width=width, num_layers=16, num_heads=width // 128, moe=moe)


def _study() -> dict[str, ModelConfig]:
    return {
        f"{STUDY_PREFIX}d{width}-E{experts}-k{chosen}": study_member(width, experts, chosen)
        for width in STUDY_WIDTHS
        for experts in STUDY_EXPERTS
        for chosen in STUDY_EXPERTS_PER_TOKEN
        if chosen <= experts and (width, experts) != (2048, 256)
    }


def _published() -> dict[str, ModelConfig]:
    mixtral = {"score_order": "topk_then_softmax", "router_z_coefficient": 0.0, **_MEAN_OVER_LAYERS}
    return {
        "mixtral-8x7b": ModelConfig(
            vocab_size=32_000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, rope_theta=1e6,
            max_sequence_length=32_768,
            moe=MoEConfig(expert_hidden=14_336, load_balance_coefficient=0.02, **mixtral),
        ),
        "mixtral-8x22b": ModelConfig(
            vocab_size=32_768, width=6144, num_layers=56, num_heads=48, num_kv_heads=8, rope_theta=1e6,
            max_sequence_length=65_536,
            moe=MoEConfig(expert_hidden=16_384, load_balance_coefficient=0.001, **mixtral),
        ),
        "olmoe-1b-7b": ModelConfig(
            vocab_size=50_304, width=2048, num_layers=16, num_heads=16, qk_norm="projection",
            moe=MoEConfig(
                num_experts=64, experts_per_token=8, expert_hidden=1024, score_order="softmax_then_topk",
                renormalize=False, load_balance_coefficient=0.01, router_z_coefficient=0.001, **_MEAN_OVER_LAYERS,
            ),
        ),
        "qwen3-30b-a3b": _qwen3(width=2048, num_layers=48, num_heads=32, expert_hidden=768),
        "qwen3-235b-a22b": _qwen3(width=4096, num_layers=94, num_heads=64, expert_hidden=1536),
        "deepseek-moe-16b": ModelConfig(
            vocab_size=102_400, width=2048, num_layers=28, num_heads=16, first_dense_layers=1, dense_hidden=10_944,
            norm_eps=1e-6,
            moe=MoEConfig(
                num_experts=64, experts_per_token=6, expert_hidden=1408, shared_expert_hidden=2 * 1408,
                score_order="softmax_then_topk", renormalize=False, load_balance_coefficient=0.001,
                router_z_coefficient=0.0, **_MEAN_OVER_LAYERS,
            ),
        ),
        "smollm2-135m": ModelConfig(
            vocab_size=49_152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, dense_hidden=1536,
            tie_embeddings=True, rope_theta=1e5, max_sequence_length=8192,
        ),
    }  # fmt: skip


def _qwen3(width: int, num_layers: int, num_heads: int, expert_hidden: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936, width=width, num_layers=num_layers, num_heads=num_heads, num_kv_heads=4, head_dim=128,
        qk_norm="head", rope_theta=1e6, norm_eps=1e-6, max_sequence_length=40_960,
        moe=MoEConfig(
            num_experts=128, experts_per_token=8, expert_hidden=expert_hidden, load_balance_coefficient=0.001,
            router_z_coefficient=0.0, **_MEAN_OVER_LAYERS,
        ),
    )  # fmt: skip


@functools.cache
def presets() -> Mapping[str, ModelConfig]:
    """All presets by name."""
    return _published() | _study()


def preset(name: str) -> ModelConfig:
    """The configuration of a published model.

    Args:
      name: a key of `presets()`; a member of the study also by its whole published name,
        `optimal-sparsity-math-d512-E8-k2-320M-A170M`.

    Raises:
      ConfigError: no preset has this name; the message has the nearest.
    """
    known = presets()
    if name in known:
        return known[name]
    for short, config in known.items():
        if name.startswith(f"{short}-") and name == STUDY_PREFIX + member_name(config):
            return config
    raise ConfigError(f"no preset {name!r}.{nearest(name, known)}")
