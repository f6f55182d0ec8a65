"""Flash attention by kernels that JAX ships: splash (TPU), cuDNN and Pallas' Triton kernel (GPU).

All compute `causal_attention`'s definition and keep the logsumexp of each query instead of the scores.

B batch, M key and value heads, R queries per key head, H = M·R query heads, S sequence.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.layers.causal_attention import scaled
from pallas_kernels import execution

SPLASH_BLOCKS = (512, 256, 128)
"""Queries and keys of a splash block: the largest that divides a chunk of the sequence. MaxText's default is 512."""

CONTEXT_RESIDUALS = "context_attention"
"""Checkpoint name of the output and the logsumexps where keys and values are gathered."""


def splash_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    groups: Int[Array, "B S"] | None,
) -> Float[Array, "B M R S head_dim"]:
    """`causal_attention` by the splash kernel, on TPU or interpreted."""
    heads = query.shape[1] * query.shape[2]
    return splash(splash_kernel(query.shape[3], heads), query, key, value, groups, groups)


def splash_kernel(length: int, heads: int, order: tuple[int, ...] = (0,)) -> Any:
    """The kernel of a causal mask, whose queries may lie in another order and be spread over devices.

    Args:
      length: S.
      heads: query heads of one device.
      order: the chunks of the sequence in the order in which the queries lie, two for each device they are spread
        over; (0,) for a whole row on one device.
    """
    return _splash_kernel(length, heads, order, execution.target_of("tpu").interpret)


@functools.cache
def _splash_kernel(length: int, heads: int, order: tuple[int, ...], interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # slow to import

    chunk = length // len(order)
    block = next(block for block in SPLASH_BLOCKS if chunk % block == 0)
    # Not the fused backward kernel, which keeps the queries' gradient once for every block of keys.
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    mask = library.CausalMask((length, length))
    mask.q_sequence = np.concatenate([np.arange(c * chunk, (c + 1) * chunk, dtype=np.int32) for c in order])
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mha(
            library.MultiHeadMask([mask] * heads),
            block_sizes=library.BlockSizes(**dict.fromkeys(sizes, block)),
            head_shards=1,
            q_seq_shards=max(1, len(order) // 2),
            residual_checkpoint_name=CONTEXT_RESIDUALS,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)  # belongs to no trace and no device


def splash(
    kernel: Any,
    query: Float[Array, "B M R Q head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    query_groups: Int[Array, "B Q"] | None,
    key_groups: Int[Array, "B S"] | None,
) -> Float[Array, "B M R Q head_dim"]:
    """A kernel of `splash_kernel` over a batch."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    segments = None if query_groups is None else SegmentIds(query_groups, key_groups)
    heads = scaled(query).reshape(query.shape[0], -1, *query.shape[3:])
    return jax.vmap(kernel)(heads, key, value, segments).reshape(query.shape)


def triton_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    groups: Int[Array, "B S"] | None,
) -> Float[Array, "B M R S head_dim"]:
    """`causal_attention` by Pallas' Triton kernel, on GPU or interpreted.

    The kernel knows no grouped queries: keys and values are repeated R times, and so kept for the backward pass.
    """
    from jax.experimental.pallas.ops.gpu import attention as library

    repeats, size = query.shape[2], jnp.dtype(query.dtype).itemsize
    arguments = (_heads_last(query), *(jnp.repeat(_heads_last(x[:, :, None]), repeats, axis=2) for x in (key, value)))
    target = execution.target_of("gpu")
    # The largest for which ptxas spills no register (compiled for H100 and B200, head_dim 16 to 128).
    forward = 64 if target.chip == "b200" and query.shape[-1] <= 64 else 256 // size
    backward = min(64, 8192 // (size * 2 ** math.ceil(math.log2(query.shape[-1]))))
    mixed = library.mha(
        *arguments,
        groups,
        sm_scale=query.shape[-1] ** -0.5,
        causal=True,
        block_sizes=library.BlockSizes(forward, 64, *[backward] * 4),
        interpret=target.interpret,
    )
    return _heads_first(mixed, query.shape)


def cudnn_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
) -> Float[Array, "B M R S head_dim"]:
    """`causal_attention` without groups by cuDNN."""
    arguments = (_heads_last(query), *(_heads_last(x[:, :, None]) for x in (key, value)))
    return _heads_first(jax.nn.dot_product_attention(*arguments, is_causal=True, implementation="cudnn"), query.shape)


def _heads_last(x: Float[Array, "B M R S head_dim"]) -> Float[Array, "B S H head_dim"]:
    batch, _, _, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)


def _heads_first(x: Float[Array, "B S H head_dim"], shape: tuple[int, ...]) -> Float[Array, "B M R S head_dim"]:
    batch, heads, repeats, length, width = shape
    return x.reshape(batch, length, heads, repeats, width).transpose(0, 2, 3, 1, 4)
