"""The TPU compiler takes the kernels, and what it makes of the whole layer holds no wasted work.

libtpu compiles for chips that are not there; interpreters accept kernels that it refuses.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compiling_for, moe_mlp, targets
from pallas_kernels.grouped_matmul.mosaic_tpu import row_tile

SHAPES = {"study": (4096, 2, 64, 1024, 2048), "fine_grained": (4096, 8, 256, 2048, 128), "odd": (1000, 3, 8, 200, 136)}


def compiled_layer(chip, shape, dtype=jnp.bfloat16, recompute=False):
    """Forward and backward of `moe_mlp` for a chip."""
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
        return jax.jit(gradients).lower(*arguments).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "shape", "dtype"),
    [
        ("v5e", "study", jnp.bfloat16),
        ("v5p", "odd", jnp.float32),
        ("v6e", "study", jnp.float32),
        ("tpu7x", "fine_grained", jnp.bfloat16),
    ],
)
def test_the_layer_compiles_forward_and_backward(chip, shape, dtype):
    assert compiled_layer(chip, shape, dtype).memory_analysis().temp_size_in_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["study", "fine_grained"])
def test_the_compiled_layer_wastes_nothing(shape):
    """No scatter, no transposed or float32 copy of a weight, and the FLOPs of the rows that there are."""
    tokens, k, experts, width, hidden = SHAPES[shape]
    compiled = compiled_layer("v5p", shape)
    program = compiled.as_text()
    assert not re.search(r"= \S+ scatter\(", program)
    for a, b in ((width, 2 * hidden), (hidden, width)):
        assert f"f32[{experts},{a},{b}]" not in program
        for axes in (f"{experts},{a},{b}", f"{experts},{b},{a}"):
            assert not re.search(rf"bf16\[{axes}\]\S* (copy|transpose)\(", program)
    executed = compiled.cost_analysis()["flops"]
    products = 3 * 3 * 2 * width * hidden  # of one row: up twice as wide as down, forward, and two backward
    active, padding = tokens * k * products, experts * row_tile(tokens * k // experts) * products
    assert active <= executed <= 1.15 * active + padding


@pytest.mark.slow
def test_recomputing_the_up_product_keeps_less():
    kept, again = (compiled_layer("v5p", "study", recompute=choice) for choice in (False, True))
    assert kept.memory_analysis().temp_size_in_bytes >= again.memory_analysis().temp_size_in_bytes
