"""What a router did to a batch, and the losses and metrics made of it.

E experts, K experts per token, T tokens, L MoE layers. Everything here follows from sums over tokens, so that no
loss depends on how the tokens were divided among devices or micro-batches.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.config import MoEConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """Sums over the routed tokens of a batch, float32; add them over micro-batches, `psum` them over devices.

    Attributes:
      expert_count: assignments that each expert was chosen for, before any capacity limit; no gradient.
      probability_sum: full-softmax probability of each expert, summed over tokens.
      z_sum: squared logsumexp of the logits, summed over tokens.
      token_count: tokens routed (padding is not).
      dropped: assignments that a capacity limit dropped.
      overflowed: assignments that found no room in the receive buffer of expert parallelism, and were not computed.

    The statistics of a model carry a leading axis, one entry for each MoE layer, first layer first.
    """

    expert_count: Float[Array, "*layers E"]
    probability_sum: Float[Array, "*layers E"]
    z_sum: Float[Array, "*layers"]
    token_count: Float[Array, "*layers"]
    dropped: Float[Array, "*layers"]
    overflowed: Float[Array, "*layers"]

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        return jax.tree.map(jnp.add, self, other)


def load_balance_loss(statistics: RouterStatistics) -> Float[Array, "*layers"]:
    r"""Switch-style balance loss of each layer, 1.0 when routing is uniform.

    $E \sum_e f_e P_e$ with $f_e$ the share of the T·K assignments that expert e received and $P_e$ its mean
    probability (Fedus et al. 2021, eq. 4, extended to K > 1 by dividing by K; Megatron-Core uses the same).
    """
    count = jax.lax.stop_gradient(statistics.expert_count)
    share = count / jnp.maximum(count.sum(-1, keepdims=True), 1.0)
    probability = statistics.probability_sum / jnp.maximum(statistics.token_count, 1.0)[..., None]
    return count.shape[-1] * jnp.sum(share * probability, axis=-1)


def router_z_loss(statistics: RouterStatistics) -> Float[Array, "*layers"]:
    r"""Mean over tokens of $(\log\sum_e \exp l_e)^2$ of each layer (Zoph et al. 2022, eq. 5)."""
    return statistics.z_sum / jnp.maximum(statistics.token_count, 1.0)


def auxiliary_losses(statistics: RouterStatistics, config: MoEConfig | None = None) -> dict[str, Float[Array, ""]]:
    """The auxiliary losses without their coefficients, reduced over layers.

    Args:
      statistics: of the whole batch, of one layer or of all (leading axis).
      config: names the definition of the balance loss and the reduction over layers; None for the defaults,
        `switch` and `sum`.

    Returns:
      `load_balance` and `router_z`, scalars.
    """
    config = MoEConfig() if config is None else config
    scale = config.experts_per_token if config.load_balance_definition == "switch_times_k" else 1
    reduce = jnp.sum if config.auxiliary_reduction == "sum" else jnp.mean
    return {
        "load_balance": reduce(scale * load_balance_loss(statistics)),
        "router_z": reduce(router_z_loss(statistics)),
    }


def load_metrics(statistics: RouterStatistics) -> dict[str, Array]:
    """How evenly the experts were used.

    Returns:
      dropped_fraction: assignments dropped / assignments made, over all layers.
      overflow_fraction: assignments that found no room in a receive buffer / assignments made, over all layers.
      dead_experts: experts that no token of the batch chose, counted over all layers.
      load_max_over_mean: load of the busiest expert over the mean load, averaged over layers; 1 is balanced.
      load_cv: standard deviation over mean of the experts' loads, averaged over layers; 0 is balanced.
      expert_load: (*layers, E) share of the assignments that each expert received.
    """
    count = jax.lax.stop_gradient(statistics.expert_count)
    num_experts = count.shape[-1]
    share = count / jnp.maximum(count.sum(-1, keepdims=True), 1.0)
    return {
        "dropped_fraction": statistics.dropped.sum() / jnp.maximum(count.sum(), 1.0),
        "overflow_fraction": statistics.overflowed.sum() / jnp.maximum(count.sum(), 1.0),
        "dead_experts": jnp.sum(count == 0).astype(jnp.float32),
        "load_max_over_mean": jnp.mean(num_experts * share.max(-1)),
        "load_cv": jnp.mean(num_experts * share.std(-1)),
        "expert_load": share,
    }
