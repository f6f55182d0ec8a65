"""Counts against built models and against XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.accounting import (
    COMPONENTS,
    approximate_training_flops,
    attention_block,
    flops_per_token,
    member_name,
    memory_bytes,
    parameter_count,
    rounded_count,
    sparsity,
    tokens_per_parameter,
    training_flops,
)
from jaxmoe.config import ModelConfig, MoEConfig, TrainConfig
from jaxmoe.layers import auxiliary_losses
from jaxmoe.layers.causal_attention import query_blocks
from jaxmoe.models import Decoder
from jaxmoe.models.loss import language_model_loss


def study_member(width: int, experts: int, k: int) -> ModelConfig:
    """A member of the paper's family (head_dim 128, F = 2D, 16 layers, the padded vocabulary)."""
    moe = MoEConfig(num_experts=experts, experts_per_token=k, expert_hidden=2 * width)
    return ModelConfig(vocab_size=99_584, width=width, num_layers=16, num_heads=width // 128, moe=moe)


def small(**changes) -> ModelConfig:
    settings = {"vocab_size": 40, "width": 16, "num_layers": 5, "num_heads": 4, "dense_hidden": 24} | changes
    return ModelConfig(**settings)


def moe(experts: int, k: int = 2, shared: int = 0) -> MoEConfig:
    return MoEConfig(num_experts=experts, experts_per_token=k, expert_hidden=12, shared_expert_hidden=shared)


GRID = {
    "E=8": small(moe=moe(8)),
    "E=K": small(moe=moe(2)),
    "E=1": small(moe=moe(1, 1)),
    "E=0": small(moe=MoEConfig(num_experts=0)),
    "no moe": small(),
    "default dense_hidden": small(moe=moe(4), dense_hidden=None, first_dense_layers=2),
    "shared expert": small(moe=moe(8, shared=20), first_dense_layers=1),
    "tied": small(moe=moe(8), tie_embeddings=True),
    "tied dense": small(tie_embeddings=True),
    "grouped-query": small(moe=moe(8), num_kv_heads=2, head_dim=6),
    "multi-query": small(num_kv_heads=1),
    "head norm": small(moe=moe(8), qk_norm="head", num_kv_heads=2),
    "projection norm": small(moe=moe(8), qk_norm="projection", num_kv_heads=2),
    "first dense": small(moe=moe(8), first_dense_layers=2),
    "every second": small(moe=moe(8), moe_every=2),
    "both": small(moe=moe(8), first_dense_layers=1, moe_every=3),
    "all dense by prefix": small(moe=moe(8), first_dense_layers=5),
}


def component_of(path: tuple) -> str:
    """The component that a parameter of the built decoder belongs to, from its names."""
    names = [str(part) for part in path]
    if names[-1] in ("scale", "query_scale", "key_scale"):
        return "norms"
    if names[0] == "embedding":
        return "embedding"
    if names[0] == "output":
        return "head"
    if "attention" in names:
        return "attention"
    return "router" if "router" in names else "mlp"


@pytest.mark.parametrize("name", list(GRID))
def test_counts_equal_the_built_model(name):
    config = GRID[name]
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    count = parameter_count(config)
    built = dict.fromkeys([*COMPONENTS, "mlp"], 0)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        built[component_of(path)] += leaf.size
    assert built.pop("mlp") == sum(count.components[name] for name in ("experts", "shared_experts", "dense_mlp"))
    for component, parameters in built.items():
        if component not in ("experts", "shared_experts", "dense_mlp"):
            assert count.components[component] == parameters, component
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    if config.num_moe_layers == 0:
        assert count.components["experts"] == count.components["router"] == 0
        assert count.active == count.total
    else:
        unused = config.moe.num_experts - config.moe.experts_per_token
        assert count.total - count.active == config.num_moe_layers * unused * 3 * 16 * 12
    assert count.non_embedding == count.total - built["embedding"] - built["head"]
    assert count.total - count.active == count.non_embedding - count.non_embedding_active


def test_published_members():
    smallest, larger = study_member(512, 8, 2), study_member(1024, 16, 2)
    assert (parameter_count(smallest).total, parameter_count(smallest).active) == (320_160_256, 169_165_312)
    assert (parameter_count(larger).total, parameter_count(larger).active) == (1_881_965_568, 472_679_424)
    assert member_name(smallest) == "d512-E8-k2-320M-A170M"
    assert member_name(larger) == "d1024-E16-k2-1.9B-A470M"
    components = parameter_count(smallest).components
    assert components["norms"] + components["attention"] == 16_794_112
    assert components["embedding"] + components["head"] == 101_974_016


def test_the_whole_published_grid():
    """All 65 members: the formula of the study, names without collision, tokens per parameter from 390 to 2.4."""
    members = [
        study_member(width, experts, k)
        for width in (512, 1024, 2048)
        for experts in (8, 16, 32, 64, 128, 256)
        for k in (2, 4, 8, 16)
        if k <= experts and (width, experts) != (2048, 256)
    ]
    assert len(members) == len({member_name(member) for member in members}) == 65
    for member in members:
        d, experts, k = member.width, member.moe.num_experts, member.moe.experts_per_token
        rest = 16 * (4 * d * d + d * experts + 2 * d) + d + 2 * 99_584 * d
        assert parameter_count(member).total == rest + 16 * 6 * experts * d * d
        assert parameter_count(member).active == rest + 16 * 6 * k * d * d
    ratios = [tokens_per_parameter(125_000_000_000, member) for member in members]
    assert (round(max(ratios)), round(min(ratios), 1)) == (390, 2.4)


PUBLISHED_NAMES = """
    d1024-E128-k4-13.2B-A670M d1024-E128-k8-13.2B-A1.1B d1024-E16-k4-1.9B-A670M d1024-E256-k2-26.0B-A470M
    d1024-E256-k4-26.0B-A670M d1024-E32-k16-3.5B-A1.9B d1024-E32-k8-3.5B-A1.1B d1024-E64-k16-6.7B-A1.9B
    d1024-E64-k2-6.7B-A470M d1024-E8-k2-1.1B-A470M d2048-E128-k2-52.2B-A1.5B d2048-E128-k4-52.2B-A2.3B
    d2048-E128-k8-52.2B-A3.9B d2048-E16-k16-7.1B-A7.1B d2048-E16-k4-7.1B-A2.3B d2048-E32-k16-13.6B-A7.1B
    d2048-E32-k8-13.6B-A3.9B d2048-E64-k16-26.4B-A7.1B d2048-E64-k4-26.4B-A2.3B d2048-E64-k8-26.4B-A3.9B
    d2048-E8-k2-3.9B-A1.5B d512-E128-k16-3.3B-A520M d512-E128-k2-3.3B-A170M d512-E128-k4-3.3B-A220M
    d512-E128-k8-3.3B-A320M d512-E16-k4-520M-A220M d512-E256-k16-6.6B-A520M d512-E256-k2-6.6B-A170M
    d512-E32-k16-920M-A520M d512-E32-k2-920M-A170M d512-E32-k4-920M-A220M d512-E32-k8-920M-A320M
    d512-E64-k16-1.7B-A520M d512-E64-k2-1.7B-A170M d512-E64-k8-1.7B-A320M d512-E8-k4-320M-A220M
"""
"""Of the authors' launch scripts."""


def test_names_are_the_published_ones():
    for name in PUBLISHED_NAMES.split():
        width, experts, k = (int(part[1:]) for part in name.split("-")[:3])
        assert member_name(study_member(width, experts, k)) == name


def test_approximate_flops_of_the_study():
    assert approximate_training_flops(study_member(512, 8, 2), 125_000_000_000) == pytest.approx(1.27e20, rel=0.01)
    assert approximate_training_flops(study_member(2048, 32, 16), 125_000_000_000) == pytest.approx(5.34e21, rel=0.01)


def test_exact_flops_by_hand():
    config = small(moe=moe(8, shared=20), first_dense_layers=1, num_kv_heads=2)
    flops = flops_per_token(config, sequence_length=10)
    assert flops.components == {
        "projections": 5 * 2 * 16 * (16 + 8 + 8 + 16),
        "attention": 5 * 2 * 2 * 16 * 10,
        "router": 4 * 2 * 16 * 8,
        "experts": 4 * 2 * 2 * 3 * 16 * 12,
        "shared_experts": 4 * 2 * 3 * 16 * 20,
        "dense_mlp": 2 * 3 * 16 * 24,
        "head": 2 * 16 * 40,
    }
    assert flops.forward == sum(flops.components.values())
    assert flops.training == 3 * flops.forward
    assert flops.approximate == 6 * parameter_count(config).active
    train = TrainConfig(steps=7, batch_size=4, sequence_length=10)
    assert training_flops(config, train) == flops.training * 7 * 4 * 10


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_flops_of_a_dense_layer_agree_with_xla(tie_embeddings):
    """Wide enough that XLA's count of elementwise operations, which is in it too, stays under 1 %."""
    config = ModelConfig(
        vocab_size=2048, width=512, num_layers=1, num_heads=8, num_kv_heads=4, dense_hidden=1536,
        tie_embeddings=tie_embeddings,
    )
    definition, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    forward = jax.jit(lambda state, tokens: nnx.merge(definition, state)(tokens).logits)
    counted = forward.lower(state, tokens).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(32 * flops_per_token(config, 32).forward, counted, rtol=0.01)


TRAIN = TrainConfig(steps=1, batch_size=8, sequence_length=16)


def test_bytes_of_weights_gradients_and_adam_equal_the_arrays():
    config = GRID["E=8"]
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
    memory = memory_bytes(config, TRAIN)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, weights, 2 * weights)
    assert memory.total == 4 * weights + memory.activations


def test_activation_bytes_by_hand():
    tokens = 8 * 16
    fixed = 12 * (tokens * 40 + tokens * 4 * 16)  # logits of all positions, which fit one chunk; scores of 4 heads
    attention = 4 * 16 + 4  # rotated queries and keys, values, output; logsumexps
    dense, routed = 3 * 24, 2 * 2 * 12 + 3 * 8
    config = small(moe=moe(8), first_dense_layers=2)
    layers = 5 * (4 * 16 + attention) + 2 * dense + 3 * routed
    assert memory_bytes(config, TRAIN).activations == tokens * 4 * (layers + 2 * 16) + fixed
    recomputed = 4 * 16 + attention + max(dense, routed)
    full = dataclasses.replace(config, remat="full")
    assert memory_bytes(full, TRAIN).activations == tokens * 4 * (5 * 16 + recomputed + 2 * 16) + fixed
    dots = dataclasses.replace(config, remat="dots")
    layers = 5 * (2 * 16 + 3 * 16) + 2 * 2 * 24 + 3 * 8
    assert memory_bytes(dots, TRAIN).activations == tokens * 4 * (layers + recomputed + 2 * 16) + fixed
    shared = small(moe=moe(8, shared=20), first_dense_layers=2)
    layers = 5 * (4 * 16 + attention) + 2 * dense + 3 * (routed + 3 * 20)
    assert memory_bytes(shared, TRAIN).activations == tokens * 4 * (layers + 2 * 16) + fixed


def test_flash_kernels_hold_no_scores_and_triton_a_key_for_every_query_head():
    config = small(num_kv_heads=2)
    plain, kernel, repeated = (
        memory_bytes(dataclasses.replace(config, attention=name), TRAIN).activations
        for name in ("auto", "splash", "triton")
    )
    tokens, layers, head = 8 * 16, config.num_layers, config.head_size
    assert plain - kernel == 12 * tokens * 4 * 16
    assert repeated - kernel == tokens * layers * 4 * 2 * (4 - 2) * head


@pytest.mark.parametrize("length", [1, 100, 128, 129, 1024, 1025, 4096])
def test_the_attention_block_is_the_one_that_runs(length):
    assert attention_block(length) == query_blocks(length)[0][1]


@pytest.mark.parametrize(
    ("kind", "remat"), [("moe", "none"), ("moe", "dots"), ("moe", "full"), ("dense", "none"), ("dense", "dots")]
)
def test_activation_bytes_are_near_what_xla_allocates(kind, remat):
    """Temporaries of the compiled gradient of a small model; its weight gradients are outputs, so not in them."""
    routed = MoEConfig(num_experts=8, experts_per_token=2, expert_hidden=128) if kind == "moe" else None
    config = ModelConfig(
        vocab_size=512, width=64, num_layers=6, num_heads=4, dense_hidden=256, moe=routed, remat=remat
    )
    train = TrainConfig(steps=1, batch_size=8, sequence_length=256)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def loss(state, tokens):
        model = nnx.merge(graph, state)
        hidden, router = model.hidden(tokens)
        total, _ = language_model_loss(hidden, model.head_weight, tokens, jnp.ones(tokens.shape))
        return total if router is None else total + auxiliary_losses(router)["load_balance"]

    tokens = jax.ShapeDtypeStruct((train.batch_size, train.sequence_length), jnp.int32)
    held = jax.jit(jax.grad(loss)).lower(state, tokens).compile().memory_analysis().temp_size_in_bytes
    assert held / 1.6 < memory_bytes(config, train).activations < 1.6 * held


def test_activations_shrink_with_micro_batches_and_recomputation():
    config = study_member(512, 8, 2)
    sizes = [
        memory_bytes(dataclasses.replace(config, remat=remat), TRAIN).activations for remat in ("none", "dots", "full")
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    halved = dataclasses.replace(TRAIN, gradient_accumulation=2)
    chunk = 12 * 2**22  # bytes of one chunk of the loss: the same for any batch
    whole, half = (memory_bytes(config, train).activations - chunk for train in (TRAIN, halved))
    assert half * 2 == whole
    assert memory_bytes(config, halved).weights == memory_bytes(config, TRAIN).weights


def test_sparsity():
    assert sparsity(study_member(512, 8, 2)) == 0.75
    assert sparsity(GRID["E=K"]) == 0.0
    assert sparsity(GRID["no moe"]) == sparsity(GRID["all dense by prefix"]) == 0.0


@pytest.mark.parametrize(
    ("parameters", "written"),
    [
        (119_000, "119K"), (1_651_000, "1.7M"), (23_400_000, "23M"), (169_165_312, "170M"), (994_000_000, "990M"),
        (996_000_000, "1.0B"), (1_684_000_000, "1.7B"), (26_004_000_000, "26.0B"),
    ],
)
def test_counts_are_written_as_in_the_study(parameters, written):
    assert rounded_count(parameters) == written


def test_dense_member_is_named_so():
    assert member_name(GRID["no moe"]).startswith("d16-dense-")
