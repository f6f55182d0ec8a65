"""Kernels for Mixture-of-Experts layers, with jax as their only dependency.

`make_plan` sorts routed rows by expert, `dispatch` gathers them, `grouped_matmul` multiplies each group with its
expert's weights, `combine` brings the rows back to their tokens; `moe_mlp` is the whole routed SwiGLU MLP in one
call. Every operation has its definition in plain `jax.numpy` (`reference.py` of its folder), which every backend
must equal, values and gradients.

Axis letters: T tokens, D width, F expert hidden width, E experts, K experts per token, N = T·K routed rows.
"""

from pallas_kernels.backend import BACKENDS, compiler_options, resolved_backend
from pallas_kernels.combine.api import combine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.execution import compiling_for, interpreted
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.moe_mlp.api import moe_mlp
from pallas_kernels.plan import Plan, make_plan

__all__ = [
    "BACKENDS",
    "Plan",
    "combine",
    "compiler_options",
    "compiling_for",
    "dispatch",
    "grouped_matmul",
    "interpreted",
    "make_plan",
    "moe_mlp",
    "resolved_backend",
]
