"""One step: the loss it reports, what it does not depend on, and what it refuses to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.layers import auxiliary_losses
from jaxmoe.training import init_state, make_train_step
from jaxmoe.training.state import initial_state
from jaxmoe.training.step import accumulated_sums, batch_sums


@pytest.fixture(scope="module")
def forward(tiny_run):
    """Sums over a batch as a function of the parameters, compiled by the caller."""
    graph, state = init_state(tiny_run)
    return lambda params, batch: batch_sums(nnx.merge(graph, params, state.others), batch, 2)


@pytest.fixture(scope="module")
def first_step(tiny_run, tiny_batches, copied):
    """State before, state after and metrics of the first step."""
    _, state = init_state(tiny_run)
    before = copied(state)
    after, metrics = make_train_step(tiny_run.model, tiny_run.train, 2)(state, tiny_batches[0])
    return before, copied(after), jax.device_get(metrics)


def test_losses_against_a_plain_computation(tiny_run, tiny_batches, first_step):
    """`loss` is the weighted mean without auxiliary losses; a source's loss is that over its own rows."""
    graph, state = init_state(tiny_run)
    batch, metrics = tiny_batches[0], first_step[2]
    output = nnx.merge(graph, state.params, state.others)(batch["inputs"], segment_ids=batch["segment_ids"])
    logits = np.asarray(output.logits, np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"]
    assert metrics["loss"] == pytest.approx((weights * nll).sum() / weights.sum(), rel=1e-5)
    for source in range(2):
        rows = batch["source"] == source
        expected = (weights * nll)[rows].sum() / weights[rows].sum()
        assert metrics["source_loss"][source] == pytest.approx(expected, rel=1e-5)
    auxiliary = auxiliary_losses(output.router, tiny_run.model.moe)
    assert metrics["load_balance"] == pytest.approx(float(auxiliary["load_balance"]), rel=1e-5)
    assert metrics["router_z"] == pytest.approx(float(auxiliary["router_z"]), rel=1e-5)
    total = metrics["loss"] + 1e-2 * metrics["load_balance"] + 1e-3 * metrics["router_z"]
    assert metrics["total_loss"] == pytest.approx(total, rel=1e-6)
    assert metrics["tokens"] == np.count_nonzero(batch["segment_ids"])
    assert metrics["learning_rate"] == pytest.approx(1e-2 / 4)


def test_first_update_moves_what_was_read_by_about_the_learning_rate(first_step, tiny_batches):
    """Adam's first update is the sign of the gradient times the rate; embeddings not in the batch only decay."""
    inputs = tiny_batches[0]["inputs"][tiny_batches[0]["segment_ids"] != 0]
    before, after, metrics = first_step
    table = before.params["embedding"]["table"][...]
    moved = np.abs(after.params["embedding"]["table"][...] - table)
    seen = moved.max(axis=1) > 1e-3
    read = np.zeros(len(table), bool)
    read[inputs] = True
    np.testing.assert_array_equal(seen, read)
    np.testing.assert_allclose(np.median(moved[seen]), metrics["learning_rate"], rtol=2e-2)
    assert int(after.step) == 1


def test_source_absent_from_the_batch_has_no_loss(tiny_run, tiny_batches):
    batch = dict(tiny_batches[0])
    rows = np.flatnonzero(batch["source"] == 0)
    batch = {key: values[np.resize(rows, len(values))] for key, values in batch.items()}
    _, metrics = make_train_step(tiny_run.model, tiny_run.train, 2)(init_state(tiny_run)[1], batch)
    assert np.isnan(metrics["source_loss"][1])
    assert metrics["source_loss"][0] == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_numbers_do_not_depend_on_gradient_accumulation(tiny_run, tiny_batches, forward):
    """Loss, auxiliary losses and gradient of 1, 2 and 4 micro-batches; the coefficients are raised to be seen."""
    params = init_state(tiny_run)[1].params

    def objective(params, micro_batches):
        sums = accumulated_sums(forward, params, tiny_batches[0], micro_batches)
        auxiliary = auxiliary_losses(sums.router, tiny_run.model.moe)
        loss = sums.nll / sums.source_weight.sum()
        return loss + auxiliary["load_balance"] + auxiliary["router_z"], (loss, auxiliary, sums)

    quick = {"xla_backend_optimization_level": 0}
    differentiate = jax.jit(jax.grad(objective, has_aux=True), static_argnums=1, compiler_options=quick)
    gradient, numbers = differentiate(params, 1)
    for micro_batches in (2, 4):
        other_gradient, other_numbers = differentiate(params, micro_batches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), numbers, other_numbers)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max()),
            gradient, other_gradient,
        )  # fmt: skip


def test_only_accumulation_recomputes(tiny_run, tiny_batches, forward):
    """One micro-batch pays for no second forward pass."""
    params = init_state(tiny_run)[1].params

    def program(micro_batches: int) -> str:
        return str(jax.make_jaxpr(lambda p: accumulated_sums(forward, p, tiny_batches[0], micro_batches))(params))

    assert "remat" not in program(1)
    assert "remat" in program(2)


def test_non_finite_step_changes_nothing_but_the_counters(tiny_run, tiny_batches, copied):
    step = make_train_step(tiny_run.model, tiny_run.train, 2)
    state, _ = step(init_state(tiny_run)[1], tiny_batches[0])
    before = copied(state)
    poisoned = dict(tiny_batches[1], loss_weights=np.full_like(tiny_batches[1]["loss_weights"], np.inf))
    for expected in (1, 2):
        state, metrics = step(state, poisoned)
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == expected
    after = copied(state)
    counters = {"step": before.step, "skipped": before.skipped, "skipped_in_a_row": before.skipped_in_a_row}
    jax.tree.map(np.testing.assert_array_equal, before, dataclasses.replace(after, **counters))
    assert int(after.step) == 3
    state, metrics = step(state, tiny_batches[2])
    assert int(metrics["skipped"]) == 2
    assert int(metrics["skipped_in_a_row"]) == 0
    assert np.isfinite(metrics["loss"])


def test_a_gradient_that_overflows_beside_a_finite_loss_changes_nothing(tiny_run, tiny_batches, copied):
    """The head is zero, so that every token is as likely; its gradient is that of huge inputs."""
    _, state = init_state(tiny_run)
    state.params["output"][...] = jnp.zeros_like(state.params["output"][...])
    state.params["final_norm"]["scale"][...] = jnp.full_like(state.params["final_norm"]["scale"][...], 1e37)
    before = copied(state)
    after, metrics = make_train_step(tiny_run.model, tiny_run.train, 2)(state, tiny_batches[0])
    assert metrics["loss"] == pytest.approx(np.log(tiny_run.model.vocab_size), rel=1e-5)
    assert np.isinf(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before.params, copied(after).params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, copied(after).opt_state)


def test_recent_sums_add_up_over_steps(tiny_run, tiny_batches):
    """Their ratio is the mean loss over the tokens of those steps, and the load counts every assignment."""
    step = make_train_step(tiny_run.model, tiny_run.train, 2)
    _, state = init_state(tiny_run)
    nll, weight, tokens = 0.0, 0.0, 0
    for batch in tiny_batches[:3]:
        state, metrics = step(state, batch)
        weight += batch["loss_weights"].sum()
        nll += float(metrics["loss"]) * batch["loss_weights"].sum()
        tokens += np.count_nonzero(batch["segment_ids"])
    assert float(state.recent.source_nll.sum() / state.recent.source_weight.sum()) == pytest.approx(nll / weight)
    np.testing.assert_array_equal(state.recent.expert_count.sum(axis=1), [2 * tokens, 2 * tokens])


def test_step_donates_its_state(tiny_run, tiny_batches):
    _, state = init_state(tiny_run)
    make_train_step(tiny_run.model, tiny_run.train, 2)(state, tiny_batches[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_runs_that_differ_in_bookkeeping_share_the_compiled_step(tiny_run, replace_train):
    other = replace_train(tiny_run, log_every=7, checkpoint_every=5, keep_checkpoints=9, max_nonfinite_steps=1)
    assert make_train_step(tiny_run.model, tiny_run.train, 2) is make_train_step(other.model, other.train, 2)
    changed = replace_train(tiny_run, weight_decay=0.0)
    assert make_train_step(tiny_run.model, tiny_run.train, 2) is not make_train_step(changed.model, changed.train, 2)


def test_seed_decides_the_parameters(tiny_run, copied):
    same, again = copied(init_state(tiny_run)[1]), copied(init_state(tiny_run)[1])
    jax.tree.map(np.testing.assert_array_equal, same, again)
    other = init_state(dataclasses.replace(tiny_run, seed=4))[1]
    assert not np.array_equal(other.params["output"][...], same.params["output"][...])


def test_dense_model_has_no_routing_metrics(tiny_run, tiny_batches):
    dense = dataclasses.replace(
        tiny_run, model=ModelConfig(vocab_size=288, width=8, num_layers=1, num_heads=2, dense_hidden=16)
    )
    state = jax.eval_shape(lambda: initial_state(dense.model, dense.train, 2, jax.random.key(0)))
    state, metrics = jax.eval_shape(make_train_step(dense.model, dense.train, 2), state, tiny_batches[0])
    assert not {"load_balance", "router_z", "dead_experts", "dropped_fraction"} & set(metrics)
    assert state.recent.expert_count is None
