"""Learning rates against their closed forms."""

import jax
import numpy as np
import pytest

from jaxmoe.config import TrainConfig
from jaxmoe.training import learning_rate_schedule

PEAK, WARMUP, STEPS, FRACTION = 3e-3, 10, 110, 0.1


def rates(**changes) -> np.ndarray:
    """The rate of updates 0..STEPS."""
    values = {
        "learning_rate": PEAK, "warmup_steps": WARMUP, "steps": STEPS, "final_learning_rate_fraction": FRACTION,
        "batch_size": 1, "sequence_length": 1,
    } | changes  # fmt: skip
    schedule = jax.jit(jax.vmap(learning_rate_schedule(TrainConfig(**values))))
    return np.asarray(schedule(np.arange(values["steps"] + 1)))


def test_warmup_cosine():
    update = np.arange(STEPS + 1)
    progress = (update - WARMUP) / (STEPS - WARMUP)
    cosine = PEAK * (FRACTION + (1 - FRACTION) * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(rates(), np.where(update < WARMUP, PEAK * update / WARMUP, cosine), rtol=2e-6)


def test_warmup_stable_decay():
    update = np.arange(STEPS + 1)
    decay_start = STEPS - 22
    line = PEAK * (1 - (1 - FRACTION) * (update - decay_start) / 22)
    expected = np.where(update < WARMUP, PEAK * update / WARMUP, np.where(update < decay_start, PEAK, line))
    np.testing.assert_allclose(rates(schedule="warmup_stable_decay", decay_fraction=0.2), expected, rtol=2e-6)


def test_decay_never_begins_before_the_warmup_ends():
    got = rates(schedule="warmup_stable_decay", decay_fraction=1.0)
    update = np.arange(WARMUP, STEPS + 1)
    np.testing.assert_allclose(got[WARMUP:], PEAK * (1 - 0.9 * (update - WARMUP) / (STEPS - WARMUP)), rtol=2e-6)


def test_constant():
    update = np.arange(STEPS + 1)
    np.testing.assert_allclose(rates(schedule="constant"), PEAK * np.minimum(update / WARMUP, 1), rtol=2e-6)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_stable_decay"])
def test_ends_of_a_run(schedule):
    """Zero before the first update, the peak at the end of warm-up, the final fraction at the last update."""
    got = rates(schedule=schedule)
    np.testing.assert_allclose(got[[0, WARMUP, STEPS]], [0, PEAK, PEAK * FRACTION], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_stable_decay", "constant"])
def test_without_warmup_the_first_update_is_near_the_peak(schedule):
    assert rates(schedule=schedule, warmup_steps=0)[1] == pytest.approx(PEAK, rel=1e-3)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_stable_decay"])
def test_nothing_but_warmup(schedule):
    np.testing.assert_allclose(
        rates(schedule=schedule, warmup_steps=5, steps=5)[:5], PEAK * np.arange(5) / 5, rtol=1e-6
    )
