"""Inside `jax.shard_map`, with its check of what varies between devices (`check_vma`, on by default), as outside.

Run by `test_shard_map.py` in a process with two devices, which share the tokens; the weights, one array for both, get
the sum of the gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from pallas_kernels import combine, compiling_for, dispatch, grouped_matmul, interpreted, make_plan, moe_mlp, targets

T, K, E, D, F = 16, 2, 4, 128, 128
AXIS = "device"
SPECS = P(AXIS), P(AXIS), P(AXIS), P(), P()


def layer(x, expert_index, gate, w_gate_up, w_down, **options):
    return moe_mlp(x, expert_index, gate, w_gate_up, w_down, **options)


def operations(x, expert_index, gate, w_gate_up, w_down, **options):
    plan = make_plan(expert_index, w_gate_up.shape[0])
    hidden = grouped_matmul(dispatch(x, plan, **options), w_gate_up, plan.group_sizes, **options)
    rows = grouped_matmul(jnp.tanh(hidden[:, :F]), w_down, plan.group_sizes, **options)
    unweighted = combine(rows, plan, None, **options)
    return combine(rows, plan, gate, **options) + unweighted


CALLS = {
    "layer": layer,
    "recomputing": functools.partial(layer, recompute=True),
    "operations": operations,
}


def value_and_gradients(call, mesh):
    """Of a scalar of the call's outputs, the call once for all tokens, or for each device's own."""
    if mesh is not None:
        call = jax.shard_map(call, mesh=mesh, in_specs=SPECS, out_specs=P(AXIS), check_vma=True)

    def scalar(x, expert_index, gate, w_gate_up, w_down):
        return jnp.sum(jnp.sin(call(x, expert_index, gate, w_gate_up, w_down)))

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 2, 3, 4)))


def arguments(tokens=T):
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (tokens, D)),
        jax.random.randint(keys[1], (tokens, K), 0, E, jnp.int32),
        jax.random.uniform(keys[2], (tokens, K)),
        0.1 * jax.random.normal(keys[3], (E, D, 2 * F)),
        0.1 * jax.random.normal(keys[4], (E, F, D)),
    )


@functools.cache
def expected(call):
    """By the definitions, all tokens at once."""
    call = operations if call == "operations" else layer
    return value_and_gradients(functools.partial(call, backend="reference"), None)(*arguments())


def mesh():
    return jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu_native", "ragged_dot"])
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_those_without_shard_map(call, backend):
    got = value_and_gradients(functools.partial(CALLS[call], backend=backend), mesh())(*arguments())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected(call))


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("call", CALLS)
def test_kernels_are_traced(call, backend):
    """Pallas' interpreters do not run under the check (jax 0.10.2); the TPU's compiler does."""
    with interpreted():
        traced = value_and_gradients(functools.partial(CALLS[call], backend=backend), mesh()).trace(*arguments())
    assert traced.out_info[1][2].shape == (E, D, 2 * F)


@pytest.mark.parametrize("call", ["layer", "recomputing"])
def test_the_tpu_compiler_takes_the_layer_on_two_devices(call):
    """One all-reduce of the weights' gradients, and no other traffic."""
    try:
        targets.mesh_of("v5e")
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    devices = topologies.get_topology_desc(targets.TPU_TOPOLOGIES["v5e"], platform="tpu").devices[:2]
    of_chips = jax.sharding.Mesh(devices, (AXIS,))
    abstract = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.NamedSharding(of_chips, spec))
        for array, spec in zip(jax.eval_shape(lambda: arguments(8192)), SPECS, strict=True)
    ]
    with compiling_for("v5e"), jax.sharding.use_abstract_mesh(of_chips.abstract_mesh):
        program = value_and_gradients(CALLS[call], of_chips).trace(*abstract).lower().compile().as_text()
    assert "weight_gradient_tpu" in program
    assert "all-reduce" in program
    assert "all-gather" not in program
