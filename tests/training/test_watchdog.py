"""The watchdog: a process in which nothing moves is ended and says where it stood; one that moves is left alone."""

import json
import subprocess
import sys
import threading

import pytest

from jaxmoe.config import to_dict
from jaxmoe.liveness import beat
from jaxmoe.training import watchdog
from jaxmoe.training.watchdog import PATIENCE, Watchdog, _Others

_HUNG = """
import json, sys, time
sys.modules["tensorboardX"] = None
import jax
from jaxmoe.config import RunConfig, from_dict
from jaxmoe.training import ProgressReporter, train, watchdog

watchdog.PATIENCE = 30  # so that a slow machine has the time to compile the step

def hangs_like_a_device(array):
    while True:
        time.sleep(1)

class HangingAtStep10(ProgressReporter):
    def advance(self, step, *args):
        if step == 10:
            stuck = jax.jit(lambda x: jax.pure_callback(hangs_like_a_device, jax.ShapeDtypeStruct((), "float32"), x))
            jax.block_until_ready(stuck(1.0))

train(from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2], progress=HangingAtStep10())
"""


def test_a_hung_run_says_where_it_stood_and_exits_resumable(tiny_run, replace_train, tmp_path):
    """The main thread waits for a computation that never ends."""
    run = replace_train(tiny_run, watchdog_minutes=6 / 60)
    done = subprocess.run(
        [sys.executable, "-c", _HUNG, json.dumps(to_dict(run)), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    report = (tmp_path / "watchdog-0.txt").read_text()
    assert report.strip() in done.stderr
    assert "nothing has moved for 0.1" in report
    assert "(after step 10)" in report
    assert "in advance" in report
    assert "in hangs_like_a_device" in report
    assert (tmp_path / "checkpoints" / "6").is_dir()


@pytest.fixture
def ended(monkeypatch):
    """Set where the process would be ended."""
    event = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self, quiet: (event.set(), self._closed.set()))
    return event


class Clock(threading.Event):
    """Stands for the event that the watchdog's thread sleeps on: lets the test count its looks."""

    def __init__(self, looks, act):
        super().__init__()
        self.looks, self.left, self.act = looks, looks, act

    def wait(self, timeout=None):
        self.act(self.looks - self.left)
        self.left -= 1
        return self.left < 0 or self.is_set()


def looks(directory, count, act, *, seconds=60.0):
    """Runs the watchdog's loop for `count` looks a second apart; `act(n)` is called before each."""
    dog = Watchdog(directory, seconds / 60)
    dog._closed = Clock(count, lambda number: act(dog, number))
    dog._watch(seconds)


def test_steps_within_the_limit_keep_it_quiet(tmp_path, ended):
    looks(tmp_path, 300, lambda dog, number: dog.step(number) if number % 50 == 0 else None)
    assert not ended.is_set()


def test_a_missing_step_ends_the_process(tmp_path, ended):
    last = []
    looks(tmp_path, 300, lambda dog, number: (dog.step(1) if number == 10 else None, last.append(number)))
    assert ended.is_set()
    assert last[-1] == pytest.approx(10 + 60, abs=3)


def test_starting_evaluating_and_saving_may_take_longer(tmp_path, ended):
    looks(tmp_path, 60 * PATIENCE - 3, lambda dog, number: None)
    assert not ended.is_set(), "before the first step"

    def evaluate(dog, number):
        if number == 0:
            dog.step(1)
            scope = dog.patient("evaluating")
            scope.__enter__()
            dog.leave = scope
        if number == 170:
            dog.leave.__exit__(None, None, None)

    looks(tmp_path, 225, evaluate)
    assert not ended.is_set()
    looks(tmp_path, 240, evaluate)
    assert ended.is_set(), "60 looks after the evaluation, the limit is that of a step again"


def test_what_moves_within_moves_for_every_watchdog_around(tmp_path):
    beat()  # without one, nothing happens
    with Watchdog(tmp_path, None) as outer:
        with Watchdog(tmp_path, None) as inner:
            before = inner._last_beat, outer._last_beat
            beat()
            assert inner._last_beat is not before[0]
            assert outer._last_beat is not before[1]
        before = inner._last_beat, outer._last_beat
        beat()
        assert inner._last_beat is before[0]
        assert outer._last_beat is not before[1]
    assert not list(tmp_path.iterdir())


def test_what_moves_in_another_process_is_told_from_what_moves_in_this_one(monkeypatch):
    """Two processes that count together, of which neither takes its own beats, or the other's wait, for movement."""
    count = [0]

    def counted(key, more):
        count[0] += more
        return count[0]

    monkeypatch.setattr(watchdog, "counted", counted)
    one, other = _Others(10.0), _Others(10.0)
    first, second = object(), object()
    one.moved(first, 10.0), other.moved(second, 10.0)
    assert not one.moved(first, 5.0), "it is not asked yet"
    assert one.moved(first, 5.0), "the other's first beat"
    for _ in range(3):
        assert not one.moved(first, 10.0)
        assert not other.moved(second, 10.0)
    assert not other.moved(object(), 10.0), "its own"
    assert one.moved(first, 10.0)
    assert not one.moved(first, 10.0)


_HUNG_PREPARATION = """
import json, sys, time
from jaxmoe.config import RunConfig, from_dict
from jaxmoe.scaling import Member, Study, runner

def preflight(*args, **kwargs):
    while True:
        time.sleep(1)

runner.preflight = preflight
run = from_dict(RunConfig, json.loads(sys.argv[1]))
member = Member(name="E4", arm="E4", slices=("main",), seed=0, config=run)
runner.run_study(Study(name="hangs", title="Hangs", members=(member,)), sys.argv[2])
"""


def test_a_study_whose_preparation_hangs_is_ended(tiny_run, replace_train, tmp_path):
    run = replace_train(tiny_run, watchdog_minutes=1 / 60)
    done = subprocess.run(
        [sys.executable, "-c", _HUNG_PREPARATION, json.dumps(to_dict(run)), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    report = (tmp_path / "watchdog-0.txt").read_text()
    assert "(starting)" in report
    assert "in preflight" in report
