"""Which implementation of attention runs, and that the kernels of JAX compute our definition."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from jaxmoe.config import ConfigError
from jaxmoe.layers import Attention, flash_attention
from jaxmoe.layers.causal_attention import causal_attention
from jaxmoe.layers.self_attention import AttentionCase, _logged_choice, resolved_attention, self_attention

CASE = AttentionCase(length=4096, head_dim=128)


def values_and_gradients(attention, inputs):
    """Output, and the gradients of query, key and value in the last input's direction."""
    *arguments, direction = inputs
    value, pull = jax.vjp(attention, *arguments)
    return value, *pull(direction)


@pytest.fixture(scope="module")
def inputs():
    """Grouped queries over two blocks of keys, and a direction for the gradient."""
    query, key = (2, 2, 2, 256, 16), (2, 2, 256, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, (query, key, key, query), strict=True)]


@pytest.fixture(scope="module")
def groups():
    """Documents that end within a block, and padding at both ends."""
    numbers = np.repeat([[0, 1, 2, 3], [1, 2, 3, 0]], [30, 99, 100, 27], axis=1)
    return jnp.asarray(numbers)


@pytest.mark.parametrize("name", ["splash", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_computes_the_definition(name, dtype, inputs, groups, monkeypatch):
    monkeypatch.setattr(flash_attention, "SPLASH_BLOCKS", (128,))
    flash_attention._splash_kernel.cache_clear()
    # One without documents: another kernel.
    numbers = groups if dtype == "float32" else None
    rounded = [x.astype(dtype) for x in inputs]
    with pallas_kernels.interpreted():
        attention = functools.partial(self_attention, groups=numbers, attention=name)
        program = jax.jit(functools.partial(values_and_gradients, attention)).trace(rounded)
        assert "pallas_call" in str(program.jaxpr)
        ours = program.lower().compile()(rounded)
    expected = jax.jit(functools.partial(values_and_gradients, functools.partial(causal_attention, groups=numbers)))(
        [x.astype(jnp.float32) for x in rounded]
    )
    flash_attention._splash_kernel.cache_clear()
    assert all(x.dtype == dtype for x in ours)
    tolerances = [1e-5, 1e-4, 1e-4, 1e-4] if dtype == "float32" else [2e-2, 4e-2, 4e-2, 4e-2]
    for actual, desired, tolerance in zip(ours, expected, tolerances, strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), desired, rtol=tolerance, atol=tolerance)


def test_on_cpu_nothing_is_added_to_plain_attention(inputs, groups):
    assert resolved_attention("auto", CASE) == "xla"
    *arguments, _ = inputs
    programs = [
        jax.make_jaxpr(lambda *x, attention=attention: attention(*x, groups))(*arguments)
        for attention in (self_attention, causal_attention)
    ]
    assert str(programs[0]) == str(programs[1])


@pytest.mark.parametrize(
    ("chip", "changes", "chosen"),
    [
        ("v5e", {}, "splash"),
        ("v5e", {"length": 128, "head_dim": 64, "dtype": "float32"}, "splash"),
        ("v5e", {"length": 64}, "xla"),
        ("v5e", {"length": 4100}, "xla"),
        ("v5e", {"head_dim": 100}, "xla"),
        ("v5e", {"length": 2048, "context": 8}, "splash"),
        ("v5e", {"length": 2048, "context": 16}, "xla"),
        ("h100", {}, "triton"),
        ("h100", {"has_groups": False}, "cudnn"),
        ("h100", {"has_groups": False, "dtype": "float32"}, "triton"),
        ("h100", {"has_groups": False, "length": 100}, "cudnn"),
        ("h100", {"length": 100}, "xla"),
        ("h100", {"head_dim": 256}, "xla"),
        ("h100", {"context": 2}, "xla"),
    ],
)
def test_auto_follows_the_stated_rule_and_what_it_picks_is_accepted(chip, changes, chosen):
    case = dataclasses.replace(CASE, **changes)
    with pallas_kernels.compiling_for(chip):
        assert resolved_attention("auto", case) == chosen
        assert resolved_attention(chosen, case) == chosen


def test_the_choice_is_logged_once_with_its_reason(caplog):
    _logged_choice.cache_clear()
    caplog.set_level(logging.INFO)
    with pallas_kernels.compiling_for("v5e"):
        for _ in range(2):
            resolved_attention("auto", CASE)
            resolved_attention("auto", dataclasses.replace(CASE, length=4100))
    assert [(record.levelname, "is 'splash'" in record.message) for record in caplog.records] == [
        ("INFO", True),
        ("WARNING", False),
    ]
    assert "is 'xla'" in caplog.text
    assert "not 'splash': sequence length 4100 is not a multiple of 128" in caplog.text


@pytest.mark.parametrize(
    ("chip", "name", "changes", "message"),
    [
        (None, "splash", {}, "it runs on TPUs and the platform is 'cpu'; 'xla' .or 'auto'. would work"),
        ("v5e", "triton", {}, "of compute capability 8.0 or newer and the platform is 'tpu'; 'splash'"),
        ("v5e", "splash", {"length": 200}, "sequence length 200 is not a multiple of 128; 'xla'"),
        ("v5e", "splash", {"length": 512, "context": 4}, "multiple of 1024, 128 for each of 2 chunks on 4 context dev"),
        ("v5e", "splash", {"head_dim": 260}, "head_dim 260 is not a multiple of 8 up to 256"),
        ("h100", "cudnn", {}, "it tells no documents and no padding apart without a mask of S x S numbers; 'triton'"),
        ("h100", "cudnn", {"has_groups": False, "dtype": "float32"}, "compute_dtype 'float32' is not 'bfloat16'"),
        ("h100", "cudnn", {"has_groups": False, "head_dim": 136}, "head_dim 136 is not a multiple of 8 up to 128"),
        ("h100", "triton", {"length": 100}, "sequence length 100 is not a multiple of 128"),
        ("h100", "triton", {"head_dim": 8}, "head_dim 8 is not within 16..128"),
        ("h100", "triton", {"context": 4}, "a sequence over 4 context devices needs a mask of its own on each"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_an_error_with_the_limit_and_what_would_work(chip, name, changes, message):
    case = dataclasses.replace(CASE, **changes)
    if chip is None:
        with pytest.raises(ConfigError, match=message):
            resolved_attention(name, case)
        return
    with pallas_kernels.compiling_for(chip), pytest.raises(ConfigError, match=message):
        resolved_attention(name, case)


def test_the_layer_runs_what_its_option_names():
    layer = Attention(32, 2, attention="splash", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 128, 32))
    with pytest.raises(ConfigError, match="attention='splash': it runs on TPUs"):
        layer(x)
    with pallas_kernels.interpreted():
        ours, _ = layer(x)
    layer.attention = "xla"
    np.testing.assert_allclose(ours, layer(x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="choose one of 'auto', 'xla', 'splash'"):
        Attention(32, 2, attention="flash", rngs=nnx.Rngs(0))
