"""Every Pallas kernel of the routed MLP at a shape, as a call with its arguments: for compiling and for measuring it.

Axis letters as in `pallas_kernels`: T tokens, K experts per token, E experts, D width, F hidden width, N = T·K rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import kernels
from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.moe_mlp.api import moe_mlp
from pallas_kernels.tiles import Tiling


class Shape(NamedTuple):
    """T, K, E, D, F of a layer."""

    tokens: int
    experts_per_token: int
    experts: int
    width: int
    hidden: int

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens * self.experts_per_token


STUDY = [
    Shape(tokens, k, experts, width, 2 * width)
    for width in (512, 1024, 2048)
    for experts in (8, 16, 32, 64, 128, 256)
    for k in (2, 4, 8, 16)
    for tokens in (4096, 16384)
    if k <= experts
]
FINE_GRAINED = [
    Shape(tokens, 8, 256, 2048, hidden) for hidden in (128, 256, 512, 1024) for tokens in (4096, 16384)
]
SAMPLE = [
    Shape(4096, 2, 8, 512, 1024),
    Shape(4096, 2, 64, 1024, 2048),
    Shape(16384, 16, 256, 2048, 4096),
    Shape(4096, 8, 256, 2048, 128),
]
"""The corners of the others, and one from their middle."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      kernel: what it is called in reports.
      function: takes the arguments in their order.
      arguments: shapes and dtypes by name.
      active_flops: of the products with rows that there are.
      tiling: how its tile is chosen, if it has one.
      sizes: what `tiling` chooses by.
      held_bytes: of what has to be there between arguments and results.
    """

    kernel: str
    function: Callable
    arguments: dict[str, jax.ShapeDtypeStruct]
    active_flops: int
    tiling: Tiling | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    held_bytes: int = 0

    def least_bytes(self, results) -> int:
        """Every argument read once and every result, arrays or their shapes, written once."""
        return sum(array.size * array.dtype.itemsize for array in (*self.arguments.values(), *jax.tree.leaves(results)))

    def inputs(self, seed: int = 0) -> list[jax.Array]:
        """Standard normal numbers, random tokens, equal groups."""
        rng = np.random.default_rng(seed)

        def array(name, like):
            if name == "group_sizes":
                rows = next(a.shape[0] for n, a in self.arguments.items() if n in ("rows", "token"))
                return np.diff(np.arange(like.shape[0] + 1) * rows // like.shape[0])
            if name == "token":
                return rng.integers(0, self.arguments["x"].shape[0], like.shape)
            if name == "inverse":
                return rng.permutation(like.size).reshape(like.shape)
            if name == "num_routed":
                return next(a for n, a in self.arguments.items() if n in ("token", "inverse")).size
            return jax.random.normal(jax.random.key(seed), like.shape, like.dtype)

        return [jnp.asarray(array(name, like), like.dtype) for name, like in self.arguments.items()]


def kernel_cases(shape: Shape, dtype, target: Target) -> list[Case]:
    """The kernels that the layer runs forward and backward, each alone."""
    (tokens, k, experts, width, hidden), rows = shape, shape.rows
    dispatch, combine, grouped_matmul, moe = (
        kernels(folder, target) for folder in ("dispatch", "combine", "grouped_matmul", "moe_mlp")
    )
    on_tpu = target.backend == "tpu"
    rows_per_group = rows // experts
    token = {"token": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    x = {"x": jax.ShapeDtypeStruct((tokens, width), dtype)}
    group_sizes = {"group_sizes": jax.ShapeDtypeStruct((experts,), jnp.int32)}
    w_gate_up = jax.ShapeDtypeStruct((experts, width, 2 * hidden), dtype)
    w_down = jax.ShapeDtypeStruct((experts, hidden, width), dtype)
    num_routed = {"num_routed": jax.ShapeDtypeStruct((), jnp.int32)}

    def row_array(of_width):
        return jax.ShapeDtypeStruct((rows, of_width), dtype)

    def flops(contracted, out):
        return 2 * rows * contracted * out

    def up(save_hidden):
        return Case(
            "up" if save_hidden else "up, nothing kept",
            lambda x, token, weights, sizes: moe.up(x, token, weights, sizes, target, save_hidden=save_hidden),
            x | token | {"weights": w_gate_up} | group_sizes,
            flops(width, 2 * hidden),
            moe.UP,
            dict(rows_per_group=rows_per_group, width=width, hidden=hidden, save_hidden=int(save_hidden)),
        )

    def product(kernel, weights, transpose, in_lanes):
        contracted, out = weights.shape[1:][::-1] if transpose else weights.shape[1:]
        lanes = {"in_lanes": True} if in_lanes else {}
        sizes = dict(rows_per_group=rows_per_group, contracted=contracted, out=out)
        by_mosaic = not on_tpu and mosaic_gpu.serves(row_array(contracted), weights, transpose, target)
        return Case(
            kernel,
            lambda rows, weights, sizes: grouped_matmul.product(rows, weights, sizes, transpose, target, **lanes),
            {"rows": row_array(contracted), "weights": weights} | group_sizes,
            flops(contracted, out),
            None if by_mosaic else grouped_matmul.PRODUCT,  # its tile comes from no table
            sizes | ({"in_lanes": int(in_lanes)} if on_tpu else {}),
        )

    def weight_gradient(kernel, contracted, out):
        return Case(
            kernel,
            lambda rows, gradient, sizes: grouped_matmul.weight_gradient(rows, gradient, sizes, target),
            {"rows": row_array(contracted), "gradient": row_array(out)} | group_sizes,
            flops(contracted, out),
            grouped_matmul.WEIGHT_GRADIENT,
            dict(rows_per_group=rows_per_group, contracted=contracted, out=out),
        )

    in_lanes = on_tpu and width % 128 == 0
    laid_out = jax.ShapeDtypeStruct((rows, width // 128, 128), dtype) if in_lanes else row_array(width)

    def sum_rows(kernel, weighted):
        gate = {"gate": jax.ShapeDtypeStruct((tokens, k), jnp.float32)} if weighted else {}
        return Case(
            kernel,
            lambda rows, inverse, num_routed, gate=None: combine.sum_rows(rows, inverse, num_routed, gate, target),
            {"rows": laid_out, "inverse": jax.ShapeDtypeStruct((tokens, k), jnp.int32)} | num_routed | gate,
            0,
            combine.COMBINE,
            dict(experts_per_token=k, width=width),
        )

    cases = [
        Case(
            "dispatch",
            lambda x, token, num_routed: dispatch.gather_tokens(x, token, num_routed, target),
            x | token | num_routed,
            0,
            dispatch.DISPATCH,
            dict(width=width),
        ),
        up(True),
        up(False),
        product("down product", w_down, False, in_lanes),
        product("down product's transpose", w_down, True, False),
        product("up product", w_gate_up, False, False),
        product("up product's transpose", w_gate_up, True, in_lanes),
        weight_gradient("gradient of w_down", hidden, width),
        weight_gradient("gradient of w_gate_up", width, 2 * hidden),
        sum_rows("combine", True),
        sum_rows("combine without gates", False),
    ]
    row_gate = {"gate": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    after = {"hidden": row_array(2 * hidden), "weights": w_down} | group_sizes
    if on_tpu:
        arguments = {"rows": row_array(width)} | row_gate | after

        def hidden_gradient(y_rows, gate, hidden, weights, sizes):
            return moe.hidden_gradient(y_rows, hidden, gate, weights, sizes, target)

    else:
        arguments = x | token | row_gate | after

        def hidden_gradient(y_gradient, token, gate, hidden, weights, sizes):
            return moe.hidden_gradient(y_gradient, token, gate, hidden, weights, sizes, target)

    sizes = dict(rows_per_group=rows_per_group, width=width, hidden=hidden)
    fused = moe.HIDDEN_GRADIENT.choose(dtype, target.chip, **sizes) is not None
    cases.append(
        Case(
            "hidden gradient",
            hidden_gradient,
            arguments,
            flops(width, hidden),
            moe.HIDDEN_GRADIENT,
            sizes,
            held_bytes=0 if fused else rows * hidden * jnp.dtype(dtype).itemsize,
        )
    )
    return cases


def layer_cases(shape: Shape, dtype, target: Target) -> list[Case]:
    """The whole layer, with its hidden layer kept and computed again."""
    return [layer_case(shape, dtype, target, recompute=recompute) for recompute in (False, True)]


def layer_case(shape: Shape, dtype, target: Target, *, recompute: bool = False) -> Case:
    """Forward and backward of `moe_mlp`; what it holds is the formula of docs/kernels.md."""
    tokens, k, experts, width, hidden = shape

    def layer(x, expert_index, gate, w_gate_up, w_down, from_loss):
        call = functools.partial(moe_mlp, recompute=recompute, backend=target.backend)
        y, pull = jax.vjp(lambda x, g, u, d: call(x, expert_index, g, u, d), x, gate, w_gate_up, w_down)
        return y, *pull(y + from_loss)  # a gradient comes after the output, as in training

    held = (tokens * width + shape.rows * (2 * width + 3 * hidden)) * jnp.dtype(dtype).itemsize
    products = (4 if recompute else 3) * 2 * width * 2 * hidden + 3 * 2 * hidden * width
    return Case(
        "layer, recomputing" if recompute else "layer",
        layer,
        {
            "x": jax.ShapeDtypeStruct((tokens, width), dtype),
            "expert_index": jax.ShapeDtypeStruct((tokens, k), jnp.int32),
            "gate": jax.ShapeDtypeStruct((tokens, k), jnp.float32),
            "w_gate_up": jax.ShapeDtypeStruct((experts, width, 2 * hidden), dtype),
            "w_down": jax.ShapeDtypeStruct((experts, hidden, width), dtype),
            "from_loss": jax.ShapeDtypeStruct((tokens, width), dtype),
        },
        shape.rows * products,
        held_bytes=0 if recompute else held,
    )
