"""Two processes compare how they were started: run by `test_started_alike.py` in two."""

import dataclasses

import jax
import pytest

import jaxmoe.scaling.alike as alike
from jaxmoe.config import ConfigError, DataConfig, KnowledgeSource, ModelConfig, RunConfig, TrainConfig
from jaxmoe.processes import connect
from jaxmoe.scaling import Member

connect()


@pytest.fixture
def members():
    model = ModelConfig(vocab_size=288, width=16, num_layers=1, num_heads=2, max_sequence_length=16, dense_hidden=16)
    data = DataConfig(tokenizer="symbols", sources={"knowledge": KnowledgeSource(entities=40, test_entities=8)})
    train = TrainConfig(steps=24, batch_size=8, sequence_length=16, learning_rate=1e-2)
    run = RunConfig(name="E4", model=model, data=data, train=train)
    return [Member(name="E4", arm="E4", slices=("main",), seed=0, config=run)]


def test_the_same_start_passes_again_and_again(members):
    for _ in range(2):
        alike.require_started_alike("runs", members, resume="auto")


def test_every_process_is_told_which_value_differs_in_which(members):
    if jax.process_index() == 1:
        run = members[0].config
        other = dataclasses.replace(run, train=dataclasses.replace(run.train, learning_rate=0.5))
        members = [dataclasses.replace(members[0], config=other)]
    with pytest.raises(ConfigError) as raised:
        alike.require_started_alike("runs", members, resume="auto")
    said = "process 1: members.E4.train.learning_rate is 0.5, and 0.01 in process 0"
    assert str(raised.value).splitlines()[1:-1] == [said]


def test_versions_and_options_are_compared(members, monkeypatch):
    if jax.process_index() == 0:
        monkeypatch.setattr(alike, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"process 1: jaxmoe is '.*', and '9.9' in process 0; resume is 'force', and"):
        alike.require_started_alike("runs", members, resume=["auto", "force"][jax.process_index()])
