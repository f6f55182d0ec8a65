"""When a run is saved and which checkpoints stay."""

import json

import pytest

from jaxmoe.config import ConfigError
from jaxmoe.training import Checkpoints, Retention, init_state, train
from jaxmoe.training.policies import SaveSchedule, quality


def steps_of(directory) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_every_so_many_steps_and_minutes(tiny_run, replace_train):
    """Ten seconds a step, saves every 10 steps, and one when two minutes passed without; the last step."""
    now = [0.0]
    train = replace_train(tiny_run, steps=43, checkpoint_every=30, checkpoint_every_minutes=2).train
    schedule, saved = SaveSchedule(train, (), clock=lambda: now[0]), []
    for step in range(1, 44):
        now[0] += 10
        if schedule.due(step):
            saved.append(step)
    assert saved == [12, 24, 30, 42, 43]


@pytest.fixture(scope="module")
def state(tiny_run):
    return init_state(tiny_run)[1]


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(2), [50, 60]),
        (Retention(1, every_steps=20), [20, 40, 60]),
        (Retention(1, best=2), [20, 50, 60]),
        (Retention(2, every_steps=30, best=1), [20, 30, 50, 60]),
        (None, [10, 20, 30, 40, 50, 60]),
    ],
    ids=str,
)
def test_what_any_rule_keeps_stays(state, tmp_path, retention, stay):
    """Also when the run was started again in between, and although some have no quality."""
    qualities = {10: None, 20: 1.0, 30: 3.0, 40: 2.5, 50: 2.0, 60: None}
    for half in ((10, 20, 30), (40, 50, 60)):
        with Checkpoints(tmp_path, retention) as checkpoints:
            for step in half:
                checkpoints.save(step, state, {}, quality=qualities[step])
    assert steps_of(tmp_path) == stay


def test_quality_is_smaller_for_a_better_model(tiny_run, replace_train):
    largest = replace_train(tiny_run, keep_best=1, best_metric="task/sums/test/accuracy", best_mode="max").train
    measured = {"task/sums/test/accuracy": 0.5, "task/sums/test/loss": 2.0}
    assert quality(largest, 3.0, measured) == -0.5
    assert quality(largest, 3.0, {"task/sums/test/accuracy": None}) is None
    assert quality(replace_train(tiny_run, keep_best=1).train, 3.0, None) == 3.0
    assert quality(tiny_run.train, 3.0, None) is None
    with pytest.raises(ConfigError, match="best_metric='task/sums/test/accuracy'. Did you mean 'task/sums/tr"):
        quality(largest, 3.0, {"task/sums/train/accuracy": 1.0})


def test_saves_by_the_clock_change_no_line_and_the_best_evaluation_stays(tiny_run, replace_train, tmp_path):
    """A checkpoint after every step, and of the evaluations after steps 8, 16 and 24 the one called best."""
    values = {8: 1.0, 16: 3.0, 24: 2.0}
    run = replace_train(
        tiny_run, checkpoint_every_minutes=1e-9, keep_checkpoints=1, keep_best=1, best_mode="max",
        best_metric="task/sums/test/accuracy",
    )  # fmt: skip
    train(run, tmp_path / "often", on_evaluate=lambda context: {"task/sums/test/accuracy": values[context.step]})
    assert steps_of(tmp_path / "often" / "checkpoints") == [16, 24]
    about = json.loads((tmp_path / "often" / "checkpoints" / "16" / "metrics" / "metrics").read_text())
    assert about == {"quality": -3.0}
    train(tiny_run, tmp_path / "plain")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("often", "plain")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_every_minutes": 0.0}, "checkpoint_every_minutes=0.0; it must be positive"),
        ({"keep_every": 10}, "keep_every=10, but checkpoints are written every 6 steps; choose a multiple"),
        ({"keep_best": -1}, "keep_best=-1; it must not be negative"),
        ({"best_metric": "accuracy"}, "best_metric='accuracy'; choose 'training_loss' or EVALUATION/SOURCE/SPLIT"),
        ({"best_mode": "least"}, "best_mode='least'; choose one of 'min', 'max'"),
        ({"checkpoint_chunk_bytes": 10}, "checkpoint_chunk_bytes=10; choose 1024 or more"),
        ({"max_missed_saves": -1}, "max_missed_saves=-1; it must not be negative"),
        ({"storage_patience_seconds": 0.0}, "storage_patience_seconds=0.0; it must be positive"),
    ],
)
def test_policies_that_cannot_be(tiny_run, replace_train, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace_train(tiny_run, **changes)
