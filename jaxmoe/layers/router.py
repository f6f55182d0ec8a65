"""Routing: which experts see which token, and how much each counts.

T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.layers.parameters import normal_parameter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens.

    Attributes:
      expert_index: the K chosen experts, best first.
      gate: weight of each chosen expert.
      probabilities: softmax over all experts, float32.
      log_normalizer: logsumexp of the logits, float32.
    """

    expert_index: Int[Array, "T K"]
    gate: Float[Array, "T K"]
    probabilities: Float[Array, "T E"]
    log_normalizer: Float[Array, " T"]


def top_experts(scores: Float[Array, "T E"], k: int) -> Int[Array, "T K"]:
    """Indices of the k largest scores of each token, largest first, ties to the lowest index.

    k passes of max, which XLA:CPU vectorizes while it sorts for `jax.lax.top_k`.
    """
    num_experts = scores.shape[-1]
    position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    chosen = []
    for _ in range(k):
        best = scores.max(axis=-1, keepdims=True)
        index = jnp.min(jnp.where(scores == best, position, num_experts - 1), axis=-1)
        chosen.append(index)
        scores = jnp.where(position == index[:, None], -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)


@jax.custom_vjp
def scores_of(scores: Float[Array, "T E"], expert_index: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """The scores of the chosen experts. Its gradient compares indices, where a gather's would scatter."""
    return jnp.take_along_axis(scores, expert_index, axis=-1)


def _scores_of_forward(scores, expert_index):
    return scores_of(scores, expert_index), (expert_index, scores.shape[-1])


def _scores_of_backward(residuals, gradient):
    expert_index, num_experts = residuals
    position = jnp.arange(num_experts, dtype=jnp.int32)
    columns = range(expert_index.shape[-1])
    return sum(jnp.where(expert_index[:, j, None] == position, gradient[:, j, None], 0) for j in columns), None


scores_of.defvjp(_scores_of_forward, _scores_of_backward)


def _caller() -> int:
    """`stacklevel` of the first frame outside this package and flax, which construct layers through each other."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("jaxmoe", "flax"):
        level, frame = level + 1, frame.f_back
    return level


class Router(nnx.Module):
    r"""A linear map to E logits, and the choice of the K largest.

    With `topk_then_softmax` the gates are a softmax over the K kept logits (Mixtral); with `softmax_then_topk`
    they are the K kept entries of the softmax over all E, divided by their sum if `renormalize`. (Renormalized,
    both are the same function.)

    Args:
      width: D.
      num_experts: E.
      experts_per_token: K, at most E.
      score_order, renormalize, routed_scaling, router_dtype: as in `jaxmoe.config.MoEConfig`.
      init_std: of the weights.

    Raises:
      ValueError: K is not in 1..E.
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        experts_per_token: int,
        score_order: str = "topk_then_softmax",
        renormalize: bool = True,
        routed_scaling: float = 1.0,
        router_dtype: str = "float32",
        init_std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token={experts_per_token} but the layer has {num_experts} experts; choose "
                f"experts_per_token in 1..{num_experts}."
            )
        self.experts_per_token = experts_per_token
        self.kept_softmax = score_order == "topk_then_softmax" or renormalize
        self.routed_scaling = routed_scaling
        self.router_dtype = router_dtype
        if experts_per_token == 1 and num_experts > 1 and self.kept_softmax:
            warnings.warn(
                "experts_per_token=1 with gates that sum to one: every gate is the constant 1, so the router "
                "learns from the auxiliary losses alone. Use score_order='softmax_then_topk' with "
                "renormalize=False to let it learn from the task.",
                stacklevel=_caller(),
            )
        self.weight = normal_parameter(rngs, (width, num_experts), init_std, axes=("width", None))

    def __call__(self, x: Float[Array, "T D"]) -> Routing:
        """Scores and chooses. Logits are in router_dtype; softmax and logsumexp of them in float32."""
        dtype = self.router_dtype
        # Accelerators multiply float32 in fewer bits unless told otherwise, and near ties would be routed by them.
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        logits = jnp.matmul(x.astype(dtype), self.weight[...].astype(dtype), precision=precision).astype(jnp.float32)
        expert_index = top_experts(jax.lax.stop_gradient(logits), self.experts_per_token)
        kept = scores_of(logits, expert_index)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        gate = jax.nn.softmax(kept, axis=-1) if self.kept_softmax else jnp.exp(kept - log_normalizer[:, None])
        return Routing(
            expert_index=expert_index,
            gate=(gate * self.routed_scaling).astype(dtype),
            probabilities=jnp.exp(logits - log_normalizer[:, None]),
            log_normalizer=log_normalizer,
        )
