"""The routed SwiGLU MLP: plan, dispatch, two grouped matmuls, combine."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import resolved_backend
from pallas_kernels.checks import require, require_float, require_native_dtype, require_rank, require_same_dtype
from pallas_kernels.combine.api import combine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.execution import PLATFORMS, target_of
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.moe_mlp import cpu_native, kernels, reference, xla_cpu
from pallas_kernels.plan import Plan, make_plan
from pallas_kernels.varying import alike


def moe_mlp(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    *,
    mask: jax.Array | None = None,
    capacity: int | None = None,
    plan: Plan | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> jax.Array:
    r"""$y_t = \sum_j gate_{tj} W^{down}_{e} (\mathrm{SiLU}(x_t W^{gate}_{e}) \odot x_t W^{up}_{e})$, $e = index_{tj}$.

    Differentiable in x, gate and the weights by `jax.grad` and `jax.vjp`. The gradients are written by hand, so
    `jax.jvp` and `jax.hessian` are not supported.

    Args:
      x: (T, D) float32 or bfloat16.
      expert_index: (T, K) int32, as in `make_plan`.
      gate: (T, K) float32 or bfloat16.
      w_gate_up: (E, D, 2F), the gate half first; dtype of x.
      w_down: (E, F, D); dtype of x.
      mask: (T,) bool, True for tokens to route; the others come out zero.
      capacity: the most rows one expert takes, later tokens dropped; None is dropless.
      plan: of `make_plan` for the same index, if it is there already; then without mask and capacity, which it
        holds.
      recompute: keep nothing but the inputs for the backward pass, which computes the up product again
        (backends `cpu`, `cpu_native`, `tpu` and `gpu`; the others keep what autodiff keeps).
      backend: `auto` or one of `BACKENDS`.

    Returns:
      (T, D) in the dtype of x; matmuls and the sum over K accumulate in float32.

    Raises:
      ValueError: shapes, dtypes, indices or a backend that do not fit; the message names value and limit.
    """
    target = target_of(resolved_backend(backend))
    backend = target.backend
    expert_index = jnp.asarray(expert_index)
    _check(x, expert_index, gate, w_gate_up, w_down)
    require_native_dtype(backend, x=x)
    num_experts = w_gate_up.shape[0]
    if plan is None:
        plan = make_plan(expert_index, num_experts, capacity=capacity, mask=mask)
    else:
        require(mask is None and capacity is None, "mask and capacity go to make_plan when a plan is given.")
        require(
            plan.num_experts == num_experts and plan.inverse.shape == expert_index.shape,
            f"plan is for E={plan.num_experts} and (T, K) = {tuple(plan.inverse.shape)} but the weights have "
            f"E={num_experts} and expert_index has shape {tuple(expert_index.shape)}.",
        )
        require(plan.block == 1, f"plan has block={plan.block}; moe_mlp takes groups that begin anywhere, block=1.")
    if x.shape[0] == 0:
        return jnp.zeros_like(x)
    x, plan, gate, w_gate_up, w_down = alike(x, plan, gate, w_gate_up, w_down)
    with jax.named_scope("moe_mlp"):
        if backend == "reference":
            return reference.moe_mlp(x, plan, gate, w_gate_up, w_down)
        if backend == "cpu":
            return xla_cpu.moe_mlp(recompute, x, plan, gate, w_gate_up, w_down)
        if backend == "cpu_native":
            return cpu_native.moe_mlp(recompute, x, plan, gate, w_gate_up, w_down)
        if backend in PLATFORMS:
            return kernels.moe_mlp(target, recompute, x, plan, gate, w_gate_up, w_down)
        hidden = grouped_matmul(dispatch(x, plan, backend=backend), w_gate_up, plan.group_sizes, backend=backend)
        gated, up = jnp.split(hidden, 2, axis=1)
        rows = grouped_matmul(jax.nn.silu(gated) * up, w_down, plan.group_sizes, backend=backend)
        return combine(rows, plan, gate, backend=backend)


def _check(x, expert_index, gate, w_gate_up, w_down):
    require_rank("x", x, "T D")
    require_rank("expert_index", expert_index, "T K")
    require_rank("w_gate_up", w_gate_up, "E D 2F")
    require_rank("w_down", w_down, "E F D")
    require_float(x=x, gate=gate, w_gate_up=w_gate_up, w_down=w_down)
    require_same_dtype(x=x, w_gate_up=w_gate_up, w_down=w_down)
    tokens, width = x.shape
    require(
        expert_index.shape[0] == tokens,
        f"expert_index has {expert_index.shape[0]} tokens but x has T={tokens}.",
    )
    require(
        gate.shape == expert_index.shape,
        f"gate has shape {tuple(gate.shape)}; (T, K) = {tuple(expert_index.shape)} of expert_index is expected.",
    )
    experts, _, fused = w_gate_up.shape
    require(w_gate_up.shape[1] == width, f"w_gate_up has D={w_gate_up.shape[1]} but x has D={width}.")
    require(fused % 2 == 0, f"w_gate_up has 2F={fused}, which is odd; it holds the gate half, then the up half.")
    require(
        w_down.shape == (experts, fused // 2, width),
        f"w_down has shape {tuple(w_down.shape)}; (E, F, D) = {(experts, fused // 2, width)} is expected beside "
        f"w_gate_up of shape {tuple(w_gate_up.shape)}.",
    )
