"""One Transformer block, and runs of equal blocks under one scan.

B batch, S sequence, D width, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.layers.attention import Attention, KeyValueCache
from jaxmoe.layers.mlp import DenseMLP
from jaxmoe.layers.moe import MoE
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.layers.parameters import residual_output_std
from jaxmoe.layers.statistics import RouterStatistics
from jaxmoe.sharding import constrain

Kind = Literal["dense", "moe"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenContext:
    """What every block needs to know of the tokens.

    Attributes:
      cosine, sine: rotary angles.
      groups: as in `Attention`; None for one document without padding.
      mask: False on padding; None for no padding.
      positions: of the tokens in the cache; None without a cache.
    """

    cosine: Float[Array, "#B S half"]
    sine: Float[Array, "#B S half"]
    groups: Int[Array, "B S"] | None = None
    mask: Bool[Array, "B S"] | None = None
    positions: Int[Array, "B S"] | None = None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with a dense or a routed MLP."""

    def __init__(self, config: ModelConfig, kind: Kind, *, rngs: nnx.Rngs):
        self.kind = kind
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_eps)
        self.attention = Attention.from_config(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, epsilon=config.norm_eps)
        if kind == "moe":
            self.mlp = MoE.from_config(config, rngs=rngs)
        else:
            self.mlp = DenseMLP(
                config.width,
                config.dense_hidden_size,
                init_std=config.init_std,
                output_init_std=residual_output_std(config),
                compute_dtype=config.compute_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: TokenContext,
        cache: KeyValueCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B S D"], RouterStatistics | None, KeyValueCache | None]:
        attended, cache = self.attention(
            self.attention_norm(x),
            rotary=(context.cosine, context.sine),
            groups=context.groups,
            cache=cache,
            layer=layer,
            positions=context.positions,
        )
        x = constrain(x + attended, "batch", "sequence", None)
        if self.kind == "dense":
            return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None), None, cache
        routed, statistics = self.mlp(self.mlp_norm(x), context.mask)
        return constrain(x + routed, "batch", "sequence", None), statistics, cache


@dataclasses.dataclass(frozen=True)
class Repetition:
    """`repeats` times the same sequence of layer kinds."""

    kinds: tuple[Kind, ...]
    repeats: int


UNROLLED_REPEATS = 4
"""Repeats up to which every one is a stack of its own, compiled without a loop: a loop copies each layer's
parameters out of the stack and its gradients back (180 of 2,000 ms of a traced CPU step with 128 experts)."""


def _runs(config: ModelConfig) -> list[Repetition]:
    """The layers as a dense prefix, a repeated period of moe_every layers, and a dense rest."""
    if config.num_moe_layers == 0:
        return [Repetition(("dense",), config.num_layers)]
    periods, rest = divmod(config.num_layers - config.first_dense_layers, config.moe_every)
    period: tuple[Kind, ...] = ("dense",) * (config.moe_every - 1) + ("moe",)
    runs = Repetition(("dense",), config.first_dense_layers), Repetition(period, periods), Repetition(("dense",), rest)
    return [run for run in runs if run.repeats > 0]


def repetitions(config: ModelConfig) -> tuple[Repetition, ...]:
    """What each of the decoder's stacks repeats, in the order of the layers.

    Up to `UNROLLED_REPEATS` equal ones are as many stacks of one; more are a single stack, so the number of distinct
    blocks to compile does not grow with num_layers.
    """
    return tuple(
        entry
        for run in _runs(config)
        for entry in ([run] if run.repeats > UNROLLED_REPEATS else [Repetition(run.kinds, 1)] * run.repeats)
    )


class BlockStack(nnx.Module):
    """The blocks of one `Repetition`; their parameters carry a leading axis of `repeats`."""

    def __init__(self, blocks: nnx.List, repeats: int, remat: str):
        self.blocks = blocks
        self.repeats = repeats
        self.remat = remat

    def __call__(
        self, x: Float[Array, "B S D"], context: TokenContext, caches: list[KeyValueCache] | None = None
    ) -> tuple[Float[Array, "B S D"], list[RouterStatistics], list[KeyValueCache] | None]:
        """Runs the blocks in turn.

        Args:
          x: hidden states.
          context: of the tokens.
          caches: one for each kind of the repetition, of `repeats` layers.

        Returns:
          Hidden states; the statistics of each routed kind, with a leading axis of `repeats`; the caches.
        """
        definition, state = nnx.split(self.blocks)

        def step(carry, scanned):
            x, caches = carry
            state, layer = scanned
            statistics, updated = [], []
            for block, cache in zip(nnx.merge(definition, state), caches, strict=True):
                x, routed, cache = block(x, context, cache, layer)
                statistics += [] if routed is None else [routed]
                updated.append(cache)
            return (x, updated), statistics

        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            # What keeps XLA from finding again what was thrown away: the loop, or barriers where there is none.
            step = jax.checkpoint(step, policy=policy, prevent_cse=self.repeats == 1)
        start = x, [None] * len(self.blocks) if caches is None else caches
        layers = jnp.arange(self.repeats)
        (x, updated), statistics = jax.lax.scan(step, start, (state, layers))
        return x, statistics, None if caches is None else updated


def build_stacks(config: ModelConfig, *, rngs: nnx.Rngs) -> list[BlockStack]:
    """The decoder's stacks, as `repetitions` has them. What a layer is drawn from does not depend on the stacking."""
    stacks = []
    for run in _runs(config):
        blocks = _stacked_blocks(config, run, rngs)
        if run.repeats > UNROLLED_REPEATS:
            stacks.append(BlockStack(blocks, run.repeats, config.remat))
            continue
        definition, state = nnx.split(blocks)
        for layer in range(run.repeats):
            own = jax.tree.map(lambda parameter, layer=layer: parameter[layer : layer + 1], state)
            stacks.append(BlockStack(nnx.merge(definition, own), 1, config.remat))
    return stacks


def _stacked_blocks(config: ModelConfig, run: Repetition, rngs: nnx.Rngs) -> nnx.List:
    """One block for each kind of the run, its parameters with a leading axis of `repeats`."""

    @nnx.split_rngs(splits=run.repeats)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def create(rngs: nnx.Rngs) -> nnx.List:
        return nnx.List([Block(config, kind, rngs=rngs) for kind in run.kinds])

    return create(rngs)
