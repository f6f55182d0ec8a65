"""AdamW: what decays, and the update against the published formula."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig, MoEConfig, TrainConfig
from jaxmoe.models import Decoder
from jaxmoe.training import decay_mask, make_optimizer


def parameters(config: ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)


def names(mask: nnx.State, decayed: bool) -> set[str]:
    """Last parts of the paths that are (not) decayed."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    parts = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return {
        ".".join(part for part in name.split(".") if not part.isdigit() and part not in ("stacks", "blocks"))
        for name, (_, value) in zip(parts, leaves, strict=True)
        if value == decayed
    }


def test_matrices_decay_and_gains_do_not():
    """Also where gains stacked over layers have as many axes as a matrix, and in every kind of layer."""
    config = ModelConfig(
        vocab_size=32, width=8, num_layers=5, num_heads=2, qk_norm="projection", first_dense_layers=1, moe_every=2,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=4),
    )  # fmt: skip
    mask = decay_mask(parameters(config))
    assert names(mask, decayed=True) == {
        "embedding.table", "output", "attention.query_key_value", "attention.output",
        "mlp.router.weight", "mlp.gate_up", "mlp.down",
    }  # fmt: skip
    assert names(mask, decayed=False) == {
        "attention_norm.scale", "mlp_norm.scale", "final_norm.scale", "attention.query_scale", "attention.key_scale",
    }  # fmt: skip


def test_mask_of_a_lone_layer():
    """Without a stack, axes count as they are."""
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    mask = decay_mask(nnx.state(layer, nnx.Param))
    assert mask["kernel"].get_value() is True
    assert mask["bias"].get_value() is False


def test_two_updates_by_hand():
    """AdamW (Loshchilov and Hutter 2019): m, v, bias correction, decoupled decay times the learning rate, clipping."""
    config = TrainConfig(
        steps=4, batch_size=1, sequence_length=1, learning_rate=0.1, schedule="constant", warmup_steps=2, beta1=0.9,
        beta2=0.8, epsilon=1e-3, weight_decay=0.5, clip_norm=1.0,
    )  # fmt: skip
    optimizer = make_optimizer(config)
    params = {"matrix": jnp.array([[1.0, -2.0]]), "gain": jnp.array([3.0])}
    gradients = [
        {"matrix": jnp.array([[3.0, 0.0]]), "gain": jnp.array([4.0])},  # norm 5: clipped to 1
        {"matrix": jnp.array([[0.1, -0.2]]), "gain": jnp.array([0.2])},  # norm 0.3: left alone
    ]
    state = optimizer.init(params)
    expected = {name: np.array(value, np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for number, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update(gradient, state, params, step=number)
        params = jax.tree.map(jnp.add, params, updates)
        scale = 0.2 if number == 1 else 1.0
        rate = 0.1 * number / 2
        for name, decay in (("matrix", 0.5), ("gain", 0.0)):
            clipped = scale * np.asarray(gradient[name], np.float64)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.8 * second[name] + 0.2 * clipped**2
            mean, square = first[name] / (1 - 0.9**number), second[name] / (1 - 0.8**number)
            expected[name] -= rate * (mean / (np.sqrt(square) + 1e-3) + decay * expected[name])
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_no_clipping_when_clip_norm_is_none():
    config = TrainConfig(
        steps=1, batch_size=1, sequence_length=1, learning_rate=1.0, schedule="constant", beta1=0.0, beta2=0.0,
        epsilon=1e3, weight_decay=0.0, clip_norm=None,
    )  # fmt: skip
    optimizer = make_optimizer(config)
    gain = {"gain": jnp.zeros(1)}
    updates, _ = optimizer.update({"gain": jnp.array([100.0])}, optimizer.init(gain), gain, step=1)
    np.testing.assert_allclose(updates["gain"], [-100 / (100 + 1e3)], rtol=1e-6)
