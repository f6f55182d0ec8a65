"""What two processes agree on: run by `test_two_processes.py` in two, with a device each."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxmoe.config import ConfigError, GRPOConfig, QuestionAnswerSource
from jaxmoe.post_training import GRPO, grpo
from jaxmoe.processes import connect, is_first, together
from jaxmoe.sharding import partitioning_of_run
from jaxmoe.training import StopRequest, checkpoints, damage, train
from jaxmoe.training.checkpoints import Checkpoints
from jaxmoe.training.damage import DamageError, finding
from jaxmoe.training.errors import CheckpointError
from jaxmoe.training.start import write_start
from jaxmoe.training.state import abstract_state, init_state
from jaxmoe.training.watchdog import _Others

connect()


@pytest.fixture(scope="session")
def shared_path():
    """A folder of both processes."""
    return os.environ["SHARED_PATH"]


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_in_one_process_alone_is_raised_in_both(process):
    def divide_in_one():
        if jax.process_index() == process:
            raise ZeroDivisionError("no such thing")

    if jax.process_index() == process:
        expected, message = ZeroDivisionError, "^no such thing$"
    else:
        expected, message = ConfigError, f"^process {process}: no such thing$"
    with pytest.raises(expected, match=message), together():
        divide_in_one()
    with together():
        pass


@pytest.fixture(scope="session")
def saved(tiny_run, shared_path):
    """The folder of checkpoints of steps 1 and 2, and what to restore like."""
    partitioning = partitioning_of_run(tiny_run)
    _, state = init_state(tiny_run, partitioning)
    with Checkpoints(os.path.join(shared_path, "checkpoints")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"said": step}, required=True)
        checkpoints.wait()
    return checkpoints.directory, abstract_state(tiny_run, partitioning)[1], state


@pytest.fixture
def found(monkeypatch):
    """What this process found of checkpoints by itself, before they agreed, and after."""
    findings = []

    def note(error):
        findings.append(finding(error))
        return findings[-1]

    monkeypatch.setattr(damage, "finding", note)
    return findings


@pytest.fixture
def damaged_in_process_1(monkeypatch):
    """Says of which step process 1, and only it, meets an error, and which."""

    def damage(damaged, error):
        original = checkpoints.check_structure

        def check(directory, step, *arguments, **options):
            if jax.process_index() == 1 and step == damaged:
                raise error
            original(directory, step, *arguments, **options)

        monkeypatch.setattr(checkpoints, "check_structure", check)

    return damage


def test_strictly_damage_that_one_process_sees_stops_both_and_nothing_is_moved(saved, damaged_in_process_1):
    directory, like, _ = saved
    damaged_in_process_1(2, DamageError("array a differs from what was written"))
    message = r"checkpoints/2 is damaged: .*array a differs"
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like, strict=True)
    assert (directory / "2").is_dir()


def test_what_one_process_cannot_read_just_now_stops_both(saved, damaged_in_process_1):
    directory, like, _ = saved
    damaged_in_process_1(2, TimeoutError("the disk does not answer"))
    message = r"step 2 .*does not answer.* nothing was moved"
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like)
    assert (directory / "2").is_dir()


def test_damage_that_one_process_sees_is_damage_for_both(saved, found):
    """The file with the shards of process 1, which it alone reads, is cut: both take the checkpoint before."""
    directory, like, state = saved
    if is_first():
        file = max((directory / "2" / "state" / "ocdbt.process_1" / "d").iterdir(), key=lambda path: path.stat().length)
        file.write_bytes(file.read_bytes()[: file.stat().length // 2])
    multihost_utils.sync_global_devices("cut")
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(like)
    assert found[0] == ("intact" if is_first() else "damaged")
    assert (restored.step, restored.metadata["said"]) == (1, 1)
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(restored.state.params), strict=True):
        np.testing.assert_array_equal(new.addressable_data(0), old.addressable_data(0))
    assert (directory.parent / "unreadable_checkpoints" / "2").is_dir()
    assert not (directory / "2").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_watchdog_hears_what_moves_in_the_other_process(process):
    """One has a beat, the other none; each asks once in a round."""
    others, beat = _Others(1.0), object()
    heard = []
    for _ in range(4):
        if jax.process_index() == process:
            beat = object()
            others.moved(beat, 1.0)
        multihost_utils.sync_global_devices("one has moved")
        if jax.process_index() != process:
            heard.append(others.moved(beat, 1.0))
        multihost_utils.sync_global_devices("the other has asked")
    multihost_utils.sync_global_devices("nothing moves any more")
    if jax.process_index() != process:
        assert heard == [True] * 4
        assert not others.moved(beat, 1.0)


@pytest.fixture(scope="session")
def grpo_run(tiny_run, shared_path):
    """2 rollout steps of 2 prompts, 2 responses each, of a dense layer as drawn; one of the 5 prompts is too long."""
    questions = os.path.join(shared_path, "questions.jsonl")
    if is_first():
        with open(questions, "w") as file:
            for prompt in ("1+6=", "3+4=", "2+2=", "5+1=", "123456789"):
                file.write(json.dumps({"prompt": prompt, "answer": "7"}) + "\n")
    multihost_utils.sync_global_devices("questions")
    source = QuestionAnswerSource(train_paths=(questions,), schema="prompt_answer", answer_separator="")
    start = dataclasses.replace(
        tiny_run, name="start", model=dataclasses.replace(tiny_run.model, num_layers=1, first_dense_layers=1),
        data=dataclasses.replace(tiny_run.data, tokenizer="bytes", sources={"questions": source}),
    )  # fmt: skip
    directory = os.path.join(shared_path, "start")
    write_start(start, directory, init_state(start, partitioning_of_run(start))[1], started_from="chance")
    settings = GRPOConfig(
        group_size=2, updates_per_step=1, max_prompt_tokens=8, max_response_tokens=4, reward="exact",
        rollout_batch_size=2,
    )  # fmt: skip
    steps = dataclasses.replace(tiny_run.train, steps=2, batch_size=2, warmup_steps=0, log_every=1)
    return dataclasses.replace(start, name="grpo", train=steps, grpo=settings, start_from=directory)


@pytest.fixture
def told(monkeypatch):
    """Responses as they are sampled, and how often this process rewarded how many; a text is worth its parity."""
    responses, rewarded = [], []
    sample = grpo.respond

    def respond(*arguments, **options):
        responses.append((arguments, options, sample(*arguments, **options)))
        return responses[-1][2]

    def reward(self, examples, texts):
        rewarded.append(len(texts))
        return np.array([len(text) % 2 for text in texts], np.float32)

    monkeypatch.setattr(grpo, "respond", respond)
    monkeypatch.setattr(grpo.Rewards, "__call__", reward)
    return responses, rewarded


class AskedInOne(StopRequest):
    """A signal to process 1 alone, after so many agreements."""

    def __init__(self, after):
        super().__init__()
        self._left = after

    def agree(self):
        self._left -= 1
        if self._left == 0 and not is_first():
            self._signal = "SIGTERM"
        super().agree()


def test_responses_of_two_processes_are_those_of_one_and_are_rewarded_once(grpo_run, told, shared_path):
    responses, rewarded = told
    directory = os.path.join(shared_path, "grpo")
    assert train(grpo_run, directory, method=GRPO).status == "done"
    assert rewarded == ([4, 4] if is_first() else [])
    multihost_utils.sync_global_devices("written")
    with open(os.path.join(directory, "metrics.jsonl")) as file:
        assert [json.loads(line)["prompts_left_out"] for line in file] == [1, 1]
    if is_first():
        (graph, _, prompts, tokenizer, sampling, key), options, sampled = responses[0]
        state = init_state(dataclasses.replace(grpo_run, name="alone"))[1]
        alone = grpo.respond(graph, (state.params, state.others), prompts, tokenizer, sampling, jax.device_get(key))
        assert options["partitioning"] is not None
        for ours, theirs in zip(alone, sampled, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_rollout_stopped_in_one_process_comes_again_in_both(grpo_run, told, shared_path):
    """In the second step, between two batches of responses; the log is that of a run that was not stopped."""
    del told
    directory = os.path.join(shared_path, "stopped")
    stopped = train(grpo_run, directory, method=GRPO, stop=AskedInOne(7))
    assert (stopped.status, stopped.step) == ("resumable", 1)
    assert train(grpo_run, directory, method=GRPO).status == "done"
    multihost_utils.sync_global_devices("done")
    found = []
    for name in ("grpo", "stopped"):
        with open(os.path.join(shared_path, name, "metrics.jsonl")) as file:
            found.append(file.read())
    assert found[0] == found[1]
