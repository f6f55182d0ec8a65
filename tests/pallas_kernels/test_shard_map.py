"""Inside `jax.shard_map`, with its check of what varies between devices (`check_vma`, on by default), as outside.

Two devices share the tokens; the weights, one array for both, get the sum of the gradients.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from pallas_kernels import combine, compiling_for, dispatch, grouped_matmul, interpreted, make_plan, moe_mlp, targets

T, K, E, D, F = 16, 2, 4, 128, 128
AXIS = "device"
OF_TOKENS, OF_WEIGHTS = (P(AXIS), P(AXIS), P(AXIS)), (P(), P())


def layer(x, expert_index, gate, w_gate_up, w_down, **options):
    return moe_mlp(x, expert_index, gate, w_gate_up, w_down, **options)


def operations(x, expert_index, gate, w_gate_up, w_down, **options):
    plan = make_plan(expert_index, w_gate_up.shape[0])
    hidden = grouped_matmul(dispatch(x, plan, **options), w_gate_up, plan.group_sizes, **options)
    rows = grouped_matmul(jnp.tanh(hidden[:, :F]), w_down, plan.group_sizes, **options)
    return combine(rows, plan, gate, **options)


CALLS = {
    "layer": layer,
    "recomputing": functools.partial(layer, recompute=True),
    "operations": operations,
}


def value_and_gradients(call, mesh):
    """Of a scalar of the call's outputs, the call once for all tokens, or for each device's own."""
    if mesh is not None:
        call = jax.shard_map(call, mesh=mesh, in_specs=(*OF_TOKENS, *OF_WEIGHTS), out_specs=P(AXIS), check_vma=True)

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


def on_two_devices():
    """The body of the first test, in a process with two devices.

    Pallas' interpreters do not run under the check (jax 0.10.2): kernels are traced with it, the TPU's compiled below.
    """
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = arguments()
    expected = value_and_gradients(functools.partial(layer, backend="reference"), None)(*inputs)
    for name, call in CALLS.items():
        want = expected
        if name == "operations":
            want = value_and_gradients(functools.partial(call, backend="reference"), None)(*inputs)
        for backend in ("reference", "cpu", "ragged_dot"):
            got = value_and_gradients(functools.partial(call, backend=backend), mesh)(*inputs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
        for backend in ("tpu", "gpu"):
            with interpreted():
                traced = value_and_gradients(functools.partial(call, backend=backend), mesh).trace(*inputs)
            assert traced.out_info[1][2].shape == (E, D, 2 * F)
        print(name)


def test_values_and_gradients_are_those_without_shard_map():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["layer", "recomputing"])
def test_the_tpu_compiler_takes_the_layer_on_two_devices(call):
    """One all-reduce of the weights' gradients, and no other traffic."""
    try:
        targets.mesh_of("v5e")
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    devices = topologies.get_topology_desc(targets.TPU_TOPOLOGIES["v5e"], platform="tpu").devices[:2]
    mesh = jax.sharding.Mesh(devices, (AXIS,))
    abstract = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.NamedSharding(mesh, spec))
        for array, spec in zip(jax.eval_shape(lambda: arguments(8192)), (*OF_TOKENS, *OF_WEIGHTS), strict=True)
    ]
    with compiling_for("v5e"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = value_and_gradients(CALLS[call], mesh).trace(*abstract).lower().compile().as_text()
    assert "weight_gradient_tpu" in program
    assert "all-reduce" in program
    assert "all-gather" not in program


if __name__ == "__main__":
    on_two_devices()
