"""The layers of a Mixture-of-Experts Transformer, usable one by one in any Flax NNX module."""

from jaxmoe.layers.attention import Attention, KeyValueCache
from jaxmoe.layers.embedding import Embedding
from jaxmoe.layers.mlp import DenseMLP
from jaxmoe.layers.moe import MoE
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.layers.rope import apply_rope, rope_angles
from jaxmoe.layers.router import Router, Routing
from jaxmoe.layers.self_attention import AttentionCase, resolved_attention
from jaxmoe.layers.statistics import RouterStatistics, auxiliary_losses, load_balance_loss, load_metrics, router_z_loss

__all__ = [
    "Attention",
    "AttentionCase",
    "DenseMLP",
    "Embedding",
    "KeyValueCache",
    "MoE",
    "RMSNorm",
    "Router",
    "RouterStatistics",
    "Routing",
    "apply_rope",
    "auxiliary_losses",
    "load_balance_loss",
    "load_metrics",
    "resolved_attention",
    "rope_angles",
    "router_z_loss",
]
