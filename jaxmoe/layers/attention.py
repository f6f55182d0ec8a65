"""Causal self-attention, multi-head or grouped-query, with or without a cache of earlier keys and values.

B batch, S sequence, C cache length, D width, H query heads, M key and value heads, R = H / M queries per key.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmoe.config import ModelConfig, from_dict
from jaxmoe.layers.causal_attention import MASKED
from jaxmoe.layers.norm import rms_normalize
from jaxmoe.layers.parameters import dtype_name, normal_parameter, residual_output_std
from jaxmoe.layers.rope import apply_rope, rope_angles
from jaxmoe.layers.self_attention import self_attention
from jaxmoe.sharding import gathered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of L layers of one kind; slot c of a row holds its token at position c."""

    key: Float[Array, "L B M C head_dim"]
    value: Float[Array, "L B M C head_dim"]


class Attention(nnx.Module):
    """Self-attention with rotary positions and no bias.

    The projections to queries, keys and values are one parameter (D, M, R + 2, head_dim): for every key head its
    R queries, then the key, then the value. Query head h belongs to key head h // R.

    Args:
      width: D.
      num_heads: H.
      num_kv_heads: M; None for H.
      head_dim: None for D / H.
      qk_norm, rope_theta, norm_eps, init_std, compute_dtype, attention: as in `jaxmoe.config.ModelConfig`.
      output_init_std: of the output projection; None for init_std.

    Raises:
      ConfigError (a ValueError): numbers that do not fit each other; the message says what would.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str = "none",
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        compute_dtype: DTypeLike = "float32",
        attention: str = "auto",
        rngs: nnx.Rngs,
    ):
        settings = {
            "width": width,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "qk_norm": qk_norm,
            "rope_theta": rope_theta,
            "norm_eps": norm_eps,
            "init_std": init_std,
            "compute_dtype": dtype_name(compute_dtype),
            "attention": attention,
        }
        checked = from_dict(ModelConfig, {"vocab_size": 1, "num_layers": 1, "dense_hidden": 1, **settings}, "Attention")
        self.num_kv_heads, self.head_dim = checked.kv_heads, checked.head_size
        self.queries_per_key = checked.num_heads // checked.kv_heads
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.compute_dtype = checked.compute_dtype
        self.attention = checked.attention
        fused = (width, self.num_kv_heads, self.queries_per_key + 2, self.head_dim)
        self.query_key_value = normal_parameter(rngs, fused, init_std, axes=("width", "heads", None, None))
        self.output = normal_parameter(
            rngs,
            (num_heads, self.head_dim, width),
            init_std if output_init_std is None else output_init_std,
            axes=("heads", None, "width"),
        )
        self.has_qk_norm = qk_norm != "none"
        if self.has_qk_norm:
            heads = (1, 1) if qk_norm == "head" else (num_heads, self.num_kv_heads)
            self.query_scale = nnx.Param(jnp.ones((heads[0] * self.head_dim,), jnp.float32))
            self.key_scale = nnx.Param(jnp.ones((heads[1] * self.head_dim,), jnp.float32))

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> Attention:
        """The attention layer that `config` describes."""
        return cls(
            config.width,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qk_norm=config.qk_norm,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            init_std=config.init_std,
            output_init_std=residual_output_std(config),
            compute_dtype=config.compute_dtype,
            attention=config.attention,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        positions: Int[Array, "#B S"] | None = None,
        rotary: tuple[Float[Array, "#B S half"], Float[Array, "#B S half"]] | None = None,
        groups: Int[Array, "B S"] | None = None,
        cache: KeyValueCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B S D"], KeyValueCache | None]:
        """Attends causally within each group, or, with a cache, to everything up to each token's position.

        Args:
          x: hidden states.
          positions: for the rotary embedding and, with a cache, the slots of x's tokens, consecutive in each row;
            None for 0..S-1.
          rotary: `rope_angles` of the positions, if they are there already.
          groups: tokens see only tokens with the same number (documents; padding is a group of its own); None for
            one group. Not used with a cache.
          cache: earlier keys and values.
          layer: whose part of the cache this layer reads and writes.

        Returns:
          The output, in compute_dtype, and the cache with x's tokens written to it (None without one).
        """
        batch, length, _ = x.shape
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        if rotary is None:
            rotary = rope_angles(positions, self.head_dim, self.rope_theta)
        with jax.named_scope("attention"):
            weight = gathered(self.query_key_value[...].astype(self.compute_dtype), "width", "heads", None, None)
            projected = jnp.einsum("bsd,dmrh->bsmrh", x.astype(self.compute_dtype), weight)
            cosine, sine = (angle[:, :, None, None] for angle in rotary)
            # Splits, whose gradient is a concatenation; that of slices is a sum of padded arrays.
            query_key, value = jnp.split(projected, [self.queries_per_key + 1], axis=3)
            query_key = apply_rope(self._normalized(query_key), cosine, sine)
            query, key = jnp.split(query_key, [self.queries_per_key], axis=3)
            query = query.transpose(0, 2, 3, 1, 4)
            key, value = (part[:, :, :, 0].transpose(0, 2, 1, 3) for part in (key, value))
            if cache is None:
                mixed = self_attention(query, key, value, groups, attention=self.attention)
            else:
                positions = jnp.broadcast_to(positions, (batch, length))
                cache = written(cache, layer, key, value, positions[:, 0])
                mixed = cached_attention(query, cache.key[layer], cache.value[layer], positions)
            mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, self.head_dim)
            output = gathered(self.output[...].astype(self.compute_dtype), "heads", None, "width")
            return jnp.einsum("bsnh,nhd->bsd", mixed, output), cache

    def _normalized(self, query_key: Float[Array, "B S M R1 head_dim"]) -> Float[Array, "B S M R1 head_dim"]:
        """RMSNorm of queries and keys over as many dims as their scales have: one head's or all heads'."""
        if not self.has_qk_norm:
            return query_key

        def normalized(x: Array, scale: Array) -> Array:
            return rms_normalize(x.reshape(*x.shape[:2], -1, scale.size), scale, self.norm_eps).reshape(x.shape)

        query = normalized(query_key[..., :-1, :], self.query_scale[...])
        key = normalized(query_key[..., -1:, :], self.key_scale[...])
        return jnp.concatenate([query, key], axis=-2)


def cached_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M C head_dim"],
    value: Float[Array, "B M C head_dim"],
    positions: Int[Array, "B S"],
) -> Float[Array, "B M R S head_dim"]:
    """Attention of tokens at `positions` to the cached slots up to their own; softmax in float32."""
    scores = jnp.einsum("bmrqh,bmch->bmrqc", query, key, preferred_element_type=jnp.float32)
    allowed = jnp.arange(key.shape[2]) <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores * query.shape[-1] ** -0.5, MASKED), axis=-1)
    return jnp.einsum("bmrqc,bmch->bmrqh", weights.astype(query.dtype), value)


def written(
    cache: KeyValueCache,
    layer: int | Int[Array, ""],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    start: Int[Array, " B"],
) -> KeyValueCache:
    """The cache with S new tokens of each row at consecutive slots of one layer, from that row's start."""

    rows = jnp.arange(start.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(key.shape[2])

    def write(cached: Array, new: Array) -> Array:
        new = new.transpose(0, 2, 1, 3).astype(cached.dtype)
        return cached.at[layer, rows, :, slots].set(new, unique_indices=True)

    return KeyValueCache(write(cache.key, key), write(cache.value, value))
