"""Every backend of moe_mlp equals the formula, token by token; and does not do E times the work."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import (
    BACKENDS,
    cases,
    combine,
    dispatch,
    expert_products,
    grouped_matmul,
    make_plan,
    moe_mlp,
    windows,
)
from pallas_kernels.execution import Target
from pallas_kernels.moe_mlp import kernels, xla_cpu

FAST_BACKENDS = [backend for backend in BACKENDS if backend != "reference"]
BFLOAT16_BACKENDS = [backend for backend in BACKENDS if backend != "cpu_native"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """T, K, E, D, F of a case."""

    tokens: int = 32
    choices: int = 2
    experts: int = 5
    width: int = 6
    hidden: int = 4


SMALL = Sizes()


def arrays(sizes: Sizes = SMALL, dtype="float32"):
    """x, gate, w_gate_up, w_down, cotangent of y."""
    keys = jax.random.split(jax.random.key(2), 5)
    t, k, e, d, f = dataclasses.astuple(sizes)
    return (
        jax.random.normal(keys[0], (t, d), dtype),
        jax.random.uniform(keys[1], (t, k)),
        jax.random.normal(keys[2], (e, d, 2 * f), dtype) * 0.5,
        jax.random.normal(keys[3], (e, f, d), dtype) * 0.5,
        jax.random.normal(keys[4], (t, d), dtype),
    )


def indices(sizes: Sizes = SMALL, lowest=0, highest=None):
    highest = sizes.experts - 1 if highest is None else highest
    return hnp.arrays(np.int32, (sizes.tokens, sizes.choices), elements=st.integers(lowest, highest))


def by_token(x, expert_index, gate, w_gate_up, w_down):
    """The formula, with a copy of the expert's weights for every assignment; indices outside [0, E) count nothing."""
    num_experts, hidden, _ = w_down.shape
    inside = (expert_index >= 0) & (expert_index < num_experts)
    expert = jnp.clip(expert_index, 0, num_experts - 1)
    projected = jnp.einsum("td,tkdf->tkf", x, w_gate_up[expert])
    activation = jax.nn.silu(projected[..., :hidden]) * projected[..., hidden:]
    outputs = jnp.einsum("tkf,tkfd->tkd", activation, w_down[expert])
    return jnp.sum(jnp.where(inside, gate, 0)[..., None] * outputs, axis=1)


def pulled(function, x, expert_index, gate, w_gate_up, w_down, cotangent):
    """y, and the gradients of x, gate, w_gate_up and w_down."""
    y, pull = jax.vjp(lambda x, g, u, d: function(x, expert_index, g, u, d), x, gate, w_gate_up, w_down)
    return y, *pull(cotangent)


@functools.cache
def compiled(backend, capacity=None):
    def function(expert_index, mask, arguments):
        x, gate, w_gate_up, w_down, cotangent = arguments

        def call(x, index, gate, w_gate_up, w_down):
            return moe_mlp(x, index, gate, w_gate_up, w_down, mask=mask, capacity=capacity, backend=backend)

        return pulled(call, x, expert_index, gate, w_gate_up, w_down, cotangent)

    return jax.jit(function)


@jax.jit
def formula(expert_index, arguments):
    x, gate, w_gate_up, w_down, cotangent = (array.astype(jnp.float32) for array in arguments)
    return pulled(by_token, x, expert_index, gate, w_gate_up, w_down, cotangent)


@functools.cache
def usual_sizes():
    """Largest entries of the outputs when every token is routed.

    What the error of one that is nearly zero by cancellation must be measured against.
    """
    expert_index = np.random.default_rng(6).integers(0, SMALL.experts, (SMALL.tokens, SMALL.choices))
    return [float(np.abs(array).max()) for array in formula(expert_index, arrays())]


def assert_close(actual, expected, tolerance=1e-5, sizes=None):
    """Largest error within `tolerance` of the largest expected entry, or of `sizes`, entry by entry of the lists."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        size = np.abs(e).max(initial=1e-30) if sizes is None else sizes[i]
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50)
@given(expert_index=indices(lowest=-1, highest=SMALL.experts), mask=hnp.arrays(bool, SMALL.tokens))
def test_backends_equal_the_formula_in_float32(backend, expert_index, mask):
    """Values and all gradients; duplicates, masked tokens and indices of no expert among them."""
    actual = compiled(backend)(expert_index, mask, arrays())
    routed = np.where(mask[:, None], expert_index, -1)
    assert_close(actual, formula(routed, arrays()), sizes=usual_sizes())
    unrouted = (routed < 0) | (routed >= SMALL.experts)
    np.testing.assert_array_equal(np.asarray(actual[2])[unrouted], 0)
    np.testing.assert_array_equal(np.asarray(actual[0])[unrouted.all(axis=1)], 0)
    np.testing.assert_array_equal(np.asarray(actual[1])[unrouted.all(axis=1)], 0)


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS)
@settings(max_examples=20)
@given(expert_index=indices())
def test_backends_equal_the_formula_in_bfloat16(backend, expert_index):
    arguments = arrays(dtype="bfloat16")
    actual = compiled(backend)(expert_index, None, arguments)
    assert [array.dtype.name for array in actual] == ["bfloat16"] * 2 + ["float32"] + ["bfloat16"] * 2
    assert_close(actual, formula(expert_index, arguments), 2e-2, sizes=usual_sizes())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(tokens=1),
        Sizes(tokens=1, choices=1, experts=1),
        Sizes(tokens=9, choices=4, experts=4),
        Sizes(tokens=6, choices=1, experts=16),
        Sizes(tokens=90, choices=2, experts=17),
    ],
    ids=["one_token", "all_one", "all_experts", "fewer_rows_than_experts", "many_experts"],
)
def test_other_sizes(backend, sizes):
    rng = np.random.default_rng(0)
    distinct = np.stack([rng.permutation(sizes.experts)[: sizes.choices] for _ in range(sizes.tokens)])
    hot = np.full((sizes.tokens, sizes.choices), sizes.experts - 1)
    for expert_index in (distinct.astype(np.int32), hot.astype(np.int32)):
        arguments = arrays(sizes)
        assert_close(compiled(backend)(expert_index, None, arguments), formula(expert_index, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("choices", range(1, SMALL.experts + 1))
def test_every_number_of_experts_per_token(backend, choices):
    """From one to all; half of the tokens masked."""
    sizes = Sizes(tokens=20, choices=choices)
    rng = np.random.default_rng(0)
    expert_index = np.stack([rng.permutation(sizes.experts)[:choices] for _ in range(20)]).astype(np.int32)
    mask = np.arange(20) % 2 == 0
    arguments = arrays(sizes)
    expected = formula(np.where(mask[:, None], expert_index, -1), arguments)
    assert_close(compiled(backend)(expert_index, mask, arguments), expected)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_hot_expert_beside_cold_ones(backend):
    """Nine tenths of the tokens choose expert 3: far beyond any window, nothing is dropped."""
    sizes = Sizes(tokens=300, experts=9)
    rng = np.random.default_rng(1)
    expert_index = np.where(rng.random((300, 1)) < 0.9, [3, 4], rng.integers(0, 9, (300, 2))).astype(np.int32)
    arguments = arrays(sizes)
    assert_close(compiled(backend)(expert_index, None, arguments), formula(expert_index, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(expert_index=indices())
def test_capacity_drops_later_tokens(backend, expert_index):
    capacity = 7
    rank = np.zeros(SMALL.experts, int)
    kept = np.full(expert_index.shape, -1)
    for place, expert in np.ndenumerate(expert_index):
        if rank[expert] < capacity:
            kept[place] = expert
        rank[expert] += 1
    actual = compiled(backend, capacity)(expert_index, None, arrays())
    assert_close(actual, formula(kept, arrays()), sizes=usual_sizes())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_token(backend):
    x, *rest = arrays()
    expert_index = np.random.default_rng(3).integers(0, 4, (SMALL.tokens, 2)).astype(np.int32)
    expert_index[5] = 4
    y, x_gradient, gate_gradient, w_gate_up_gradient, w_down_gradient = compiled(backend)(
        expert_index, None, (x.at[5].set(jnp.nan), *rest)
    )
    others = np.arange(SMALL.tokens) != 5
    assert np.isnan(y[5]).all()
    for array in (y, x_gradient, gate_gradient):
        assert np.isfinite(np.asarray(array)[others]).all()
    assert np.isfinite(w_gate_up_gradient[:4]).all()
    assert np.isfinite(w_down_gradient[:4]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_masked_token_reaches_nothing(backend):
    x, *rest = arrays()
    expert_index = np.random.default_rng(3).integers(0, 5, (SMALL.tokens, 2)).astype(np.int32)
    mask = np.arange(SMALL.tokens) != 5
    clean = compiled(backend)(expert_index, mask, (x, *rest))
    poisoned = compiled(backend)(expert_index, mask, (x.at[5].set(jnp.nan), *rest))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_it_is_its_four_operations_one_after_the_other(backend):
    x, gate, w_gate_up, w_down, _ = arrays()
    expert_index = np.random.default_rng(4).integers(0, 5, (SMALL.tokens, 2)).astype(np.int32)
    plan = make_plan(expert_index, SMALL.experts)

    @jax.jit
    def one_after_the_other(plan):
        hidden = grouped_matmul(dispatch(x, plan), w_gate_up, plan.group_sizes, backend=backend)
        gated, up = jnp.split(hidden, 2, axis=1)
        rows = grouped_matmul(jax.nn.silu(gated) * up, w_down, plan.group_sizes, backend=backend)
        return combine(rows, plan, gate)

    @jax.jit
    def at_once(plan):
        return moe_mlp(x, expert_index, gate, w_gate_up, w_down, plan=plan, backend=backend)

    assert_close([one_after_the_other(plan)], [at_once(plan)])
    np.testing.assert_array_equal(at_once(plan), compiled(backend)(expert_index, None, arrays())[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    gradients = compiled(backend)(np.zeros((0, 2), np.int32), None, arrays(Sizes(tokens=0)))
    assert [array.shape for array in gradients] == [(0, 6), (0, 6), (0, 2), (5, 6, 8), (5, 4, 6)]
    assert all((np.asarray(array) == 0).all() for array in gradients)


def test_checkpointed_and_scanned_over_layers():
    """Residuals survive rematerialization and a scan over stacked weights."""
    x, gate, w_gate_up, w_down, cotangent = arrays()
    expert_index = np.random.default_rng(5).integers(0, 5, (SMALL.tokens, 2)).astype(np.int32)
    weights = jnp.stack([w_gate_up, 0.5 * w_gate_up]), jnp.stack([w_down, -w_down])

    def loss(mlp, x, weights):
        layer = jax.checkpoint(lambda x, layer: (x + mlp(x, expert_index, gate, *layer), None))
        return jnp.vdot(jax.lax.scan(layer, x, weights)[0], cotangent)

    def gradients(mlp):
        return jax.tree.leaves(jax.jit(jax.value_and_grad(functools.partial(loss, mlp), (0, 1)))(x, weights))

    assert_close(gradients(functools.partial(moe_mlp, backend="cpu")), gradients(by_token))


# ------------------------------------------------------------------------------------------ compiled program

LARGE = Sizes(tokens=512, choices=2, experts=16, width=64, hidden=96)


@functools.cache
def lowered(backend):
    expert_index = jax.ShapeDtypeStruct((LARGE.tokens, LARGE.choices), jnp.int32)
    mask = jax.ShapeDtypeStruct((LARGE.tokens,), bool)
    return compiled(backend, capacity=64).lower(expert_index, mask, jax.eval_shape(lambda: arrays(LARGE)))


@functools.cache
def program(backend):
    return lowered(backend).compile()


def flops_of(rows):
    """Matmuls of so many rows, forward and backward: three matrices of D·F, each three times."""
    return 2 * rows * 3 * LARGE.width * LARGE.hidden * 3


def test_cpu_program_has_no_scatter():
    """Plan, forward and backward. The definition's gradient has one, so the test would see it."""
    assert "stablehlo.scatter" not in lowered("cpu").as_text()
    assert "stablehlo.scatter" in lowered("reference").as_text()
    assert " scatter(" not in program("cpu").as_text()


def test_cpu_program_moves_no_weights():
    """No transposed, copied or converted array of a weight's size."""
    matrices = (LARGE.width, 2 * LARGE.hidden), (LARGE.hidden, LARGE.width)
    shapes = {(LARGE.experts, *axes) for a, b in matrices for axes in ((a, b), (b, a))}
    moves = re.findall(r"\w+\[([\d,]+)\]\S* (?:copy|transpose|convert)\(", program("cpu").as_text())
    assert moves
    assert not shapes & {tuple(map(int, shape.split(","))) for shape in moves}


@pytest.mark.parametrize("recompute", [False, True])
def test_cpu_program_has_no_copy_of_bfloat16_weights_in_float32(recompute):
    """XLA:CPU multiplies bfloat16 in float32; the weights of some experts at a time are converted, never all."""
    case = cases.layer_case(cases.Shape(1024, 2, 16, 64, 96), jnp.bfloat16, Target("cpu"), recompute=recompute)
    program = jax.jit(case.function).lower(*case.arguments.values()).compile().as_text()
    assert "bf16[16,64,192]" in program
    assert "bf16[16,96,64]" in program
    assert not re.search(r" f32\[16,(64,192|192,64|96,64|64,96)\]\S* convert\(", program)


@pytest.mark.parametrize("rows", [3, expert_products.FEW_ROWS, expert_products.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_with_transposed_weights(rows, dtype):
    """In both forms, and with the weights as bits."""
    left, weights = (jax.random.normal(jax.random.key(i), (2, n, 5), dtype) for i, n in enumerate((rows, 7)))
    expected = np.einsum("ecd,efd->ecf", *(np.asarray(array, np.float64) for array in (left, weights)))
    product = jax.jit(lambda left, weights: expert_products.product_transposed(left, expert_products.bits(weights)))
    np.testing.assert_allclose(product(left, weights), expected, rtol=1e-5, atol=1e-5)


def test_cpu_program_is_no_dense_expansion():
    """The rows that there are, the empty rows of the windows, and one turn of each overflow loop, which XLA counts
    once: its hidden layer is computed again in the backward pass."""
    rows = LARGE.tokens * LARGE.choices
    tiling = windows.tiling_for(rows, LARGE.experts, 3 * LARGE.width * LARGE.hidden)
    padded = tiling.window * LARGE.experts + 4 / 3 * tiling.batch * tiling.block
    assert flops_of(rows) <= program("cpu").cost_analysis()["flops"] <= 1.15 * flops_of(rows) + flops_of(padded - rows)
    assert program("reference").cost_analysis()["flops"] >= 0.99 * LARGE.experts * flops_of(rows)


@pytest.mark.parametrize("experts", [6, 11])
@pytest.mark.parametrize("keep", ["hidden", "inputs"])
def test_cpu_in_parts_equals_all_at_once(keep, experts, monkeypatch):
    """Windows taken part by part, with the hidden layer kept or computed again; 11 are no whole number of parts."""
    monkeypatch.setattr(xla_cpu, "_MANY_NUMBERS", 0)
    sizes = Sizes(tokens=64, choices=2, experts=experts, width=4, hidden=2)
    expert_index = np.random.default_rng(7).integers(0, experts, (64, 2)).astype(np.int32)
    x, gate, w_gate_up, w_down, cotangent = arrays(sizes)

    @jax.jit
    def in_parts(x, gate, w_gate_up, w_down):
        mlp = functools.partial(moe_mlp, recompute=keep == "inputs", backend="cpu")
        return pulled(mlp, x, expert_index, gate, w_gate_up, w_down, cotangent)

    lowered = in_parts.lower(x, gate, w_gate_up, w_down).as_text()
    assert lowered.count("stablehlo.while") > 4  # windows forward and backward, beside the plan's and the overflow's
    assert_close(in_parts(x, gate, w_gate_up, w_down), formula(expert_index, arrays(sizes)))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_recomputing_fewer_rows_than_experts(backend):
    """The windows of the CPU path hold no row then."""
    sizes = Sizes(tokens=2, choices=2, experts=6)
    expert_index = np.array([[5, 0], [5, 3]], np.int32)

    @jax.jit
    def recomputed(x, gate, w_gate_up, w_down, cotangent):
        mlp = functools.partial(moe_mlp, recompute=True, backend=backend)
        return pulled(mlp, x, expert_index, gate, w_gate_up, w_down, cotangent)

    assert_close(recomputed(*arrays(sizes)), formula(expert_index, arrays(sizes)))


def test_gpu_recomputes_part_by_part(monkeypatch):
    """Three parts with rows and one without, groups across their borders; weight gradients add up."""
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 1)
    sizes = Sizes(tokens=192, choices=2, experts=3)
    expert_index = np.random.default_rng(8).integers(0, 3, (192, 2)).astype(np.int32)
    x, gate, w_gate_up, w_down, cotangent = arrays(sizes)

    @jax.jit
    def recomputed(x, gate, w_gate_up, w_down):
        mlp = functools.partial(moe_mlp, recompute=True, backend="gpu")
        return pulled(mlp, x, expert_index, gate, w_gate_up, w_down, cotangent)

    assert "scan" in str(jax.make_jaxpr(recomputed)(x, gate, w_gate_up, w_down))
    assert_close(recomputed(x, gate, w_gate_up, w_down), formula(expert_index, arrays(sizes)))


@pytest.mark.parametrize(
    ("tokens", "experts", "recompute", "share"),
    [
        (8192, 8, False, 1.25),
        (8192, 8, True, 0.6),
        (4096, 11, False, 1.25),
        (4096, 11, True, 0.6),
        (2048, 32, False, 1.25),
        (2048, 256, True, 0.6),  # weights eleven times the rows' arrays
    ],
)
def test_cpu_memory(tokens, experts, recompute, share):
    """Against what the layer is defined by: saved inputs and routed activations (docs/kernels.md)."""
    shape = cases.Shape(tokens, 2, experts, 256, 512)
    case = cases.layer_case(shape, jnp.float32, Target("cpu"), recompute=recompute)
    compiled = jax.jit(case.function).lower(*case.arguments.values()).compile()
    numbers = tokens * shape.width + shape.rows * (2 * shape.width + 3 * shape.hidden)
    assert compiled.memory_analysis().temp_size_in_bytes <= share * 4 * numbers


def test_cpu_program_does_not_need_memory_for_every_expert_and_row():
    def temporaries(backend):
        return program(backend).memory_analysis().temp_size_in_bytes

    assert temporaries("cpu") < temporaries("reference") / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w_gate_up=jnp.ones((5, 6, 7))), "w_gate_up has 2F=7, which is odd"),
        (dict(w_gate_up=jnp.ones((5, 9, 8))), "w_gate_up has D=9 but x has D=6"),
        (dict(w_gate_up=jnp.ones((4, 6, 8))), r"w_down has shape \(5, 4, 6\); \(E, F, D\) = \(4, 4, 6\)"),
        (dict(w_down=jnp.ones((5, 3, 6))), r"w_down has shape \(5, 3, 6\); \(E, F, D\) = \(5, 4, 6\)"),
        (dict(w_down=jnp.ones((5, 4, 6), jnp.bfloat16)), "w_down has dtype bfloat16 but x has float32"),
        (dict(gate=jnp.ones((32, 3))), r"gate has shape \(32, 3\); \(T, K\) = \(32, 2\)"),
        (dict(gate=jnp.ones((32, 2), jnp.int32)), "gate has dtype int32; choose one of float32, bfloat16"),
        (dict(x=jnp.ones((2, 16, 6))), r"x has shape \(2, 16, 6\); \(T, D\) is expected"),
        (dict(expert_index=np.zeros((31, 2), int)), "expert_index has 31 tokens but x has T=32"),
        (dict(expert_index=np.full((32, 2), 5)), r"expert_index\[0, 0\]=5 but there are num_experts=5"),
        (dict(backend="mosaic"), "backend='mosaic'; choose 'auto' or one of"),
        (dict(plan=make_plan(np.zeros((32, 2), int), 4)), r"plan is for E=4 .* the weights have E=5"),
        (dict(plan=make_plan(np.zeros((32, 2), int), 5), capacity=3), "mask and capacity go to make_plan"),
        (dict(plan=make_plan(np.zeros((32, 2), int), 5, block=8)), "plan has block=8; moe_mlp takes"),
    ],
)
def test_misfits_are_refused(change, message):
    x, gate, w_gate_up, w_down, _ = arrays()
    expert_index = np.zeros((32, 2), np.int32)
    arguments = dict(x=x, expert_index=expert_index, gate=gate, w_gate_up=w_gate_up, w_down=w_down)
    with pytest.raises(ValueError, match=message):
        moe_mlp(**{**arguments, **change})
