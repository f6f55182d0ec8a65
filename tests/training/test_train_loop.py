"""A whole run: its logs, its evaluations, how it stops and how it goes on."""

import dataclasses
import io
import json
import logging
import os
import re
import signal

import numpy as np
import pytest

from jaxmoe.config import ConfigError, TextSource, config_hash
from jaxmoe.data import DataError, Mixture, content_changes
from jaxmoe.exclusive import LOCK_FILE, exclusive
from jaxmoe.training import (
    CheckpointError,
    NonFiniteLossError,
    Resumed,
    averaging_window,
    make_train_step,
    train,
)
from jaxmoe.training.progress import ProgressReporter
from jaxmoe.training.workdir import check_directory, claim_directory


@dataclasses.dataclass
class Seen:
    """What an evaluator saw, kept as plain values."""

    step: int
    training_loss: float
    source_losses: dict
    expert_load: np.ndarray
    output_norm: float


class Evaluator:
    """Writes down each call; optionally does something at a step."""

    def __init__(self, at: int | None = None, action=None):
        self.seen, self._at, self._action = [], at, action

    def __call__(self, context):
        norm = float(np.linalg.norm(context.model().output[...]))
        self.seen.append(
            Seen(context.step, context.training_loss, context.source_losses, np.array(context.expert_load), norm)
        )
        if context.step == self._at:
            self._action()


def log_of(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    """A run from beginning to end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    evaluator = Evaluator()
    result = train(tiny_run, directory, on_evaluate=evaluator)
    return directory, result, evaluator.seen


def test_logs_every_second_step(undisturbed):
    directory, result, _ = undisturbed
    log = log_of(directory)
    assert [line["step"] for line in log] == list(range(2, 25, 2))
    assert (result.status, result.step, result.loss) == ("done", 24, log[-1]["loss"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[1]["learning_rate"] == pytest.approx(1e-2)  # the end of warm-up
    assert log[-1]["learning_rate"] == pytest.approx(1e-3)
    assert [line["skipped"] for line in log] == [0] * 12
    assert list(log[0]) == [
        "step", "loss", "load_balance", "router_z", "total_loss", "grad_norm", "param_norm", "learning_rate",
        "dropped_fraction", "overflow_fraction", "load_max_over_mean", "load_cv", "loss/knowledge", "loss/reasoning",
        "dead_experts", "tokens", "skipped",
    ]  # fmt: skip


def test_what_the_run_directory_holds(undisturbed, tiny_run):
    directory = undisturbed[0]
    assert {path.name for path in directory.iterdir()} >= {
        "checkpoints", "config.json", "metrics.jsonl", "tensorboard", "throughput.jsonl",
    }  # fmt: skip
    assert sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.is_dir()) == [18, 24]
    about = json.loads((directory / "checkpoints" / "24" / "metadata" / "metadata").read_text())
    contents = about["data"].pop("contents")
    assert about["data"] == {"iterator": {"next_index": 24}, "step": 24, "rows": 192}
    assert contents == Mixture.of_run(tiny_run).contents()
    assert contents["sources"]["reasoning"]["train_clean"]["rows"] == 40
    assert about["evaluated"] is True
    assert sum(source["rows"] for source in about["sources"].values()) == 192
    for line in (directory / "throughput.jsonl").read_text().splitlines():
        speed = json.loads(line)
        assert 0 < speed["tokens_per_second"] < speed["positions_per_second"]
        assert speed["model_flops_per_second"] > speed["tokens_per_second"]


def test_evaluations_see_the_mean_of_the_last_steps(undisturbed, tiny_run):
    """The window is one step here, so the loss is that step's; the load is a distribution over experts."""
    directory, _, seen = undisturbed
    assert averaging_window(tiny_run.train, 3) == 1
    losses = {line["step"]: line for line in log_of(directory)}
    assert [call.step for call in seen] == [8, 16, 24]
    for call in seen:
        line = losses[call.step]
        assert call.training_loss == pytest.approx(line["loss"], rel=1e-5)
        assert call.source_losses["knowledge"] == pytest.approx(line["loss/knowledge"], rel=1e-5)
        np.testing.assert_allclose(call.expert_load.sum(axis=1), [1, 1], rtol=1e-5)
        assert 4 * call.expert_load.max(axis=1).mean() == pytest.approx(line["load_max_over_mean"], rel=1e-5)


@pytest.mark.parametrize(("steps", "points", "window"), [(1200, 5, 24), (100_000, 5, 100), (30, 30, 1), (600, 200, 3)])
def test_averaging_window(tiny_run, replace_train, steps, points, window):
    assert averaging_window(replace_train(tiny_run, steps=steps).train, points) == window


def test_a_finished_run_is_left_as_it_is(undisturbed, tiny_run):
    directory, result, _ = undisturbed
    before = (directory / "metrics.jsonl").read_bytes()
    evaluator = Evaluator()
    assert train(tiny_run, directory, on_evaluate=evaluator) == result
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert evaluator.seen == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_to_the_same_end(undisturbed, tiny_run, tmp_path, number):
    """Sent while step 16 is evaluated: a checkpoint of that step, then the same bytes as undisturbed."""
    handler = signal.getsignal(number)
    evaluator = Evaluator(16, lambda: os.kill(os.getpid(), number))
    result = train(tiny_run, tmp_path, on_evaluate=evaluator)
    assert (result.status, result.step) == ("resumable", 16)
    assert signal.getsignal(number) is handler
    assert [line["step"] for line in log_of(tmp_path)] == list(range(2, 17, 2))
    assert train(tiny_run, tmp_path, on_evaluate=evaluator) == undisturbed[1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()
    assert [dataclasses.astuple(call)[:3] for call in evaluator.seen] == [
        dataclasses.astuple(call)[:3] for call in undisturbed[2]
    ]
    assert evaluator.seen[-1].output_norm == undisturbed[2][-1].output_norm


class SignalAtStep(ProgressReporter):
    """Sends a signal when a step is reported."""

    def __init__(self, step: int):
        super().__init__(io.StringIO())
        self._step = step

    def advance(self, step, *args):
        if step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_evaluation_put_off_by_a_signal_is_made_up_for(undisturbed, tiny_run, tmp_path):
    """Step 14 is looked at when step 16 has begun, which is then saved without its evaluation."""
    evaluator = Evaluator()
    result = train(tiny_run, tmp_path, on_evaluate=evaluator, progress=SignalAtStep(14))
    assert (result.status, result.step) == ("resumable", 16)
    assert [call.step for call in evaluator.seen] == [8]
    train(tiny_run, tmp_path, on_evaluate=evaluator)
    assert [call.step for call in evaluator.seen] == [8, 16, 24]
    assert evaluator.seen[1].training_loss == undisturbed[2][1].training_loss
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_an_evaluation_ended_by_a_signal_is_made_up_for(undisturbed, tiny_run, tmp_path):
    """The checkpoint is saved at once, and says that the evaluation is still to be done."""
    finished, disturb = [], [16]

    def slow(context):
        if context.step in disturb:
            disturb.clear()
            os.kill(os.getpid(), signal.SIGTERM)
            context.check_stop()
        finished.append(context.step)

    assert train(tiny_run, tmp_path, on_evaluate=slow).status == "resumable"
    assert finished == [8]
    assert (tmp_path / "checkpoints" / "16").is_dir()
    assert train(tiny_run, tmp_path, on_evaluate=slow).status == "done"
    assert finished == [8, 16, 24]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_pressing_ctrl_c_twice_leaves_at_once(tiny_run, tmp_path):
    def impatient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_run, tmp_path, on_evaluate=Evaluator(8, impatient))


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of the given 0-based steps infinite."""

    def apply(steps):
        original = Mixture.batches

        def batches(self, first_step, count):
            made = original(self, first_step, count)
            for step in steps & set(range(first_step, first_step + count)):
                made[step - first_step]["loss_weights"] = np.full((8, 16), np.inf, np.float32)
            return made

        monkeypatch.setattr(Mixture, "batches", batches)

    return apply


def test_a_few_non_finite_steps_are_skipped_and_counted(tiny_run, tmp_path, poison, caplog):
    poison({8, 9, 13})
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        assert train(tiny_run, tmp_path).status == "done"
    log = {line["step"]: line for line in log_of(tmp_path)}
    assert log[10]["loss"] is None
    assert {step: line["skipped"] for step, line in log.items() if step in (8, 10, 12, 14, 24)} == {
        8: 0, 10: 2, 12: 2, 14: 3, 24: 3,
    }  # fmt: skip
    assert np.isfinite(log[24]["loss"])
    assert set(log) == {*range(2, 25, 2), 9}
    said = r"step (\d+) is skipped: loss nan, gradient norm nan on the batch of global step (\d+)"
    assert re.findall(said, caplog.text) == [("9", "8"), ("10", "9"), ("14", "13")]


@pytest.mark.parametrize(
    ("good", "newest"), [(14, "12 in"), (16, r"18 \(the parameters are those after step 16\) in")], ids=str
)
def test_too_many_non_finite_steps_in_a_row_stop_the_run(tiny_run, tmp_path, poison, good, newest):
    """Three after step `good`; the newest checkpoint is of a step before them, or of one of them, and stays."""
    poison(set(range(good, 24)))
    said = f"3 steps in a row, {good + 1} to {good + 3}. The last good step is {good}. .* is of step {newest}"
    for _ in range(2):  # run again, it fails in the same way
        with pytest.raises(NonFiniteLossError, match=said):
            train(tiny_run, tmp_path)
        assert [line["step"] for line in log_of(tmp_path)][-4:] == list(range(good, good + 4))


def test_directory_of_another_configuration(undisturbed, tiny_run, replace_train):
    """Every difference is shown; the directory stays as it is."""
    directory = undisturbed[0]
    other = dataclasses.replace(replace_train(tiny_run, learning_rate=0.5, steps=30), seed=7)
    before = (directory / "config.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train(other, directory)
    message = str(caught.value)
    for expected in (
        str(directory), "train.learning_rate: 0.01 in the folder, 0.5 now", "train.steps: 24 in the folder, 30 now",
        "seed: 3 in the folder, 7 now", "--resume=force", "another folder",
    ):  # fmt: skip
        assert expected in message
    assert "batch_size" not in message
    assert (directory / "config.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_checkpoint_is_started_anew(
    undisturbed, tiny_run, replace_train, tmp_path, caplog
):
    """With the corrected configuration, and as if nothing had been there; the log says which keys differ."""

    def fail():
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        train(replace_train(tiny_run, log_every=1, checkpoint_every=20), tmp_path, on_evaluate=Evaluator(8, fail))
    assert len(log_of(tmp_path)) == 8
    assert train(tiny_run, tmp_path).status == "done"
    assert "train.log_every: 1 in the folder, 2 now" in caplog.text
    for name in ("config.json", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (undisturbed[0] / name).read_bytes()


def test_a_bucket_is_not_taken_over(tiny_run, replace_train, tmp_path, monkeypatch):
    """It has no lock: another process may be training there."""
    claim_directory(tmp_path, tiny_run)
    check_directory(tmp_path, replace_train(tiny_run, log_every=1))
    monkeypatch.setattr("jaxmoe.training.workdir.is_remote", lambda path: True)
    with pytest.raises(ConfigError, match="belongs to another configuration"):
        check_directory(tmp_path, replace_train(tiny_run, log_every=1))


def test_force_goes_on_with_the_other_configuration(tiny_run, replace_train, tmp_path):
    train(tiny_run, tmp_path)
    longer = replace_train(tiny_run, log_every=3)
    assert train(longer, tmp_path, resume="force").step == 24
    assert json.loads((tmp_path / "config.json").read_text())["train"]["log_every"] == 3
    shorter = replace_train(tiny_run, steps=12)
    with pytest.raises(ConfigError, match=r"train.steps=12, but the newest checkpoint in .* is of step 24"):
        train(shorter, tmp_path, resume="force")


def test_force_cannot_change_what_a_finished_run_was_trained_as(tiny_run, replace_train, tmp_path):
    train(tiny_run, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    other = dataclasses.replace(replace_train(tiny_run, learning_rate=0.5, log_every=5), seed=7)
    with pytest.raises(ConfigError, match="finished run") as caught:
        train(other, tmp_path, resume="force")
    assert "train.learning_rate: 0.01 in the folder, 0.5 now" in str(caught.value)
    assert "seed: 3 in the folder, 7 now" in str(caught.value)
    assert "log_every:" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_leaves_the_configuration(tiny_run, tmp_path):
    """The folder is claimed only once its checkpoint could be read."""
    first = train(tiny_run, tmp_path, on_evaluate=Evaluator(8, lambda: signal.raise_signal(signal.SIGTERM)))
    assert (first.status, first.step) == ("resumable", 8)
    before = (tmp_path / "config.json").read_bytes()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    wider = dataclasses.replace(tiny_run, model=dataclasses.replace(tiny_run.model, width=32))
    with pytest.raises(CheckpointError, match="is of another model"):
        train(wider, tmp_path, resume="force")
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_run_forced_to_another_configuration_says_so_ever_after(tiny_run, replace_train, tmp_path):
    def until(step, run, **kwargs):
        seen = []

        def evaluate(context):
            seen.append((context.step, context.resumed and dataclasses.astuple(context.resumed)))
            if context.step == step:
                signal.raise_signal(signal.SIGTERM)

        train(run, tmp_path, on_evaluate=evaluate, **kwargs)
        return seen

    other = replace_train(tiny_run, weight_decay=0.5, log_every=4)
    assert until(8, tiny_run) == [(8, None)]
    assert until(16, other, resume="force") == [(16, (8, config_hash(tiny_run), None))]
    assert until(24, other) == [(24, (8, config_hash(tiny_run), None))]


def test_a_configuration_that_cannot_be_read(tiny_run, tmp_path):
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json is not .*; restore it, or take another folder"):
            train(tiny_run, tmp_path)


def test_vocabulary_smaller_than_the_tokenizers(tiny_run, tmp_path):
    small = dataclasses.replace(tiny_run, model=dataclasses.replace(tiny_run.model, vocab_size=64))
    with pytest.raises(ConfigError, match=r"model.vocab_size=64 is smaller than the tokenizer's \d+"):
        train(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_step_is_compiled_once(tiny_run, undisturbed):
    """Fresh, resumed and cleared states are alike to the compiler."""
    assert make_train_step(tiny_run.model, tiny_run.train, 2)._cache_size() == 1


@pytest.fixture
def text_run(tiny_run, tmp_path):
    """A run on a file of ten documents, and the file."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(10)))
    sources = {**tiny_run.data.sources, "documents": TextSource(paths=(str(path),), test_fraction=0.0)}
    data = dataclasses.replace(tiny_run.data, tokenizer="bytes", sources=sources)
    data.sources["knowledge"] = dataclasses.replace(data.sources["knowledge"], attributes=3)
    return dataclasses.replace(tiny_run, data=data), path


def stopped_at(step, run, directory, **kwargs):
    """Trains until a signal comes at an evaluation."""
    return train(run, directory, on_evaluate=Evaluator(step, lambda: signal.raise_signal(signal.SIGTERM)), **kwargs)


def test_data_that_changed_under_the_same_configuration_are_noticed(text_run, tmp_path):
    """Refused with what changed, nothing touched; back again it goes on; forced it goes on and says so ever after."""
    run, path = text_run
    directory, original = tmp_path / "run", path.read_text()
    stopped_at(8, run, directory)
    before = Mixture.of_run(run)
    log = (directory / "metrics.jsonl").read_bytes()

    path.write_text(original.replace("number 3", "number x"))
    with pytest.raises(DataError) as caught:
        train(run, directory)
    assert (
        f"{directory}: until step 8 it was trained on other data than there are now:\n"
        "  source 'documents': as many rows and tokens as before, but other ones\n" in str(caught.value)
    )
    assert "--resume=force" in str(caught.value)
    assert (directory / "metrics.jsonl").read_bytes() == log

    path.write_text(original)
    assert stopped_at(16, run, directory).resumed is None

    path.write_text(original + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(DataError, match=r"train had 12 rows \(179 tokens\), and has 12 rows \(188 tokens\) now"):
        train(run, directory)
    result = train(run, directory, resume="force")
    assert (result.status, result.resumed) == ("done", Resumed(16, from_data=before.fingerprint))
    assert result.resumed.fields() == {"resumed_at_step": 16, "resumed_from_data": before.fingerprint}
    assert train(run, directory).resumed == result.resumed

    path.write_text(original)
    with pytest.raises(DataError, match="The run is finished"):
        train(run, directory, resume="force")


def test_data_that_only_moved_are_the_same(text_run, tmp_path):
    """Neither the place of a file nor its time counts, so a run can go on on another machine."""
    run, path = text_run
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    moved.touch()
    source = dataclasses.replace(run.data.sources["documents"], paths=(str(moved),))
    other = dataclasses.replace(
        run, data=dataclasses.replace(run.data, sources={**run.data.sources, "documents": source})
    )
    path.write_bytes(moved.read_bytes())
    assert content_changes(Mixture.of_run(run).contents(), Mixture.of_run(other).contents()) == []


def test_every_difference_of_data_is_listed(tiny_run):
    contents = Mixture.of_run(tiny_run).contents()
    changed = json.loads(json.dumps(contents))
    changed["tokenizer"] = "another"
    changed["sources"]["more"] = changed["sources"].pop("reasoning")
    changed["sources"]["knowledge"] |= {"fingerprint": "another", "train": {"rows": 41, "tokens": 656}}
    assert content_changes(contents, changed) == [
        "the tokenizer is another one",
        "source 'knowledge': train had 40 rows (640 tokens), and has 41 rows (656 tokens) now",
        "source 'reasoning' was there, and is not now",
        "source 'more' was not there",
    ]


def test_a_run_is_not_trained_twice_at_a_time(tiny_run, tmp_path):
    with exclusive(tmp_path), pytest.raises(ConfigError, match="another folder"):
        train(tiny_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE], "nothing is written before the lock is held"
