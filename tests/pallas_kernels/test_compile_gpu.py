"""The GPU compiler takes the kernels, spills no register, and what it makes of the whole layer holds no wasted work.

XLA:GPU, Triton and ptxas compile for an H100 and a B200 that are not there; the interpreter accepts kernels that they
refuse.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels import compiling_for, moe_mlp, targets
from pallas_kernels.gpu_resources import resources
from pallas_kernels.group_tiles import most_tiles
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.triton_gpu import row_tile

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {
    "study": (4096, 2, 64, 1024, 2048),
    "one_expert_each": (4096, 2, 8, 512, 1024),
    "few_experts": (16384, 2, 8, 1024, 2048),
    "many_experts": (2048, 2, 128, 1024, 2048),
    "fine_grained": (4096, 8, 256, 2048, 128),
    "odd": (1000, 3, 8, 200, 136),
}
SHARED_MEMORY = 227 * 1024


def traced_layer(shape, dtype=jnp.bfloat16, recompute=False, chip="h100"):
    """Forward and backward of `moe_mlp` for a card."""
    tokens, k, experts, width, hidden = SHAPES[shape]
    try:
        mesh = targets.mesh_of(chip)
    except targets.CompilerMissing as error:
        pytest.skip(str(error))

    def gradients(x, index, gate, w_gate_up, w_down, y_gradient):
        def layer(x, gate, w_gate_up, w_down):
            return moe_mlp(x, index, gate, w_gate_up, w_down, recompute=recompute)

        y, pull = jax.vjp(layer, x, gate, w_gate_up, w_down)
        return y, *pull(y_gradient)

    arguments = [
        targets.abstract(mesh, (tokens, width), dtype),
        targets.abstract(mesh, (tokens, k), jnp.int32),
        targets.abstract(mesh, (tokens, k), jnp.float32),
        targets.abstract(mesh, (experts, width, 2 * hidden), dtype),
        targets.abstract(mesh, (experts, hidden, width), dtype),
        targets.abstract(mesh, (tokens, width), dtype),
    ]
    with compiling_for(chip), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(gradients).trace(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "many_experts"])
def test_the_layer_compiles_and_every_kernel_fits_its_registers(shape, dtype):
    _, kernels = resources(traced_layer(shape, dtype).lower())
    names = {kernel.kernel for kernel in kernels}
    mosaic = {"grouped_matmul_mosaic_gpu"} if dtype == jnp.bfloat16 and shape != "odd" else set()
    assert names - mosaic == {
        "moe_up_gpu", "grouped_matmul_gpu", "hidden_gradient_gpu", "weight_gradient_gpu", "combine_gpu"
    }  # fmt: skip
    assert mosaic <= names
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert 0 < kernel.registers <= 255, kernel
        assert (kernel.shared_bytes or 0) <= SHARED_MEMORY, kernel
        assert not kernel.serialized, kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"), [("study", jnp.bfloat16), ("few_experts", jnp.bfloat16), ("few_experts", jnp.float32)]
)
def test_the_layer_compiles_for_blackwell_without_hoppers_kernel(shape, dtype):
    program, kernels = resources(traced_layer(shape, dtype, chip="b200").lower())
    assert {kernel.kernel for kernel in kernels} == {
        "moe_up_gpu", "grouped_matmul_gpu", "hidden_gradient_gpu", "weight_gradient_gpu", "combine_gpu"
    }  # fmt: skip
    assert "mosaic_gpu" not in program.as_text()
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert 0 < kernel.registers <= 255, kernel
        assert 0 <= kernel.shared_bytes <= SHARED_MEMORY, kernel


def planned_flops(jaxpr):
    """What the kernels of a program say that they execute: XLA knows nothing of it, and counts none."""
    total = 0
    for equation in jaxpr.eqns:
        estimate = equation.params.get("cost_estimate")
        if estimate is not None:
            total += estimate.flops
        else:
            total += sum(map(planned_flops, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["study", "fine_grained"])
def test_the_compiled_layer_wastes_nothing(shape):
    """No scatter, no product outside the kernels, no copied, transposed or float32 weight; the FLOPs of its rows."""
    tokens, k, experts, width, hidden = SHAPES[shape]
    traced = traced_layer(shape)
    program = traced.lower().compile().as_text()
    assert not re.search(r"= \S+ scatter\(", program)
    products = [line for line in program.splitlines() if re.search(r"= \S+ dot\(", line)]
    assert all("make_plan" in line for line in products)  # the plan counts earlier assignments by one
    assert "cublas" not in program
    for a, b in ((width, 2 * hidden), (hidden, width)):
        assert f"f32[{experts},{a},{b}]" not in program
        for axes in (f"{experts},{a},{b}", f"{experts},{b},{a}"):
            assert not re.search(rf"bf16\[{axes}\]\S* (copy|transpose)\(", program)
    flops = 3 * 3 * 2 * width * hidden  # of one row: up twice as wide as down, forward, and two backward
    served = mosaic_gpu.product_tile(tokens * k, experts)  # the down product; its kernel can carry no estimate
    down = 2 * most_tiles(tokens * k, experts, served.rows) * served.rows * hidden * width
    active, padding = tokens * k * flops, (experts + 1) * row_tile(tokens * k, experts) * flops
    assert active <= planned_flops(traced.jaxpr.jaxpr) + down <= 1.15 * active + padding


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few_experts", "many_experts", "fine_grained"])
@pytest.mark.parametrize(("recompute", "share"), [(False, 1.25), (True, 0.6)])
def test_the_layer_holds_what_it_is_defined_by(shape, recompute, share):
    """Temporary memory against saved inputs and routed activations (docs/kernels.md)."""
    tokens, k, _, width, hidden = SHAPES[shape]
    compiled = traced_layer(shape, recompute=recompute).lower().compile()
    numbers = tokens * width + tokens * k * (2 * width + 3 * hidden)
    assert compiled.memory_analysis().temp_size_in_bytes <= share * 2 * numbers


def test_a_missing_compiler_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "COMPILERS", tmp_path)
    monkeypatch.setattr(targets, "_has", lambda module: False)
    with pytest.raises(targets.CompilerMissing, match="pip install --target .* jax-cuda12-plugin==.* brings it"):
        targets.use_gpu_compiler.__wrapped__()
