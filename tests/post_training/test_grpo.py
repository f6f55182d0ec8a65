"""A whole run: what it writes, how it goes on, what it learns from, and what it refuses."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from jaxmoe.accounting import memory_bytes
from jaxmoe.config import (
    ConfigError,
    GRPOConfig,
    KnowledgeSource,
    QuestionAnswerSource,
    TrainConfig,
    config_hash,
    to_dict,
)
from jaxmoe.data import Mixture
from jaxmoe.post_training import GRPO, Prompts
from jaxmoe.post_training.grpo import response_rows
from jaxmoe.post_training.prompts import prompts_of
from jaxmoe.post_training.rollout import Response, Sampling, respond
from jaxmoe.scaling import Member
from jaxmoe.training import StopRequest, check_start, init_state, train
from jaxmoe.training.start import started_state


def with_grpo(run, **changes):
    return dataclasses.replace(run, grpo=dataclasses.replace(run.grpo, **changes))


def fingerprints(directory, step):
    return json.loads((directory / "checkpoints" / str(step) / "metadata" / "metadata").read_text())["arrays"]


@pytest.fixture(scope="module")
def undisturbed(grpo_run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo")
    seen = []
    result = train(grpo_run, directory, method=GRPO, on_evaluate=lambda context: seen.append(context.step))
    return directory, result, seen


def test_a_run_directory_like_any_other(undisturbed, grpo_run):
    directory, result, seen = undisturbed
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert (result.status, result.step, seen) == ("done", 4, [0, 2, 4])
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert list(log[0]) == [
        "step", "loss", "reward", "equal_groups", "response_tokens_mean", "response_tokens_max", "truncated_fraction",
        "kl", "clip_fraction", "entropy", "grad_norm", "param_norm", "learning_rate", "dropped_fraction",
        "overflow_fraction", "load_max_over_mean", "load_cv", "reward/reasoning", "dead_experts", "tokens",
        "prompts_left_out", "skipped",
    ]  # fmt: skip
    for line in log:
        assert 0 <= line["reward"] <= 1
        assert (5 * 4 * line["reward"]) % 1 == pytest.approx(0, abs=1e-5)
        assert line["response_tokens_max"] <= 4
        assert 0 < line["entropy"] < np.log(280)
        assert (line["learning_rate"], line["skipped"]) == (pytest.approx(1e-3), 0)
    assert any(line["equal_groups"] < 1 for line in log)
    assert log[0]["kl"] < log[-1]["kl"]
    about = json.loads((directory / "checkpoints" / "4" / "metadata" / "metadata").read_text())
    assert (about["started_from"], about["start_step"]) == (grpo_run.start_from, 60)
    speeds = [json.loads(line) for line in (directory / "throughput.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in speeds)


class StoppedInStep(StopRequest):
    """Stops a run when it has been asked so often whether it is to."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    @property
    def requested(self):
        return "SIGTERM" if self.left <= 0 else None

    def agree(self):
        self.left -= 1


@pytest.mark.parametrize("asked", [3, 13, 15])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(undisturbed, grpo_run, tmp_path, asked):
    """In the first step, and in later ones while responses are sampled or their probabilities computed."""
    stopped = train(grpo_run, tmp_path, method=GRPO, stop=StoppedInStep(asked))
    assert (stopped.status, stopped.step < 4) == ("resumable", True)
    assert train(grpo_run, tmp_path, method=GRPO).status == "done"
    directory = undisturbed[0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (directory / "metrics.jsonl").read_bytes()
    assert fingerprints(tmp_path, 4) == fingerprints(directory, 4)


def test_another_reference_is_refused(undisturbed, grpo_run, pretrained, tmp_path):
    """As when the run that was started from has trained on since."""
    moved = tmp_path / "pretrained"
    shutil.copytree(pretrained, moved)
    run = dataclasses.replace(grpo_run, start_from=str(moved))
    train(run, tmp_path / "grpo", method=GRPO, stop=StoppedInStep(8))
    shutil.rmtree(moved / "checkpoints" / "60")
    with pytest.raises(ConfigError, match="is at step 54 now, and this run started from its step 60"):
        train(run, tmp_path / "grpo", method=GRPO)


def test_training_without_grpo_can_start_from_a_run_too(grpo_run, pretrained, tmp_path):
    run = dataclasses.replace(grpo_run, grpo=None, train=dataclasses.replace(grpo_run.train, steps=1))
    step, state = started_state(run)
    drawn = init_state(run)[1]
    assert step == 60
    assert int(state.step) == 0
    assert jax.tree.leaves(state.params)[0].shape == jax.tree.leaves(drawn.params)[0].shape
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(drawn.params)[0])
    assert train(run, tmp_path).status == "done"
    before = json.loads((pretrained / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] < before + 0.5


def test_only_what_has_a_true_answer_is_rewarded_and_updates_follow(grpo_run, tmp_path):
    """With a larger rate the sampled reward rises: what GRPO is for."""
    train_more = dataclasses.replace(grpo_run.train, steps=30, batch_size=16, learning_rate=3e-3, checkpoint_every=30)
    run = with_grpo(dataclasses.replace(grpo_run, train=train_more), updates_per_step=2, rollout_batch_size=80)
    train(run, tmp_path, method=GRPO)
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_rows_hold_prompt_and_response_and_weigh_the_response(grpo_run):
    mixture = Mixture.of_run(grpo_run)
    prompt = prompts_of(mixture.sources[0], "test", mixture.tokenizer)[0]
    size, eos = len(prompt.tokens), mixture.tokenizer.eos_id
    responses = [Response(np.array([7, 8, eos]), True), Response(np.array([7, 8, 9, 10]), False)]
    rows = response_rows([prompt, prompt], responses, 12, 0)
    assert rows["inputs"][0].tolist() == [*prompt.tokens, 7, 8, *[0] * (10 - size)]
    assert rows["targets"][0].tolist() == [*prompt.tokens[1:], 7, 8, eos, *[0] * (10 - size)]
    assert rows["weights"].sum(axis=1).tolist() == [3, 4]
    assert rows["targets"][1][rows["weights"][1] == 1].tolist() == [7, 8, 9, 10]
    assert responses[0].text(mixture.tokenizer) == mixture.tokenizer.decode([7, 8])


def test_prompts_of_a_step_are_known_without_those_before(grpo_run):
    mixture = Mixture.of_run(grpo_run)
    prompts = Prompts(grpo_run, mixture)
    epoch = [prompt.example.prompt for step in range(5) for prompt in prompts.of_step(step)]
    assert sorted(epoch) == sorted(example.prompt for example in mixture.sources[0].examples("train_clean"))
    again = Prompts(grpo_run, mixture)
    assert [prompt.example for prompt in again.of_step(7)] == [prompt.example for prompt in prompts.of_step(7)]
    assert [prompt.example.prompt for step in range(5, 10) for prompt in prompts.of_step(step)] != epoch
    solutions = {example.prompt: example.answer for example in mixture.sources[0].examples("train_clean")}
    assert all(solutions[prompt.example.prompt] == prompt.example.answer for prompt in prompts.of_step(0))


def question_run(run, tmp_path, questions):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in questions))
    source = QuestionAnswerSource(train_paths=(str(path),), schema="prompt_answer", answer_separator="")
    data = dataclasses.replace(run.data, tokenizer="bytes", sources={"questions": source})
    return dataclasses.replace(run, data=data)


def test_prompts_that_are_too_long_are_left_out_and_counted(grpo_run, tmp_path, caplog):
    run = question_run(grpo_run, tmp_path, ["1+6=", "12345678", "123456789", "3+4="])
    with caplog.at_level(logging.WARNING):
        prompts = Prompts(run, Mixture.of_run(run))
    assert (prompts.kept, prompts.left_out, prompts.longest) == ({"questions": 3}, {"questions": 1}, 8)
    assert "1 of 4 prompts have more than grpo.max_prompt_tokens=8 tokens" in caplog.text
    run = question_run(grpo_run, tmp_path, ["123456789"])
    with pytest.raises(ConfigError, match="none of its 1 prompts has 1..8 tokens .*; the shortest has 9"):
        Prompts(run, Mixture.of_run(run))


def test_greedy_responses_do_not_depend_on_the_batch(grpo_run):
    mixture = Mixture.of_run(grpo_run)
    graph, state = init_state(grpo_run)
    tokens = [prompt.tokens for prompt in prompts_of(mixture.sources[0], "test", mixture.tokenizer)]
    responses = [
        respond(
            graph, (state.params, state.others), tokens, mixture.tokenizer,
            Sampling(max_tokens=4, temperature=0.0, top_p=1.0, batch_size=size, width=8), jax.random.key(0),
        )
        for size in (3, 8)
    ]  # fmt: skip
    assert all((one.tokens == other.tokens).all() for one, other in zip(*responses, strict=True))


def test_a_start_of_another_model_a_missing_one_and_one_without_checkpoint_are_refused(grpo_run, tmp_path):
    narrow = dataclasses.replace(grpo_run.model, width=8)
    with pytest.raises(ConfigError, match=r"is of another model: .*embedding.* is \(280, 16\) there and \(280, 8\)"):
        check_start(dataclasses.replace(grpo_run, model=narrow))
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        check_start(dataclasses.replace(grpo_run, start_from="nowhere"))
    with pytest.raises(ConfigError, match="has no checkpoint; train that run first"):
        check_start(dataclasses.replace(grpo_run, start_from=str(tmp_path)))
    check_start(grpo_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None}, "grpo trains a model that is there: name the run directory"),
        ({"train": TrainConfig(steps=1, batch_size=4, sequence_length=11)}, "= 12 exceeds train.sequence_length=11"),
        ({"train": TrainConfig(steps=1, batch_size=5, sequence_length=12)}, "=5 prompts cannot be divided among .*=2"),
        ({"train": TrainConfig(steps=1, batch_size=4, sequence_length=12, gradient_accumulation=4)},
         "the 10 responses of an update .* cannot be divided by train.gradient_accumulation=4"),
        ({"train": TrainConfig(steps=1, batch_size=4, sequence_length=12, spike_action="skip")}, "use 'off'"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_its_rollouts_is_refused(grpo_run, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(grpo_run, **changes)


def test_responses_are_what_accumulation_divides(grpo_run):
    """4 prompts of 5 responses in 2 updates: 10 rows, in 5 micro-batches that would not divide the prompts."""
    train = TrainConfig(steps=1, batch_size=4, sequence_length=12, gradient_accumulation=5)
    run = dataclasses.replace(grpo_run, train=train)
    assert run.rows_per_update == 10
    member = Member(name="grpo", arm="grpo", slices=("main",), seed=0, config=run)
    two_rows = dataclasses.replace(train, batch_size=2, gradient_accumulation=1)
    assert member.summary()["memory_bytes"] == memory_bytes(run.model, two_rows).total


def test_sources_without_prompts_may_be_evaluated_and_not_trained_on(grpo_run):
    sources = {**grpo_run.data.sources, "facts": KnowledgeSource(entities=8, test_entities=8)}
    with pytest.raises(ConfigError, match="data.sources.facts is of kind 'knowledge', which has no prompts to answer"):
        dataclasses.replace(grpo_run, data=dataclasses.replace(grpo_run.data, sources=sources))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"group_size": 0}, "group_size=0"), ({"temperature": 0.0}, "samples"), ({"clip_ratio": 1.0}, "=1.0; choose")],
)
def test_the_section_checks_itself(values, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**values)


def test_runs_without_it_keep_their_hash(grpo_run):
    assert config_hash(grpo_run) != config_hash(dataclasses.replace(grpo_run, grpo=None))
    plain = dataclasses.replace(grpo_run, grpo=None, start_from=None)
    assert config_hash(plain) == config_hash(dataclasses.replace(plain, start_from=None))
    assert not {"grpo", "start_from"} & set(to_dict(plain))
