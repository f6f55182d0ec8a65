"""`python -m experiments.benchmark moe`: form, contenders and routings; nothing here depends on a time."""

import functools
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import moe, moe_device, moe_layer, moe_rows
from experiments.benchmarks.timing import Timing
from pallas_kernels import BACKENDS, moe_mlp, native

TINY = moe_rows.Sizes(
    width=16,
    hidden=32,
    rows=(64,),
    choices=(2, 4),
    experts=(4,),
    skewed_experts=(4,),
    einsum_experts=(4,),
    ragged_dot_experts=(4,),
    linear_tokens=(16, 32, 64),
    linear_experts=(4,),
    train_step_experts=(),
    stream_bytes=2**20,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run at tiny sizes, as JSON gives it back; without the compiled backend, whoever has built it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.DIRECTORY_VARIABLE, str(tmp_path_factory.mktemp("nothing")))
        return json.loads(json.dumps(moe.run(rounds=1, sizes=TINY)))


def choices(routing, tokens=2048, experts=32, k=2):
    """Chosen experts of random tokens."""
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (tokens, 16))
    router = 0.02 * jax.random.normal(keys[1], (16, experts))
    bias = moe_layer.routing_bias(routing, keys[2], tokens, experts)
    return np.asarray(moe_layer.route(router, x, bias, k)[0])


def test_the_result_has_a_row_for_every_contender(result):
    assert set(result) == {"machine", "rows", "one_hot_rows", "train_step", "linear_in_tokens"}
    assert {row["contender"] for row in result["rows"]} <= set(BACKENDS)
    rows = result["rows"] + result["one_hot_rows"]
    cases = {(row["T"] * row["K"], row["K"], row["E"], row["routing"], row["contender"]) for row in rows}
    contenders = "cpu", "capacity_einsum", "capacity_einsum_ungrouped"
    expected = {(64, k, 4, "balanced", contender) for k in (2, 4) for contender in contenders}
    expected |= {(64, 2, 4, routing, "cpu") for routing in ("zipf", "hot")}
    assert cases == expected | {(64, 2, 4, "balanced", "ragged_dot")}
    assert len(cases) == len(rows)
    assert [row["T"] for row in result["linear_in_tokens"]] == [16, 32, 64]
    assert result["linear_in_tokens"][1]["ratio_to_middle"] == 1.0


def test_ratios_are_of_the_milliseconds_beside_them(result):
    for row in result["rows"] + result["one_hot_rows"]:
        assert (row["D"], row["F"]) == (16, 32)
        for name in ("dense", "roofline"):
            ratio = row["milliseconds"] / row[f"{name}_milliseconds"]
            assert row[f"ratio_to_{name}"] == pytest.approx(ratio, rel=0.05, abs=1e-3)
        assert row["ratio_to_roofline"] <= row["ratio_to_dense"]
        assert row["tokens_per_second"] == pytest.approx(1000 * row["T"] / row["milliseconds"], rel=0.05)
    middle = result["linear_in_tokens"][1]["milliseconds_per_token"]
    traffic = {row["weight_traffic_milliseconds"] for row in result["linear_in_tokens"]}
    assert len(traffic) == 1  # every T touches all experts
    for row in result["linear_in_tokens"]:
        assert row["ratio_to_middle"] == pytest.approx(row["milliseconds_per_token"] / middle, rel=0.05, abs=1e-3)


def test_the_roofline_counts_touched_weights_three_times():
    """100 experts of 3·16·32 float32 at 1 GB/s, far above the dense time."""
    case = (moe_layer.Shape(32, 16, 32, 128, 2), "balanced", "cpu")
    row = moe_rows._row(case, Timing(0.01, 0.01, 0.01), 1e-6, 100, 1e9)
    assert row["roofline_milliseconds"] == pytest.approx(3 * 100 * 3 * 16 * 32 * 4 / 1e9 * 1000, abs=1e-3)
    assert moe_rows._row(case, Timing(0.01, 0.01, 0.01), 1.0, 100, 1e9)["roofline_milliseconds"] == 1000


def test_it_is_described_with_the_targets_beside(result):
    text = moe.describe(result)
    assert "capacity_einsum" in text
    assert "target" not in text  # those are for other sizes
    row = result["rows"][0] | {"T": 2048, "K": 2, "D": 256, "F": 512, "E": 128}
    assert "target 3.0 of dense" in moe.describe(result | {"rows": [row]})


def test_hot_has_one_expert_in_the_choices_of_all_tokens():
    assert (choices("hot") == 0).sum(axis=1).tolist() == [1] * 2048
    assert np.unique(choices("hot")).size == 32


def test_zipf_loads_fall_with_the_rank():
    """By powers of two of the rank, and at the top as rank^-1.2 says."""
    load = np.bincount(choices("zipf", tokens=8192).ravel(), minlength=32)
    means = [part.mean() for part in np.split(load, [1, 2, 4, 8, 16])]
    assert all(more > 1.5 * fewer for more, fewer in itertools.pairwise(means))
    first = np.bincount(choices("zipf", tokens=8192)[:, 0], minlength=32) / 8192
    popularity = np.arange(1, 33) ** -1.2
    np.testing.assert_allclose(first[:4], (popularity / popularity.sum())[:4], atol=0.03)


def test_balanced_loads_are_near_the_mean():
    load = np.bincount(choices("balanced").ravel(), minlength=32)
    assert load.max() < 2 * load.mean()


@pytest.mark.parametrize(("capacity_factor", "group"), [(4.0, 64), (4.0, 16), (4.0, None), (0.5, 64)])
def test_capacity_einsum_is_moe_mlp_with_its_capacity(capacity_factor, group):
    """E / K = 4 leaves room for every token; one group drops what `make_plan` drops."""
    tokens, width, hidden, experts, k = 64, 8, 16, 8, 2
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens, width))
    router = jax.random.normal(keys[1], (width, experts))
    w_gate_up = jax.random.normal(keys[2], (experts, width, 2 * hidden))
    w_down = jax.random.normal(keys[3], (experts, hidden, width))
    cotangent = jax.random.normal(keys[4], x.shape)
    expert_index, gate = moe_layer.route(router, x, jnp.zeros((1, experts)), k)

    def values(mlp):
        y, pull_back = jax.vjp(lambda x, gate, *w: mlp(x, expert_index, gate, *w), x, gate, w_gate_up, w_down)
        return y, *pull_back(cotangent)

    capacity = None if capacity_factor == 4.0 else 8
    einsum = functools.partial(moe_layer.capacity_einsum, capacity_factor=capacity_factor, group=group)
    for ours, theirs in zip(values(einsum), values(functools.partial(moe_mlp, capacity=capacity, backend="reference"))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_step_writes_over_the_donated_outputs():
    """The same memory from step to step, so that no page is fresh."""
    shape = moe_layer.Shape(16, 8, 16, 4, 2)
    call, touched = moe_layer.moe_call(shape, "balanced", "cpu", moe_layer.weights_of(shape, jnp.float32))
    assert touched == 4

    def places():
        outputs = call.__closure__[call.__code__.co_freevars.index("outputs")].cell_contents
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(outputs)]

    call()
    before = places()
    call()
    assert places() == before


def test_the_device_rows_have_no_utilization_on_an_unknown_device():
    rows = moe_device.device_rows((moe_layer.Shape(16, 8, 16, 4, 2),), rounds=1, steps_per_call=1)
    assert [row["contender"] for row in rows] == ["dense", "cpu"]
    assert all(row["utilization"] is None and "no bfloat16 peak is known" in row["note"] for row in rows)
    assert "utilization unknown" in moe.describe({"machine": {}, "device": rows})


def test_the_device_rows_are_against_the_peak_of_a_known_device(monkeypatch):
    monkeypatch.setitem(moe_device.PEAK_TERAFLOPS, jax.devices()[0].device_kind, 0.5)
    for row in moe_device.device_rows((moe_layer.Shape(64, 32, 64, 4, 2),), rounds=1, steps_per_call=1):
        assert row["utilization"] == pytest.approx(row["model_teraflops_per_second"] / 0.5, abs=2e-3)
        assert row["note"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe", "--device"], "JAX finds only the CPU here"),
        (["train_step", "--device"], "--device is of the benchmark moe"),
        (["mo"], "no benchmark 'mo'. Did you mean 'moe'?"),
    ],
)
def test_a_mistake_is_a_message_and_status_2(arguments, message):
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
