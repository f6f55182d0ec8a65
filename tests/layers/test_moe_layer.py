"""The MoE layer: against a loop over tokens, masked, limited, alone in a bare module, and misused."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.layers import Attention, DenseMLP, MoE, auxiliary_losses

WIDTH, HIDDEN, EXPERTS, K = 6, 8, 4, 2
SIZES = {"num_experts": EXPERTS, "experts_per_token": K, "expert_hidden": HIDDEN}


def make_moe(**changes) -> MoE:
    return MoE(WIDTH, rngs=nnx.Rngs(0), init_std=0.7, **(SIZES | changes))


def tokens(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (*shape, WIDTH))


def looped(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Every token through its experts, one at a time, in float64."""
    router, gate_up, down = (np.asarray(p[...], np.float64) for p in (moe.router.weight, moe.gate_up, moe.down))
    outputs = np.zeros_like(x, np.float64)
    for t, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ router
        chosen = np.argsort(-logits)[: moe.experts_per_token]
        weights = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
            gate, up = np.split(token @ gate_up[expert], 2)
            outputs[t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    return outputs


@pytest.fixture(scope="module")
def moe():
    return make_moe()


@nnx.jit
def apply(moe, x, mask=None):
    return moe(x, mask)


def test_equals_a_loop_over_tokens(moe):
    x = tokens(3, 5)
    y, statistics = apply(moe, x)
    np.testing.assert_allclose(y.reshape(-1, WIDTH), looped(moe, x.reshape(-1, WIDTH)), rtol=1e-4, atol=1e-5)
    assert statistics.expert_count.sum() == 15 * K
    assert statistics.token_count == 15
    assert statistics.dropped == 0
    np.testing.assert_allclose(statistics.probability_sum.sum(), 15, rtol=1e-5)


def test_gradients_agree_with_finite_differences(moe):
    x = tokens(8)
    definition, params = nnx.split(moe)
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    @jax.jit
    def loss(params):
        y, statistics = nnx.merge(definition, params)(x)
        return jnp.sum(jnp.sin(y)) + statistics.z_sum + jnp.sum(statistics.probability_sum**2)

    def moved(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, params, direction))

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), jax.jit(jax.grad(loss))(params), direction)))
    np.testing.assert_allclose(slope, (moved(1e-3) - moved(-1e-3)) / 2e-3, rtol=2e-2)


@settings(max_examples=20)
@given(mask=st.lists(st.booleans(), min_size=8, max_size=8))
def test_padding_is_neither_routed_nor_counted(moe, mask):
    mask, x = np.asarray(mask), tokens(8)
    y, statistics = apply(moe, x, jnp.asarray(mask))
    np.testing.assert_array_equal(y[~mask], 0.0)
    np.testing.assert_allclose(y[mask], looped(moe, np.asarray(x)[mask]), rtol=1e-4, atol=1e-5)
    routing = moe.router(x)
    expected = np.zeros(EXPERTS)
    np.add.at(expected, np.asarray(routing.expert_index)[mask].ravel(), 1)
    np.testing.assert_array_equal(statistics.expert_count, expected)
    np.testing.assert_allclose(statistics.probability_sum, np.asarray(routing.probabilities)[mask].sum(0), atol=1e-5)
    np.testing.assert_allclose(statistics.z_sum, np.sum(np.asarray(routing.log_normalizer)[mask] ** 2), rtol=1e-5)
    assert statistics.token_count == mask.sum()
    assert statistics.dropped == 0


def test_capacity_drops_later_tokens_and_counts_them():
    moe = make_moe(capacity_factor=0.5)
    moe.router.weight[...] = jnp.zeros((WIDTH, EXPERTS)).at[:, 1].set(5.0).at[:, 3].set(4.0)
    x = jnp.abs(tokens(8)) + 0.1  # every token chooses experts 1 and 3
    assert moe.capacity(8) == 2  # ceil(0.5 · 8 · 2 / 4)
    y, statistics = apply(moe, x)
    np.testing.assert_array_equal(statistics.expert_count, [0, 8, 0, 8])
    assert statistics.dropped == 12
    np.testing.assert_allclose(y[:2], looped(moe, x[:2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[2:], 0.0)
    y, statistics = apply(nnx.view(moe, dropless=True), x)
    assert statistics.dropped == 0
    np.testing.assert_allclose(y, looped(moe, x), rtol=1e-4, atol=1e-5)


def test_a_shared_expert_sees_every_token_and_is_added_without_a_gate():
    """The routed part is scaled, the shared one is not (DeepSeek-V2's convention), and padding is not routed."""
    moe = make_moe(shared_expert_hidden=5, routed_scaling=2.5)
    x, mask = tokens(8), np.arange(8) < 6
    y, statistics = apply(moe, x, jnp.asarray(mask))
    shared = moe.shared_expert(x)
    assert moe.shared_expert.down[...].shape == (5, WIDTH)
    np.testing.assert_allclose((y - shared)[:6], 2.5 * looped(moe, x[:6]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y[6:], shared[6:], rtol=1e-6)
    assert statistics.token_count == 6


def test_capacity_is_rounded_up():
    assert make_moe(capacity_factor=1.0).capacity(9) == 5  # 9 · 2 / 4 = 4.5
    assert make_moe().capacity(9) is None


def test_bfloat16_compute_keeps_parameters_and_router_in_float32():
    moe, reference = make_moe(compute_dtype="bfloat16"), make_moe()
    (y, statistics), (expected, expected_statistics) = apply(moe, tokens(8)), apply(reference, tokens(8))
    assert y.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(moe))} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(statistics.expert_count, expected_statistics.expert_count)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.1, atol=0.1)


def test_alone_in_a_bare_module():
    """No configuration file, no trainer, no mesh: a user's own network learns with it."""

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.moe = MoE(WIDTH, num_experts=4, experts_per_token=2, expert_hidden=16, rngs=rngs)
            self.readout = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            y, statistics = self.moe(x)
            return self.readout(x + y)[:, 0], statistics

    network = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)
    x = tokens(64)
    target = jnp.sin(2 * x[:, 0]) * x[:, 1]

    @nnx.jit
    def train_step(network, optimizer):
        def loss_of(network):
            y, statistics = network(x)
            return jnp.mean((y - target) ** 2), statistics

        (loss, statistics), gradient = nnx.value_and_grad(loss_of, has_aux=True)(network)
        optimizer.update(network, gradient)
        return loss, statistics

    losses = [train_step(network, optimizer)[0] for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]
    assert train_step(network, optimizer)[1].expert_count.sum() == 128


def test_from_config_makes_the_same_layer():
    moe = MoEConfig(**SIZES, capacity_factor=2.0, score_order="softmax_then_topk", renormalize=False)
    config = ModelConfig(vocab_size=8, width=WIDTH, num_layers=8, num_heads=1, moe=moe, init_std=0.5)
    built = MoE.from_config(config, rngs=nnx.Rngs(3))
    by_hand = MoE(
        WIDTH, **SIZES, capacity_factor=2.0, score_order="softmax_then_topk", renormalize=False, init_std=0.5,
        output_init_std=0.125, rngs=nnx.Rngs(3),
    )
    assert nnx.graphdef(built) == nnx.graphdef(by_hand)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(built)), jax.tree.leaves(nnx.state(by_hand)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5 but the layer has 4 experts; choose experts_per_token in 1..4"),
        ({"experts_per_token": 0}, "choose experts_per_token in 1..4"),
        ({"num_experts": 0}, "DenseMLP"),
        ({"num_experts": 2.5}, "MoE.num_experts=2.5 is a float; int is needed"),
        ({"expert_hidden": 0}, "expert_hidden=0; it must be positive"),
        ({"score_order": "topk"}, "choose one of 'topk_then_softmax', 'softmax_then_topk'"),
        ({"router_dtype": "float16"}, "choose one of 'float32', 'bfloat16'"),
        ({"compute_dtype": "float64"}, "choose one of 'float32', 'bfloat16'"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_misuse_is_an_error_in_the_users_terms(change, message):
    with pytest.raises(ValueError, match=message):
        make_moe(**change)


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="width=0; it must be positive"):
        MoE(0, **SIZES, rngs=nnx.Rngs(0))


def test_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="number_of_experts"):
        MoE(WIDTH, **SIZES, number_of_experts=4, rngs=nnx.Rngs(0))


def test_default_construction_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_moe()


def test_tokens_of_another_width_are_refused(moe):
    with pytest.raises(ValueError, match="x has width 5 but the layer has width=6"):
        moe(jnp.ones((3, 5)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("bfloat16"), "bfloat16"])
def test_dtypes_and_counts_may_be_those_of_numpy_and_jax(dtype):
    counts = {name: np.int64(size) for name, size in SIZES.items()}
    moe = make_moe(**counts, compute_dtype=dtype, router_dtype=dtype)
    assert nnx.graphdef(moe) == nnx.graphdef(make_moe(compute_dtype="bfloat16", router_dtype="bfloat16"))
    assert DenseMLP(WIDTH, HIDDEN, compute_dtype=dtype, rngs=nnx.Rngs(0)).compute_dtype == "bfloat16"
    assert Attention(WIDTH, np.int64(1), compute_dtype=dtype, rngs=nnx.Rngs(0)).compute_dtype == "bfloat16"


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 0.5}], ids=["dropless", "limited"])
def test_64_bit_integers_change_nothing(changes):
    """A project may run with jax_enable_x64; tokens and parameters are float32 still."""

    def loss(moe, x):
        y, statistics = moe(x)
        return jnp.sum(y**2) + auxiliary_losses(statistics)["load_balance"], statistics.dropped

    moe, x = make_moe(backend="cpu", **changes), tokens(40)
    expected = nnx.jit(nnx.grad(loss, has_aux=True))(moe, x)
    with jax.enable_x64(True):
        actual = nnx.jit(nnx.grad(loss, has_aux=True))(moe, x)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_warning_of_a_router_that_cannot_learn_points_at_the_caller():
    with pytest.warns(UserWarning, match="every gate is the constant 1") as caught:
        make_moe(experts_per_token=1)
    assert caught[0].filename == __file__


def test_compiled_gradient_scatters_nothing_and_names_its_parts():
    moe = make_moe(backend="cpu", capacity_factor=1.5)

    @nnx.jit
    def gradient(moe, x, mask):
        def loss(moe, x):
            y, statistics = moe(x, mask)
            return y.sum() + statistics.z_sum + jnp.sum(statistics.probability_sum**2)

        return nnx.grad(loss, argnums=(0, 1))(moe, x)

    program = gradient.lower(moe, tokens(8), jnp.ones(8, bool)).compile().as_text()
    assert " scatter(" not in program
    for scope in ("router", "plan", "routed_mlp"):
        assert re.search(rf"[/(]{scope}[/)]", program), scope
