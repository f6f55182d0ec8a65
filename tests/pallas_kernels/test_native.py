"""The compiled kernels beyond what all backends are tested for: large groups, ragged tiles, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import build_native, cases, grouped_matmul, moe_mlp, native
from pallas_kernels.execution import Target


@dataclasses.dataclass(frozen=True)
class Sizes:
    """T, K, E, D, F."""

    tokens: int
    choices: int
    experts: int
    width: int
    hidden: int


def case(sizes):
    keys = jax.random.split(jax.random.key(0), 6)
    t, k, e, d, f = dataclasses.astuple(sizes)
    expert_index = jax.random.randint(keys[1], (t, k), 0, e)
    expert_index = jnp.where(jnp.arange(t)[:, None] < t // 3, 0, expert_index)  # a hot expert
    return expert_index, (
        jax.random.normal(keys[0], (t, d)),
        jax.random.uniform(keys[2], (t, k)),
        jax.random.normal(keys[3], (e, d, 2 * f)) / d**0.5,
        jax.random.normal(keys[4], (e, f, d)) / f**0.5,
    )


@functools.partial(jax.jit, static_argnames=("backend", "recompute"))
def value_and_gradients(expert_index, arguments, *, backend, recompute=False):
    def layer(x, gate, w_gate_up, w_down):
        return moe_mlp(x, expert_index, gate, w_gate_up, w_down, backend=backend, recompute=recompute)

    y, pull = jax.vjp(layer, *arguments)
    return y, *pull(jnp.cos(y))


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize(
    "sizes",
    [Sizes(700, 2, 4, 48, 72), Sizes(131, 3, 7, 33, 19), Sizes(40, 2, 30, 64, 32), Sizes(520, 1, 2, 5, 130)],
    ids=["many_rows", "ragged", "few_rows", "wide_hidden"],
)
def test_it_equals_the_definition_where_tiles_and_parts_are_ragged(native_library, sizes):
    expert_index, arguments = case(sizes)
    actual = value_and_gradients(expert_index, arguments, backend="cpu_native")
    assert_close(actual, value_and_gradients(expert_index, arguments, backend="reference"))
    again = value_and_gradients(expert_index, arguments, backend="cpu_native", recompute=True)
    jax.tree.map(np.testing.assert_array_equal, again, actual)


def test_gradients_written_past_the_cache_are_the_same(native_library, monkeypatch):
    expert_index, arguments = case(Sizes(300, 2, 3, 64, 32))
    expected = value_and_gradients(expert_index, arguments, backend="cpu_native")
    monkeypatch.setattr(native, "CACHED_NUMBERS", 0)
    jax.clear_caches()
    actual = value_and_gradients(expert_index, arguments, backend="cpu_native")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("experts", [8, 256])
def test_the_hidden_layer_becomes_its_gradient_in_place(native_library, experts):
    """Against saved inputs and routed activations (docs/kernels.md), for any weight of the weights."""
    shape = cases.Shape(2048, 2, experts, 256, 512)
    case = cases.layer_case(shape, jnp.float32, Target("cpu_native"))
    compiled = jax.jit(case.function).lower(*case.arguments.values()).compile()
    numbers = shape.tokens * shape.width + shape.rows * (2 * shape.width + 3 * shape.hidden)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.9 * 4 * numbers


def test_large_and_small_numbers_keep_their_meaning(native_library):
    """SiLU of what is far from zero, and of an infinity, is what jax.nn says."""
    gated = jnp.array([-jnp.inf, -200.0, -88.0, -30.0, 0.0, 30.0, 88.0, 200.0, 1e30])
    w_gate_up = jnp.ones((1, 1, 2)).at[0, 0, 1].set(0.0)
    bias_up = jnp.concatenate([w_gate_up, jnp.array([[[0.0, 1.0]]])], axis=1)
    x = jnp.stack([gated, jnp.ones_like(gated)], axis=1)[1:]
    index, gate = jnp.zeros((len(x), 1), jnp.int32), jnp.ones((len(x), 1))
    down = jnp.array([[[1.0, 0.0]]])
    actual = moe_mlp(x, index, gate, bias_up, down, backend="cpu_native")[:, 0]
    np.testing.assert_allclose(actual, jax.nn.silu(gated[1:]), rtol=1e-6, atol=1e-30)


def test_another_dtype_is_refused(native_library):
    expert_index, arguments = case(Sizes(4, 1, 2, 8, 8))
    half = [array.astype(jnp.bfloat16) for array in arguments]
    with pytest.raises(ValueError, match="x has dtype bfloat16 but backend='cpu_native' is float32 alone"):
        moe_mlp(half[0], expert_index, *half[1:], backend="cpu_native")
    with pytest.raises(ValueError, match="rows has dtype bfloat16"):
        grouped_matmul(half[0], half[3].swapaxes(1, 2), jnp.array([2, 2]), backend="cpu_native")


def test_without_the_library_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(native.DIRECTORY_VARIABLE, str(tmp_path))
    native.load.cache_clear()
    expert_index, (x, gate, w_gate_up, w_down) = case(Sizes(4, 1, 2, 8, 8))
    with pytest.raises(ValueError, match="build it with `python -m pallas_kernels.build_native`"):
        moe_mlp(x, expert_index, gate, w_gate_up, w_down, backend="cpu_native")
    assert not native.is_built()


def test_a_compiler_that_is_not_there_or_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(native.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="called 'no-such-compiler'"):
        native.build("no-such-compiler")
    with pytest.raises(RuntimeError, match="false .* failed"):
        native.build("false")
    monkeypatch.setattr("sys.argv", ["build_native", "--compiler=no-such-compiler"])
    assert build_native.main() == 1
    assert "error: no C++ compiler" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
