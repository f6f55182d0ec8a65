"""The TPU and GPU compilers take the attention kernels, over meshes too, and no program holds scores.

They compile for chips that are not there; interpreters accept kernels that they refuse.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxmoe.config import MESH_AXES
from jaxmoe.layers.self_attention import self_attention
from jaxmoe.sharding import Partitioning, use_partitioning
from pallas_kernels import compiling_for, targets
from pallas_kernels.gpu_resources import resources

pytestmark = pytest.mark.usefixtures("optimized")

EIGHT = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
KERNELS = [
    "splash_mha_dkv_segmented_no_residuals",
    "splash_mha_dq_segmented_no_residuals",
    "splash_mha_fwd_segmented_residuals",
]


def gradients(name, query, key, value, groups, direction):
    """Output, and the gradients of query, key and value."""
    output, pull = jax.vjp(lambda *x: self_attention(*x, groups, attention=name), query, key, value)
    return output, *pull(direction)


@functools.cache
def compiled_for_tpu(chip, length, *, attention="auto", batch=1, heads=(2, 2), head_dim=128, dtype="bfloat16", **sizes):
    """Forward and backward over a mesh of a chip's devices."""
    try:
        targets.mesh_of(chip)
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = topologies.get_topology_desc(EIGHT[chip], platform="tpu").devices[: math.prod(shape)]
    spread = Partitioning(jax.sharding.Mesh(np.array(devices).reshape(shape), MESH_AXES))

    def argument(axes, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spread.sharding(axes, shape))

    query = argument(("batch", "heads", None, "sequence", None), (batch, *heads, length, head_dim), dtype)
    key = argument(("batch", "heads", "sequence", None), (batch, heads[0], length, head_dim), dtype)
    groups = argument(("batch", "sequence"), (batch, length), jnp.int32)
    with compiling_for(chip), jax.sharding.use_abstract_mesh(spread.mesh.abstract_mesh), use_partitioning(spread):
        return jax.jit(functools.partial(gradients, attention)).lower(query, key, key, groups, query).compile()


def most_numbers(program):
    """Of an array of a compiled program, on one device."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def kernels_of(program):
    return sorted(re.findall(r"%(splash_mha_\w+?)(?:\.\d+)? = .* custom-call\(", program))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "length", "settings"),
    [
        ("v5e", 4096, {"head_dim": 64}),
        ("v5e", 4096, {"head_dim": 256, "dtype": "float32"}),
        ("v5p", 4096, {"data": 2, "context": 2, "tensor": 2, "batch": 2}),
        ("v6e", 4096, {"head_dim": 80, "dtype": "float32"}),
        ("v5p", 32768, {"context": 8, "heads": (8, 2)}),
        ("v6e", 32768, {"context": 8, "heads": (8, 2)}),
    ],
)
def test_splash_compiles_and_no_array_holds_scores(chip, length, settings):
    """Three kernels: what is kept of the first is not computed again."""
    program = compiled_for_tpu(chip, length, **settings).as_text()
    assert kernels_of(program) == KERNELS
    assert most_numbers(program) < length * length // settings.get("context", 1) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "share"), [("splash", 2.5), ("xla", 4.0)])
def test_a_long_sequence_over_devices_holds_keys_and_values_of_one_layer(attention, share):
    """What docs/attention.md says: keys, values and their gradients are whole for a while, the rest is in parts."""
    rows, heads, length, width = 2, 8, 32768, 128
    compiled = compiled_for_tpu("v5e", length, batch=rows, heads=(heads, 2), attention=attention, context=8)
    keys_and_values = 2 * 2 * rows * heads * length * width
    assert compiled.memory_analysis().temp_size_in_bytes <= share * keys_and_values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype"),
    [("h100", 64, "bfloat16"), ("h100", 128, "bfloat16"), ("h100", 96, "float32"), ("b200", 64, "bfloat16")],
)
def test_triton_compiles_spills_nothing_and_holds_no_scores(chip, head_dim, dtype):
    try:
        mesh = targets.mesh_of(chip)
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    length = 4096
    query = targets.abstract(mesh, (1, 2, 2, length, head_dim), dtype)
    key = targets.abstract(mesh, (1, 2, length, head_dim), dtype)
    groups = targets.abstract(mesh, (1, length), jnp.int32)
    with compiling_for(chip), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(functools.partial(gradients, "auto")).lower(query, key, key, groups, query)
    compiled, kernels = resources(lowered, names=r"mha_[a-z_]+")
    assert sorted(kernel.kernel for kernel in kernels) == ["mha_backward", "mha_forward", "mha_preprocess_backward"]
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.shared_bytes <= 227 * 1024, kernel
    assert most_numbers(compiled.as_text()) < length * length


def test_cudnn_is_asked_for_causal_attention_without_a_mask(monkeypatch):
    """As far as it goes without cuDNN: the call that XLA would hand to it."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    try:
        mesh = targets.mesh_of("h100")
    except targets.CompilerMissing as error:
        pytest.skip(str(error))
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    query = targets.abstract(mesh, (1, 2, 2, 256, 64), jnp.bfloat16)
    key = targets.abstract(mesh, (1, 2, 256, 64), jnp.bfloat16)
    with compiling_for("h100"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(functools.partial(gradients, "auto")).lower(query, key, key, None, query).as_text()
    assert re.findall(r"__cudnn\$fmha\w+", lowered) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert lowered.count("CAUSAL") == 2
    assert "256x256" not in lowered
