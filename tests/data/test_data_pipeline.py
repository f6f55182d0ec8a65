"""The Grain iterator: any start, resumable, a fixed number of threads."""

import threading

import numpy as np
import pytest

from jaxmoe.config import DataConfig, KnowledgeSource
from jaxmoe.data import Mixture
from jaxmoe.data.pipeline import PREFETCH_THREADS


def mixture_of(count, steps=30):
    sources = {f"s{i}": KnowledgeSource(entities=5, test_entities=1, attributes=1) for i in range(count)}
    return Mixture(
        DataConfig(tokenizer="symbols", sources=sources), batch_size=2 * count, sequence_length=4, steps=steps, seed=0
    )


@pytest.fixture(scope="module")
def mixture():
    return mixture_of(3)


def assert_equal(a, b):
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("start", [0, 1, 17, 29, 30])
def test_an_iterator_starts_at_any_step(mixture, start):
    iterator = mixture.iterator(start)
    batches = list(iterator)
    iterator.close()
    assert len(batches) == 30 - start
    for step, batch in enumerate(batches, start=start):
        assert_equal(batch, mixture.batch(step))


def test_its_state_is_the_next_step_and_can_be_set(mixture):
    iterator = mixture.iterator(4)
    assert iterator.get_state() == {"next_index": 4}
    next(iterator)
    next(iterator)
    assert iterator.get_state() == {"next_index": 6}
    resumed = mixture.iterator()
    resumed.set_state(iterator.get_state())
    assert_equal(next(resumed), next(iterator))
    iterator.set_state({"next_index": 2})
    assert_equal(next(iterator), mixture.batch(2))
    iterator.close()
    resumed.close()


def test_batches_made_together_are_those_made_one_by_one(mixture):
    for step, batch in enumerate(mixture.batches(7, 5), start=7):
        assert_equal(batch, mixture.batch(step))


@pytest.mark.parametrize("start", [-1, 31])
def test_a_step_outside_the_run_is_an_error(mixture, start):
    with pytest.raises(ValueError, match=rf"start_step={start}; the run has steps 0..29"):
        mixture.iterator(start)


@pytest.mark.parametrize("sources", [1, 40])
def test_threads_do_not_grow_with_the_sources(sources):
    before = set(threading.enumerate())
    iterator = mixture_of(sources).iterator()
    for _ in range(8):
        next(iterator)
    started = set(threading.enumerate()) - before
    assert len(started) == PREFETCH_THREADS
    iterator.close()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_errors_reach_the_reader(mixture, monkeypatch):
    def broken(first_step, count):
        raise OSError("the disk is gone")

    monkeypatch.setattr(mixture, "batches", broken)
    iterator = mixture.iterator()
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    iterator.close()
