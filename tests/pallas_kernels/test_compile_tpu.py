"""The TPU compiler takes the kernels, and what it makes of the whole layer holds no wasted work and memory.

libtpu compiles for chips that are not there; interpreters accept kernels that it refuses.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cases, compile_all, compiler_options, compiling_for, moe_mlp, mosaic, targets
from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul.mosaic_tpu import row_tile

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {
    "study": cases.Shape(4096, 2, 64, 1024, 2048),
    "fine_grained": cases.Shape(4096, 8, 256, 2048, 128),
    "odd": cases.Shape(1000, 3, 8, 200, 136),
    "two_tokens": cases.Shape(2, 1, 4, 128, 128),
    "few_experts": cases.Shape(16384, 2, 8, 1024, 2048),  # the weights' gradients lend little room to what is temporary
    "many_experts": cases.Shape(2048, 2, 128, 1024, 2048),
}


@functools.cache
def compiled_layer(chip, shape, dtype="bfloat16", recompute=False):
    """Forward and backward of `moe_mlp` for a chip."""
    case = cases.layer_case(SHAPES[shape], jnp.dtype(dtype), Target("tpu", chip=chip), recompute=recompute)
    try:
        return compile_all.lowered(case, chip).compile()
    except targets.CompilerMissing as error:
        pytest.skip(str(error))


def holds_at_most(share, compiled, shape):
    """Temporary memory against saved inputs and routed activations, the formula of docs/kernels.md."""
    tokens, k, _, width, hidden = SHAPES[shape]
    activations = 2 * (tokens * width + tokens * k * (2 * width + 3 * hidden))
    return compiled.memory_analysis().temp_size_in_bytes <= share * activations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "shape", "dtype", "recompute"),
    [
        ("v4", "fine_grained", "bfloat16", False),
        ("v4", "study", "float32", True),
        ("v5e", "study", "float32", True),
        ("v5e", "two_tokens", "bfloat16", False),
        ("v5p", "odd", "float32", False),
        ("v6e", "odd", "bfloat16", True),
        ("tpu7x", "fine_grained", "float32", False),
    ],
)
def test_the_layer_compiles_forward_and_backward(chip, shape, dtype, recompute):
    used = compile_all.vmem_of_kernels(compiled_layer(chip, shape, dtype, recompute).as_text())
    assert {"dispatch_tpu", "grouped_matmul_tpu", "weight_gradient_tpu", "combine_tpu"} <= set(used)
    assert all(0 < size <= mosaic.vmem_limit(chip) for size in used.values())


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("shape", ["study", "fine_grained", "few_experts"])
def test_the_compiled_layer_wastes_nothing(chip, shape):
    """No scatter, no transposed or float32 copy of a weight, FLOPs and memory of the rows that there are."""
    tokens, k, experts, width, hidden = SHAPES[shape]
    compiled = compiled_layer(chip, shape)
    program = compiled.as_text()
    assert holds_at_most(1.25, compiled, shape)
    assert not re.search(r"= \S+ scatter\(", program)
    for a, b in ((width, 2 * hidden), (hidden, width)):
        assert f"f32[{experts},{a},{b}]" not in program
        for axes in (f"{experts},{a},{b}", f"{experts},{b},{a}"):
            assert not re.search(rf"bf16\[{axes}\]\S* (copy|transpose)\(", program)
    executed = compiled.cost_analysis()["flops"]
    products = 3 * 3 * 2 * width * hidden  # of one row: up twice as wide as down, forward, and two backward
    active, padding = tokens * k * products, experts * row_tile(tokens * k // experts, weights_stay=False) * products
    assert active <= executed <= 1.15 * active + padding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "shape"), [*((chip, "few_experts") for chip in ("v5e", "v5p", "v6e", "tpu7x")), ("v6e", "many_experts")]
)
def test_the_layer_holds_its_routed_activations_and_little_more(chip, shape):
    for recompute, share in ((False, 1.25), (True, 0.6)):
        assert holds_at_most(share, compiled_layer(chip, shape, recompute=recompute), shape)


@pytest.mark.slow
def test_a_loops_kernels_count_as_often_as_it_turns():
    """The layer that computes the up products again executes them, not a part of them."""
    shape = SHAPES["few_experts"]
    target = Target("tpu", chip="v5p")
    try:
        kept, again = (
            compile_all.planned(compile_all.traced(case, "v5p").jaxpr.jaxpr)[0]
            for case in cases.layer_cases(shape, jnp.bfloat16, target)
        )
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    up = 2 * shape.rows * shape.width * 2 * shape.hidden
    assert kept + up <= again <= 1.5 * (kept + up)


@pytest.mark.slow
def test_recomputing_copies_no_weights():
    """The gradients of the weights are added to in place, part after part of the rows."""
    _, _, experts, width, hidden = SHAPES["study"]
    program = compiled_layer("v5p", "study", recompute=True).as_text()
    for axes in (f"{experts},{width},{2 * hidden}", f"{experts},{hidden},{width}"):
        assert not re.search(rf"\[{axes}\]\S* (copy|transpose)\(", program)


@pytest.mark.slow
def test_layers_under_scan_compile_with_the_options_that_they_need():
    """XLA writes what the up product keeps into the stack of all layers, and gives that its own limit of VMEM."""
    tokens, k, experts, width, hidden = 8192, 2, 8, 1024, 2048
    try:
        mesh = targets.mesh_of("v5p")
    except targets.CompilerMissing as error:
        pytest.skip(str(error))

    def loss(weights, x, index, gate):
        def layer(x, weights):
            return x + moe_mlp(x, index, gate, *weights), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0], dtype=jnp.float32)

    array = functools.partial(targets.abstract, mesh)
    weights = (
        array((2, experts, width, 2 * hidden), jnp.bfloat16),
        array((2, experts, hidden, width), jnp.bfloat16),
    )
    others = array((tokens, width), jnp.bfloat16), array((tokens, k), jnp.int32), array((tokens, k), jnp.float32)
    with compiling_for("v5p"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        options = compiler_options()
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options).lower(weights, *others)
    assert options == {"xla_tpu_scoped_vmem_limit_kib": str(64 * 1024)}
    used = compile_all.vmem_of_kernels(gradients.compile().as_text())
    assert max(used.values()) > 16 * 2**20  # XLA's own limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [("v5e", "bfloat16"), ("v5p", "bfloat16"), ("v6e", "bfloat16"), ("tpu7x", "bfloat16"), ("v5e", "float32"),
     ("v6e", "float32")],
)  # fmt: skip
def test_each_kernel_compiles_alone_within_its_memory(chip, dtype):
    """And says what it takes of it, and of FLOPs and bytes."""
    for shape in (SHAPES["odd"], SHAPES["fine_grained"]):
        for case in cases.kernel_cases(shape, jnp.dtype(dtype), Target("tpu", chip=chip)):
            try:
                result = compile_all.result_of(case, shape, dtype, chip)
            except targets.CompilerMissing as error:
                pytest.skip(str(error))
            assert result.error is None, result
            assert 0 < result.fast_memory_bytes <= 64 * 2**20
            assert result.executed_flops >= result.active_flops
            if shape is SHAPES["fine_grained"]:  # all of it in kernels
                assert result.bytes_accessed > 0.9 * result.least_bytes


def test_arrays_that_xla_holds_in_vmem_are_no_kernels():
    """Then a kernel's memory begins behind them."""
    line = (
        '%moe_up_tpu.3 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={'
        '"scoped_memory_configs":[{"memory_space":"1","offset":"OFFSET","size":"64"}],'
        '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"48"}]}\n'
    )
    assert compile_all.vmem_of_kernels(line.replace("OFFSET", "0")) == {"moe_up_tpu": 48}
    assert compile_all.vmem_of_kernels(line.replace("OFFSET", "16")) == {"moe_up_tpu": 32}


def test_the_most_that_each_kernel_takes():
    """Of all calls of one chip and dtype; what is not known is less than all that is."""
    calls = (
        ("h100", {"a_gpu": (1024, 40), "b_gpu": (None, 154)}),
        ("h100", {"a_gpu": (512, 48)}),
        ("v5e", {"a_tpu": (2048, None)}),
    )
    every = [compile_all.Result(chip, "call", (1,), "bfloat16", kernels=kernels) for chip, kernels in calls]
    assert compile_all.largest(every).splitlines() == [
        "| kernel | h100, bfloat16 | v5e, bfloat16 |",
        "| --- | --- | --- |",
        "| `a_gpu` | 48 · 1 KiB |  |",
        "| `b_gpu` | 154 · not said |  |",
        "| `a_tpu` |  | 2 KiB |",
    ]


@pytest.mark.slow
def test_the_command_says_what_was_refused(monkeypatch, capsys):
    shape = "1000,3,8,200,136"
    kernel_cases = cases.kernel_cases

    def one_that_is_refused(shape, dtype, target):
        def refused(x):
            raise NotImplementedError("no such layout")

        x = {"x": jax.ShapeDtypeStruct((8, 128), dtype)}
        return [kernel_cases(shape, dtype, target)[0], cases.Case("hopeless", refused, x, 0)]

    monkeypatch.setattr(cases, "kernel_cases", one_that_is_refused)
    monkeypatch.setattr(cases, "layer_cases", lambda *_: [])
    status = compile_all.main(["--chip=v5e", "--dtype=float32", f"--shape={shape}"])
    output, error = capsys.readouterr()
    if status == 2:
        pytest.skip(error)
    assert status == 1
    assert "dispatch" in output
    assert "hopeless" in output
    assert "1 of 2 compiled" in error
    assert "REFUSED NotImplementedError: no such layout" in error


@pytest.mark.parametrize(("gigabytes", "large"), [("0.001", True), ("15.75", False)])
def test_what_no_device_holds_is_no_refusal(gigabytes, large, monkeypatch, capsys):
    """Arguments and results of 2 MB, and a compiler that runs out of memory."""

    class Traced:
        out_info = jax.ShapeDtypeStruct((512, 512), jnp.float32)

        def lower(self):
            raise RuntimeError(f"RESOURCE_EXHAUSTED: Ran out; (9G) exceeds available HBM ({gigabytes}G).")

    class SomeMesh:
        abstract_mesh = jax.sharding.AbstractMesh((1,), ("device",))

    case = cases.Case("layer", lambda x: x, {"x": Traced.out_info}, 0)
    monkeypatch.setattr(cases, "kernel_cases", lambda *_: [case])
    monkeypatch.setattr(cases, "layer_cases", lambda *_: [])
    monkeypatch.setattr(targets, "mesh_of", lambda chip: SomeMesh)
    monkeypatch.setattr(compile_all, "traced", lambda *_: Traced())
    assert compile_all.main(["--chip=v5e", "--dtype=float32", "--sample"]) == (0 if large else 1)
    output, error = capsys.readouterr()
    assert ("too large for one device: RuntimeError: RESOURCE_EXHAUSTED" in output) == large
    assert ("REFUSED" in error) != large


def test_the_command_says_what_to_install_where_a_compiler_is_missing(monkeypatch, capsys):
    def missing(chip):
        raise targets.CompilerMissing(f"no compiler for {chip}; pip install 'jaxmoe[compile]' brings it.")

    monkeypatch.setattr(targets, "mesh_of", missing)
    assert compile_all.main(["--chip=v5e", "--json"]) == 2
    output, error = capsys.readouterr()
    assert '"results": []' in output
    assert "pip install 'jaxmoe[compile]'" in error
