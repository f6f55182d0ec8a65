"""What a program does: operations of a traced one, loops counted, and exchanges of a compiled one."""

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.layers.flash_attention import splash_attention, triton_attention
from jaxmoe.scaling.program import Exchange, count_operations, exchanges
from pallas_kernels import execution


def operations(function, *arguments):
    return count_operations(jax.jit(function).trace(*arguments).jaxpr)


def test_products_count_two_operations_a_multiply_add():
    x, w = jnp.ones((3, 5, 7)), jnp.ones((7, 11))
    assert operations(lambda x, w: x @ w, x, w).total == 2 * 3 * 5 * 7 * 11
    assert operations(lambda x: jnp.einsum("bik,bjk->bij", x, x), x).total == 2 * 3 * 5 * 5 * 7


def test_loops_count_their_trips_and_gradients_their_products():
    w = jnp.ones((4, 8, 8))

    def model(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0].sum()

    forward = 4 * 2 * 6 * 8 * 8
    x = jnp.ones((6, 8))
    assert operations(model, x, w).total == forward
    assert operations(jax.grad(model, argnums=(0, 1)), x, w).total == 3 * forward

    def recomputed(x, w):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w) @ w, None)), x, w)[0].sum()

    # Of two products forward, the first is done again; each has two gradients.
    assert operations(jax.grad(recomputed, argnums=(0, 1)), x, w).total == pytest.approx(3.5 * 2 * forward)


def test_a_loop_of_unknown_length_is_told():
    w = jnp.ones((8, 8))
    found = operations(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x), w)
    assert (found.total, found.unknown_loops) == (2 * 8**3, 1)


def test_the_dearer_branch_counts():
    x = jnp.ones((8, 8))
    found = operations(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ (x @ x), x), x)
    assert found.total == 2 * 2 * 8**3


def test_a_program_of_one_device_counts_for_each():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spec = jax.P("data", None)
    spread = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec, check_vma=False)
    arguments = jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        assert count_operations(jax.make_jaxpr(spread)(*arguments)).total == 2 * 8 * 3 * 5


@pytest.mark.parametrize(
    ("chip", "attention", "block", "batch"),
    [("v5p", splash_attention, 512, 3), ("v5p", splash_attention, 512, 1), ("h100", triton_attention, 128, 1)],
)
def test_attention_kernels_count_the_blocks_that_a_causal_mask_leaves(chip, attention, block, batch):
    """Two products forward and, since both backward kernels need the scores, seven backward."""
    query, key = jnp.ones((batch, 2, 2, 1024, 128), jnp.bfloat16), jnp.ones((batch, 2, 1024, 128), jnp.bfloat16)
    groups = jnp.zeros((batch, 1024), jnp.int32)

    def loss(query, key, value):
        return attention(query, key, value, groups).astype(jnp.float32).sum()

    with execution.compiling_for(chip):
        forward = count_operations(jax.make_jaxpr(loss)(query, key, key))
        both = count_operations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, key, key))
    product = 2 * batch * 4 * 1024 * 1024 * 128  # of all pairs
    assert forward.total == 2 * product * (1 + block / 1024) / 2
    assert 9 * product / 2 < both.kernels <= 9 * product * (1 + block / 1024) / 2
    assert both.unknown_kernels == 0


HLO = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], f32[64])) -> (s32[], f32[64]) {
  %g = f32[256]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %k = f32[64]{0} custom-call(%g), custom_call_target="tpu", backend_config={"a": "b
}}, more of it"}
  %r = f32[64]{0} reduce-scatter(%g), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%condition (arg: (s32[], f32[64])) -> pred[] {
  %bound = s32[] constant(16)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%async (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %a = bf16[8,128]{1,0} all-to-all(%p), replica_groups=[4,2]<=[4,2]T(1,0), dimensions={0}
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %w = (s32[], f32[64]{0}) while(%init), condition=%condition, body=%body
  %s = ((bf16[8,128]), bf16[8,128]) async-start(%q), calls=%async
  %m = f32[100]{0} all-reduce(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %c = f32[25]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{3,4}}
  ROOT %o = (f32[64]{0}, f32[128]{0}) all-gather-start(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}
"""


def test_exchanges_by_kind_times_the_trips_of_their_loops():
    """Slices of four devices: groups along the first axis of 2 x 4 cross between them."""
    found = {each.kind: each for each in exchanges(HLO, [0] * 4 + [1] * 4)}
    in_loop = 16 * 3 * 64 * 4
    between = 4 * 128 // 2
    assert found["all-gather"] == Exchange("all-gather", 17, in_loop + between, between)
    assert found["reduce-scatter"] == Exchange("reduce-scatter", 16, in_loop, 0)
    assert found["all-reduce"] == Exchange("all-reduce", 1, 2 * 400 // 2, 2 * 400 // 2)
    assert found["all-to-all"] == Exchange("all-to-all", 1, 8 * 128 * 2 // 2, 0)
    assert found["collective-permute"] == Exchange("collective-permute", 1, 100, 100)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}


def test_a_loop_that_the_compiler_counted():
    text = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {each.kind: each.count for each in exchanges(text, [0] * 8)}["reduce-scatter"] == 5


def test_parts_of_one_collective_count_once_and_what_comes_from_another_slice_is_told():
    part = "channel_id=7, replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id=\"3\"}"
    text = f"""ENTRY %main (p: f32[8]) -> f32[16] {{
  %a = f32[16]{{0}} all-gather(%p), {part}
  %b = f32[16]{{0}} all-gather(%p), {part}
  %r = (f32[25]{{0}}, u32[], token[]) recv(%t), channel_id=3, frontend_attributes={{handler="xla_megascale_runtime"}}
  %h = (f32[25]{{0}}, u32[], token[]) recv(%t), channel_id=4, frontend_attributes={{handler="other"}}
}}
"""
    assert exchanges(text, [0, 0]) == [Exchange("all-gather", 1, 32, 0), Exchange("recv", 1, 104, 104)]
