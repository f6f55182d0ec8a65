"""Which implementation of causal attention runs, and on which part of the arrays.

B batch, M key and value heads, R queries per key head, S sequence, C devices along the mesh's `context` axis.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.config import ConfigError
from jaxmoe.layers import flash_attention
from jaxmoe.layers.causal_attention import causal_attention
from jaxmoe.layers.context_attention import AXIS, context_attention, zigzag_order
from jaxmoe.sharding import Partitioning, partitioning_in_use
from pallas_kernels import execution

PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}
"""What `auto` tries on a platform before `xla`."""

_BACKENDS = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What the choice of an implementation depends on, beside the platform.

    Attributes:
      length: S, the whole sequence.
      head_dim: width of a head.
      dtype: of queries, keys and values.
      has_groups: documents or padding are told apart.
      context: C, over which the sequence is spread.
    """

    length: int
    head_dim: int
    dtype: str = "bfloat16"
    has_groups: bool = True
    context: int = 1


def resolved_attention(attention: str, case: AttentionCase) -> str:
    """The implementation that a call runs; what `auto` chose, and why, is logged once for each case.

    Args:
      attention: as in `jaxmoe.config.ModelConfig`.
      case: the call's shapes.

    Raises:
      ConfigError: an implementation that the platform or the shapes rule out; the message names the limit and what
        would work.
    """
    platform = execution.platform()
    if attention == "auto":
        return _logged_choice(platform, case)
    reason = _wrong_platform(attention) or limit(attention, case)
    if reason is not None:
        raise ConfigError(f"attention={attention!r}: {reason}; {_choice(platform, case)[0]!r} (or 'auto') would work.")
    return attention


def _choice(platform: str, case: AttentionCase) -> tuple[str, dict[str, str]]:
    """What `auto` is, and why it is none of those before."""
    refused = {}
    for name in PREFERRED.get(platform, ()):
        reason = limit(name, case)
        if reason is None:
            return name, refused
        refused[name] = reason
    return "xla", refused


@functools.cache
def _logged_choice(platform: str, case: AttentionCase) -> str:
    name, refused = _choice(platform, case)
    reasons = "".join(f"; not {other!r}: {reason}" for other, reason in refused.items())
    level = logging.WARNING if name == "xla" and refused else logging.INFO
    _logger.log(level, "attention 'auto' is %r on platform %r for %s%s", name, platform, case, reasons)
    return name


def _wrong_platform(attention: str) -> str | None:
    if attention == "xla":
        return None
    try:
        execution.target_of(_BACKENDS[attention])
    except ValueError:
        kind = {"tpu": "TPUs", "gpu": "NVIDIA GPUs of compute capability 8.0 or newer"}[_BACKENDS[attention]]
        return f"it runs on {kind} and the platform is {execution.platform()!r}"
    return None


def row_multiple(attention: str, context: int = 1) -> int:
    """What the length of every row is a multiple of under an implementation that is asked for by name.

    Args:
      attention: as in `jaxmoe.config.ModelConfig`; `auto` takes another implementation for other rows.
      context: C, over which the sequence is spread.
    """
    if attention not in ("splash", "triton"):
        return 1
    return 128 * (1 if context == 1 else 2 * context)


def limit(attention: str, case: AttentionCase) -> str | None:
    """Why an implementation cannot compute a case; None if it can. `xla` computes all."""
    if attention == "splash":
        multiple = row_multiple(attention, case.context)
        if case.length % multiple:
            among = "" if case.context == 1 else f", 128 for each of 2 chunks on {case.context} context devices"
            return f"sequence length {case.length} is not a multiple of {multiple}{among}"
        if case.head_dim % 8 or case.head_dim > 256:
            return f"head_dim {case.head_dim} is not a multiple of 8 up to 256"
    if attention in ("cudnn", "triton") and case.context > 1:
        return f"a sequence over {case.context} context devices needs a mask of its own on each, which it does not take"
    if attention == "cudnn":
        if case.dtype != "bfloat16":
            return f"compute_dtype {case.dtype!r} is not 'bfloat16'"
        if case.has_groups:
            return "it tells no documents and no padding apart without a mask of S x S numbers"
        if case.head_dim % 8 or case.head_dim > 128:
            return f"head_dim {case.head_dim} is not a multiple of 8 up to 128"
    if attention == "triton":
        if case.length % 128:
            return f"sequence length {case.length} is not a multiple of 128"
        if not 16 <= case.head_dim <= 128:
            return f"head_dim {case.head_dim} is not within 16..128"
    return None


def self_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    groups: Int[Array, "B S"] | None = None,
    *,
    attention: str = "auto",
) -> Float[Array, "B M R S head_dim"]:
    """`causal_attention` by the implementation that is asked for, each device on its part.

    Where a partitioning is in use, rows are spread over its batch axes, key heads over `tensor` if it divides them,
    and the sequence over `context` if twice its size divides it: no kernel and no loop meets a whole array.

    Args:
      query, key, value: rotated already.
      groups: only tokens with equal numbers see each other; None for one group.
      attention: as in `jaxmoe.config.ModelConfig`.

    Raises:
      ConfigError: see `resolved_attention`.
    """
    partitioning = partitioning_in_use()
    length = query.shape[3]
    context = 1 if partitioning is None else partitioning.size(AXIS)
    if context > 1 and length % (2 * context):
        _warn_of_unspread(length, context)
        context = 1
    case = AttentionCase(length, query.shape[4], jnp.dtype(query.dtype).name, groups is not None, context)
    name = resolved_attention(attention, case)
    if partitioning is None or partitioning.mesh.size == 1:
        return _attend(name, query, key, value, groups)
    return _spread(partitioning, name, context, query, key, value, groups)


@functools.cache
def _warn_of_unspread(length: int, context: int) -> None:
    _logger.warning(
        "attention over %d tokens is computed whole on each of %d context devices; a multiple of %d would be spread",
        length, context, 2 * context,
    )  # fmt: skip


def _attend(name: str, query: Array, key: Array, value: Array, groups: Array | None) -> Array:
    if name == "splash":
        return flash_attention.splash_attention(query, key, value, groups)
    if name == "triton":
        return flash_attention.triton_attention(query, key, value, groups)
    if name == "cudnn":
        return flash_attention.cudnn_attention(query, key, value)
    return causal_attention(query, key, value, groups)


def _spread(
    partitioning: Partitioning,
    name: str,
    context: int,
    query: Array,
    key: Array,
    value: Array,
    groups: Array | None,
) -> Array:
    """The call inside a `shard_map`: the partitioner cannot divide a kernel, and gathers what a loop runs over."""
    mesh = partitioning.mesh
    sequence = "sequence" if context > 1 else None
    query_axes, key_axes = ("batch", "heads", None, sequence, None), ("batch", "heads", sequence, None)
    query_spec, key_spec = partitioning.spec(query_axes, query.shape), partitioning.spec(key_axes, key.shape)
    group_spec = None if groups is None else partitioning.spec(("batch", sequence), groups.shape)
    kernel = kernel_spec = None
    attend = functools.partial(_on_one_device, name)
    if context > 1:
        attend = context_attention
        if name == "splash":
            local = NamedSharding(mesh, query_spec).shard_shape(query.shape)
            kernel = flash_attention.splash_kernel(query.shape[3], local[1] * local[2], zigzag_order(context))
            kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, AXIS)))
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(kernel_spec, query_spec, key_spec, key_spec, group_spec),
        out_specs=query_spec,
        check_vma=False,  # the libraries' kernels do not say how their results vary over the mesh
    )(kernel, query, key, value, groups)


def _on_one_device(name: str, _: None, query: Array, key: Array, value: Array, groups: Array | None) -> Array:
    return _attend(name, query, key, value, groups)
