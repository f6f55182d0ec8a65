"""The dispatch plan: which row of the grouped order each assignment of a token to an expert takes.

T tokens, K experts per token, E experts, N = T·K rows, M rows of a block. Assignment t·K + j is token t's j-th choice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import counting, execution
from pallas_kernels.checks import require, require_rank
from pallas_kernels.gather import take

_INT32_MAX = 2**31 - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["expert", "order", "inverse", "group_sizes", "group_offsets", "dropped"],
    meta_fields=["num_experts", "experts_per_token", "block"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows in the order of their experts, the tokens' order kept inside each group.

    Rows at and after `group_offsets[E]` belong to no expert: masked tokens, indices outside [0, E), and what
    the capacity dropped. With a block M > 1 every group begins at a multiple of M and ends with up to M-1 rows of
    nobody, so that there are N + E·(M-1) rows, rounded up to a multiple of M.

    Attributes:
      expert: (T, K) int32, the expert of each assignment, E for those of no expert.
      order: (rows,) int32, the assignment at each row; at a row that fills a block, any.
      inverse: (T, K) int32, the row of each assignment.
      group_sizes: (E,) int32, rows of each expert, those that fill its last block included.
      group_offsets: (E+1,) int32, first row of each expert; the last entry is where the groups end.
      dropped: () int32, assignments that the capacity dropped; masked tokens are not among them.
      num_experts: E.
      experts_per_token: K.
      block: M.
    """

    expert: jax.Array
    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array
    group_offsets: jax.Array
    dropped: jax.Array
    num_experts: int
    experts_per_token: int
    block: int = 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.inverse.shape[0]

    @property
    def token(self) -> jax.Array:
        """(rows,) int32, the token at each row."""
        return jax.lax.div(self.order, jnp.int32(self.experts_per_token))

    @property
    def num_rows(self) -> int:
        """N = T·K, the rows of no expert included; with a block, those that fill blocks too."""
        return self.order.shape[0]

    @property
    def routed(self) -> jax.Array:
        """(rows,) bool, the rows that hold an assignment of an expert."""
        row = jnp.arange(self.num_rows, dtype=jnp.int32)
        inside = row < self.group_offsets[-1]
        if self.block == 1 or self.num_tokens == 0:
            return inside
        return inside & (take(self.inverse.reshape(-1), self.order) == row)


def make_plan(
    expert_index: jax.Array,
    num_experts: int,
    *,
    capacity: int | None = None,
    mask: jax.Array | None = None,
    block: int = 1,
) -> Plan:
    """Plans the dispatch of T tokens to K experts each.

    On TPU and GPU rows are counted; on CPU, where a sort of packed keys is faster, they are sorted and searched.

    Args:
      expert_index: (T, K) integers, chosen experts. Under jit an index outside [0, E) belongs to no expert.
      num_experts: E.
      capacity: the most rows one expert takes; what comes later in token order is dropped. None: dropless.
      mask: (T,) bool, True for tokens to route; None routes all.
      block: M, of whose multiples every group is to begin at one, for a product with aligned tiles. The backends of
        this package take groups that begin anywhere, and `moe_mlp` no other plan than of block 1.

    Raises:
      ValueError: a shape, dtype, capacity or block that makes no sense, or, where the values are known (outside jit),
        an index outside [0, E) of a token that is to be routed.
    """
    expert_index = jnp.asarray(expert_index)
    require_rank("expert_index", expert_index, "T K")
    require(
        jnp.issubdtype(expert_index.dtype, jnp.integer),
        f"expert_index has dtype {expert_index.dtype}; an integer dtype is expected.",
    )
    if expert_index.dtype.itemsize < 4:  # E itself must be representable
        expert_index = expert_index.astype(jnp.int32)
    require(num_experts >= 1, f"num_experts={num_experts}; it must be positive.")
    tokens, k = expert_index.shape
    require(k >= 1, f"expert_index has shape {expert_index.shape}; at least one expert per token is needed.")
    require(capacity is None or capacity >= 0, f"capacity={capacity}; it must not be negative, or None for no limit.")
    require(block >= 1, f"block={block}; it must be positive, 1 for groups that begin anywhere.")
    if mask is not None:
        mask = jnp.asarray(mask)
        require(
            mask.shape == (tokens,) and mask.dtype == bool,
            f"mask has shape {mask.shape} and dtype {mask.dtype}; ({tokens},) bool is expected, one per token.",
        )
    _refuse_known_outliers(expert_index, num_experts, mask)

    in_range = (expert_index >= 0) & (expert_index < num_experts)
    if mask is not None:
        in_range &= mask[:, None]
    with jax.named_scope("make_plan"):
        expert = jnp.where(in_range, expert_index.astype(jnp.int32), num_experts).reshape(tokens * k)
        order, inverse, offsets = _group(expert, num_experts)
        dropped = jnp.int32(0)
        if capacity is not None:
            rank = inverse - offsets[expert]
            kept = jnp.where(rank < capacity, expert, num_experts)
            dropped = jnp.sum(kept != expert, dtype=jnp.int32)
            expert = kept
            order, inverse, offsets = _group(expert, num_experts)
        if block > 1:
            order, inverse, offsets = _aligned(order, inverse, offsets, expert, block)
        return Plan(
            expert=expert.reshape(tokens, k),
            order=order,
            inverse=inverse.reshape(tokens, k),
            group_sizes=jnp.diff(offsets),
            group_offsets=offsets,
            dropped=dropped,
            num_experts=num_experts,
            experts_per_token=k,
            block=block,
        )


def _aligned(order, inverse, offsets, expert, block):
    """The same groups, each from a multiple of the block on."""
    num_rows, num_experts = order.shape[0], offsets.shape[0] - 1
    sizes = -(-jnp.diff(offsets) // block) * block
    aligned = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
    row = jnp.arange(-(-(num_rows + num_experts * (block - 1)) // block) * block, dtype=jnp.int32)
    group = jnp.searchsorted(aligned[1:], row, side="right", method="scan_unrolled").astype(jnp.int32)
    place = jnp.clip(row - aligned[group] + offsets[group], 0, max(num_rows - 1, 0))
    moved = inverse + (aligned - offsets)[expert]
    return (take(order, place) if num_rows else jnp.zeros_like(row)), moved, aligned


def _group(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Order, inverse and offsets (E+1,) of assignments (N,) to experts 0..E, E standing for none."""
    if execution.platform() in ("tpu", "gpu"):
        return counting.group(expert, num_experts)
    rows = expert.shape[0]
    assignment = jnp.arange(rows, dtype=jnp.int32)
    starts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    if (num_experts + 1) * rows > _INT32_MAX:
        order = jnp.argsort(expert, stable=True).astype(jnp.int32)
        inverse = jnp.argsort(order).astype(jnp.int32)
        offsets = jnp.searchsorted(expert[order], starts, method="scan_unrolled")
        return order, inverse, offsets.astype(jnp.int32)
    # One int32 key with the assignment in its low part: XLA:CPU sorts it several times faster than pairs, and the
    # key's place among the sorted is the inverse.
    key = expert * rows + assignment
    grouped = jnp.sort(key)
    order = grouped % max(rows, 1)
    inverse = jnp.searchsorted(grouped, key, method="scan").astype(jnp.int32)
    offsets = jnp.searchsorted(grouped, starts * rows, method="scan_unrolled")
    return order, inverse, offsets.astype(jnp.int32)


def _refuse_known_outliers(expert_index: jax.Array, num_experts: int, mask: jax.Array | None) -> None:
    if isinstance(expert_index, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    values = np.asarray(expert_index)
    outside = (values < 0) | (values >= num_experts)
    if mask is not None:
        outside &= np.asarray(mask)[:, None]
    if outside.any():
        token, choice = np.argwhere(outside)[0]
        raise ValueError(
            f"expert_index[{token}, {choice}]={values[token, choice]} but there are num_experts={num_experts}; "
            f"indices must lie in 0..{num_experts - 1}."
        )
