"""The decoder: against a forward pass in plain numpy, packed and padded, and its parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.models import Decoder, dropless
from jaxmoe.models.block import repetitions

VOCABULARY, WIDTH = 19, 8


def config_of(layers: int = 2, **changes) -> ModelConfig:
    settings = {"dense_hidden": 12, "init_std": 0.3, "residual_init": "same"} | changes
    return ModelConfig(vocab_size=VOCABULARY, width=WIDTH, num_layers=layers, num_heads=4, **settings)


MOE = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=6)
CONFIGS = {
    "moe": config_of(moe=MOE, qk_norm="head"),
    "dense, grouped-query, tied": config_of(num_kv_heads=2, tie_embeddings=True, qk_norm="projection"),
    "first dense, every second": config_of(layers=6, moe=MOE, first_dense_layers=1, moe_every=2, head_dim=6),
}


@nnx.jit(static_argnums=0)
def build(config: ModelConfig, seed: int) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(jax.random.key(seed)))


@nnx.jit
def run(model, tokens, segment_ids=None):
    return model(tokens, segment_ids=segment_ids)


@pytest.fixture(scope="module")
def models():
    return {name: build(config, 0) for name, config in CONFIGS.items()}


PLAIN = config_of(moe=MOE)


@pytest.fixture(scope="module")
def parameters():
    return nnx.state(build(PLAIN, 0))


def variant(parameters: nnx.State, **changes) -> Decoder:
    """The decoder of PLAIN with another setting and the same parameters."""
    config = dataclasses.replace(PLAIN, **changes)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))), parameters)


TOKENS = np.asarray(jax.random.randint(jax.random.key(4), (2, 6), 0, VOCABULARY))
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def layers_of(model: Decoder) -> list[dict[str, np.ndarray]]:
    """The parameters of each layer by flat name, first layer first."""
    layers = []
    for stack in model.stacks:
        for repeat in range(stack.repeats):
            for block in stack.blocks:
                flat = nnx.to_flat_state(nnx.state(block))
                layers.append({"/".join(path): np.asarray(p[repeat], np.float64) for path, p in flat})
    return layers


def numpy_logits(config: ModelConfig, model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row without padding, token by token and head by head in float64."""
    length, size, per_key = len(tokens), config.head_size, config.num_heads // config.kv_heads
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, size, 2) / size)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def swiglu(x, gate_up, down):
        gate, up = np.split(x @ gate_up, 2, -1)
        return gate / (1 + np.exp(-gate)) * up @ down

    def attention(x, p):
        projected = np.einsum("sd,dmrh->smrh", x, p["attention/query_key_value"])
        query, key, value = projected[:, :, :per_key], projected[:, :, per_key], projected[:, :, per_key + 1]
        if config.qk_norm == "head":
            query = norm(query, p["attention/query_scale"])
            key = norm(key, p["attention/key_scale"])
        if config.qk_norm == "projection":
            query = norm(query.reshape(length, -1), p["attention/query_scale"]).reshape(query.shape)
            key = norm(key.reshape(length, -1), p["attention/key_scale"]).reshape(key.shape)
        y = np.zeros_like(x)
        for h in range(config.num_heads):
            q, k = rotated(query[:, h // per_key, h % per_key]), rotated(key[:, h // per_key])
            v = value[:, h // per_key]
            for i in range(length):
                weights = np.exp(k[: i + 1] @ q[i] / math.sqrt(size))
                y[i] += weights @ v[: i + 1] / weights.sum() @ p["attention/output"][h]
        return y

    def mlp(x, p):
        if "mlp/router/weight" not in p:
            return swiglu(x, p["mlp/gate_up"], p["mlp/down"])
        y = np.zeros_like(x)
        for t, logits in enumerate(x @ p["mlp/router/weight"]):
            chosen = np.argsort(-logits)[: config.moe.experts_per_token]
            for expert in chosen:
                gate = np.exp(logits[expert]) / np.exp(logits[chosen]).sum()
                y[t] += gate * swiglu(x[t], p["mlp/gate_up"][expert], p["mlp/down"][expert])
        return y

    table = np.asarray(model.embedding.table[...], np.float64)
    x = table[tokens]
    for p in layers_of(model):
        x = x + attention(norm(x, p["attention_norm/scale"]), p)
        x = x + mlp(norm(x, p["mlp_norm/scale"]), p)
    head = table.T if config.tie_embeddings else np.asarray(model.output[...], np.float64)
    return norm(x, np.asarray(model.final_norm.scale[...])) @ head


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_equal_plain_numpy_and_padding_changes_nothing(models, name):
    config, model = CONFIGS[name], models[name]
    output = run(model, TOKENS, SEGMENTS)
    assert output.logits.dtype == jnp.float32
    np.testing.assert_allclose(output.logits[0], numpy_logits(config, model, TOKENS[0]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(output.logits[1, :4], numpy_logits(config, model, TOKENS[1, :4]), rtol=1e-3, atol=1e-4)
    assert np.isfinite(output.logits).all()
    if config.num_moe_layers == 0:
        assert output.router is None
    else:
        assert output.router.expert_count.shape == (config.num_moe_layers, 4)
        np.testing.assert_array_equal(output.router.expert_count.sum(-1), 10 * 2)
        np.testing.assert_array_equal(output.router.token_count, 10)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(5), [(("dense",), 5)]),
        (config_of(5, moe=MOE), [(("moe",), 5)]),
        (config_of(7, moe=MOE, first_dense_layers=2), [(("dense",), 1)] * 2 + [(("moe",), 5)]),
        (config_of(10, moe=MOE, moe_every=2), [(("dense", "moe"), 5)]),
        (
            config_of(18, moe=MOE, first_dense_layers=1, moe_every=3),
            [(("dense",), 1), (("dense", "dense", "moe"), 5), (("dense",), 1), (("dense",), 1)],
        ),
        (config_of(4, moe=MOE), [(("moe",), 1)] * 4),
        (config_of(2, moe=MOE, moe_every=3), [(("dense",), 1)] * 2),
        (config_of(3, moe=MOE, first_dense_layers=3), [(("dense",), 1)] * 3),
        (config_of(3, moe=MoEConfig(num_experts=0)), [(("dense",), 1)] * 3),
    ],
)
def test_layers_are_grouped_into_repetitions(config, expected):
    """More than four repeats are one stack; fewer are stacks of one."""
    runs = repetitions(config)
    assert [(run.kinds, run.repeats) for run in runs] == expected
    assert sum((run.kinds * run.repeats for run in runs), ()) == config.layer_kinds


def lowered_size(layers: int) -> int:
    config = config_of(layers, moe=MOE, first_dense_layers=1, moe_every=2)
    definition, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def loss(state, tokens):
        return nnx.merge(definition, state)(tokens).logits.var()

    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return len(jax.jit(jax.grad(loss)).lower(state, tokens).as_text().splitlines())


def test_program_does_not_grow_with_depth():
    assert lowered_size(33) <= 1.01 * lowered_size(11)


def test_building_under_eval_shape_allocates_nothing_and_has_the_same_shapes(models):
    for name, config in CONFIGS.items():
        abstract = nnx.state(nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0))))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
        expected = jax.tree.map(lambda p: (p.shape, p.dtype), nnx.state(models[name]))
        assert jax.tree.map(lambda p: (p.shape, p.dtype), abstract) == expected


def test_every_variable_is_a_float32_parameter(models):
    for model in models.values():
        state = nnx.state(model)
        assert jax.tree.structure(state) == jax.tree.structure(nnx.state(model, nnx.Param))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("residual_init", "divisor"), [("scaled", 4.0), ("same", 1.0)])
def test_initialization_is_normal_and_scaled_where_it_writes_to_the_residual(residual_init, divisor):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=64)
    config = ModelConfig(
        vocab_size=256, width=64, num_layers=8, num_heads=2, moe=moe, init_std=0.04, residual_init=residual_init
    )
    model = build(config, 0)
    mlp, attention = model.stacks[0].blocks[0].mlp, model.stacks[0].blocks[0].attention
    inputs = [model.embedding.table, model.output, attention.query_key_value, mlp.router.weight, mlp.gate_up]
    for parameter in inputs:
        np.testing.assert_allclose(np.std(parameter[...]), 0.04, rtol=0.05)
        np.testing.assert_allclose(np.mean(parameter[...]), 0.0, atol=0.003)
    for parameter in (attention.output, mlp.down):
        np.testing.assert_allclose(np.std(parameter[...]), 0.04 / divisor, rtol=0.05)
    assert np.abs(mlp.gate_up[0] - mlp.gate_up[1]).max() > 0.01  # layers differ


def test_seeds_decide_the_parameters():
    first, same, other = build(CONFIGS["moe"], 1), build(CONFIGS["moe"], 1), build(CONFIGS["moe"], 2)
    np.testing.assert_array_equal(first.output[...], same.output[...])
    assert np.abs(first.output[...] - other.output[...]).max() > 0.1


@pytest.mark.parametrize("document_mask", [True, False])
def test_document_mask_makes_packed_documents_equal_separate_rows(parameters, document_mask):
    model = variant(parameters, document_mask=document_mask)
    row = TOKENS[0]
    packed = run(model, np.stack([row, row]), np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0]])).logits
    rows = np.stack([row, np.roll(row, -2)])
    alone = run(model, rows, np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])).logits
    np.testing.assert_allclose(packed[0, :2], alone[0, :2], rtol=1e-4, atol=1e-5)
    if document_mask:
        np.testing.assert_allclose(packed[0, 2:5], alone[1, :3], rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(packed[0, :5], packed[1, :5], rtol=1e-5, atol=1e-6)
        assert np.abs(packed[0, 2:5] - alone[1, :3]).max() > 1e-2


def test_rematerialization_changes_no_gradient(parameters):
    def gradient(remat):
        model = variant(parameters, remat=remat, moe=dataclasses.replace(MOE, backend="reference"))

        @nnx.jit
        def differentiated(model):
            return nnx.grad(lambda model: jnp.sum(model(TOKENS, segment_ids=SEGMENTS).logits ** 2))(model)

        return jax.tree.leaves(nnx.state(differentiated(model)))

    reference = gradient("none")
    for remat in ("full", "dots"):
        for ours, expected in zip(gradient(remat), reference, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_is_recomputed_is_not_found_again():
    """Without a loop over the layers XLA sees both computations, and would keep the first for the second."""
    config = ModelConfig(vocab_size=8, width=32, num_layers=3, num_heads=2, dense_hidden=64)

    def flops(remat):
        abstract = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, remat=remat), rngs=nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        gradient = jax.jit(jax.grad(lambda state, tokens: jnp.sum(nnx.merge(graph, state)(tokens).logits ** 2)))
        compiled = gradient.lower(state, jax.ShapeDtypeStruct((2, 128), jnp.int32)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops("full") > flops("dots") > 1.02 * flops("none")


def test_bfloat16_compute_stays_near_float32(parameters):
    exact = run(variant(parameters), TOKENS, SEGMENTS).logits
    rounded = run(variant(parameters, compute_dtype="bfloat16"), TOKENS, SEGMENTS).logits
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded)[:, :4].max() < 0.1 * np.abs(exact).max()


def test_capacity_drops_while_training_and_not_in_the_dropless_view(parameters):
    model = variant(parameters, moe=dataclasses.replace(MOE, capacity_factor=0.25))
    everything = np.ones_like(SEGMENTS)
    dropped = run(model, TOKENS, everything).router.dropped
    assert (dropped >= 24 - 4 * 2).all()  # capacity 2 for each of 4 experts, 24 assignments
    free = run(dropless(model), TOKENS, everything)
    np.testing.assert_array_equal(free.router.dropped, 0)
    np.testing.assert_allclose(free.logits, run(variant(parameters), TOKENS, everything).logits, rtol=1e-5, atol=1e-6)
