"""Configurations refuse what cannot run, in the user's terms, and survive a round trip through JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import (
    MESH_PRESETS,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ReasoningSource,
    RunConfig,
    TextSource,
    TrainConfig,
    check_mesh,
    config_hash,
    from_dict,
    parse_mesh,
    to_dict,
)

MODEL = ModelConfig(vocab_size=8, width=8, num_layers=2, num_heads=2, dense_hidden=16)


def run_dict(**changes):
    values = {
        "name": "E8",
        "model": {
            "vocab_size": 288,
            "width": 64,
            "num_layers": 2,
            "num_heads": 4,
            "moe": {"num_experts": 8, "experts_per_token": 2, "expert_hidden": 64},
        },
        "data": {
            "tokenizer": "symbols",
            "sources": {
                "knowledge": {"kind": "knowledge"},
                "reasoning": {"kind": "reasoning", "corruption": 0.2},
                "documents": {"kind": "text", "paths": ["a.txt"], "weight": 0},
            },
        },
        "train": {"steps": 10, "batch_size": 8, "sequence_length": 16},
    }
    for path, value in changes.items():
        section = values
        *parents, last = path.split("__")
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


def test_json_round_trip_is_equal_and_hashes_equal():
    run = from_dict(RunConfig, run_dict())
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert again == run
    assert config_hash(again) == config_hash(run)
    assert config_hash(from_dict(RunConfig, run_dict(seed=1))) != config_hash(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modell": {}}, "unknown key modell. Did you mean 'model'?"),
        ({"model__moe__num_expert": 4}, "unknown key model.moe.num_expert. Did you mean 'num_experts'?"),
        ({"model__moe__experts_per_token": 9}, "model.moe: experts_per_token=9 but the layer has 8 experts"),
        ({"model__width": 66}, "width=66 is not divisible by num_heads=4"),
        ({"model__num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"model__width": "64"}, "model.width='64' is a str; int is needed"),
        ({"model__remat": "all"}, "model.remat='all'; choose one of 'none', 'full', 'dots'"),
        ({"train__batch_size": 0}, "train: batch_size=0; it must be positive"),
        ({"train__watchdog_minutes": 0.0}, "watchdog_minutes=0.0; it must be positive, or None"),
        ({"train__gradient_accumulation": 3}, "train.batch_size=8 is not divisible by train.gradient_accumulation=3"),
        ({"train__warmup_steps": 11}, "warmup_steps=11 is more than steps=10"),
        ({"train__learning_rate": float("nan")}, "train.learning_rate=nan is not finite"),
        ({"train__sequence_length": 5000}, "train.sequence_length=5000 exceeds model.max_sequence_length=4096"),
        (
            {"train__gradient_accumulation": 2, "model__moe__capacity_factor": 1.5},
            "train.gradient_accumulation=2 with model.moe.capacity_factor=1.5: the limit would hold",
        ),
        ({"data__sources": {}}, "data.sources is empty"),
        ({"data__sources__knowledge__kind": "knowlege"}, "Did you mean 'knowledge'?"),
        ({"data__sources__reasoning__corruption": 1.5}, "corruption=1.5; it is a probability"),
        ({"data__sources__reasoning__problems": 10**6}, "distinct problems exist"),
        ({"data__sources__knowledge__entities": 70_000}, "raise name_length"),
        ({"data__sources__documents__paths": "a.txt"}, "a list of strings is needed"),
        ({"data__sources": {"k": {"kind": "knowledge", "weight": 0}}}, "every weight of the mixture is zero (k)"),
    ],
)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, run_dict(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoEConfig(score_order="topk"), "score_order='topk'; choose one of 'topk_then_softmax', 'softmax_then"),
        (lambda: MoEConfig(load_balance_definition="swich"), "load_balance_definition='swich'; choose one of 'switch'"),
        (lambda: dataclasses.replace(MODEL, remat="all"), "remat='all'; choose one of 'none', 'full', 'dots'"),
        (lambda: TextSource(paths="corpus/*.txt"), "paths='corpus/*.txt'; a list of strings is needed"),
    ],
)
def test_a_configuration_that_is_built_in_python_is_checked_as_well(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert message in str(caught.value)


def test_a_missing_key_is_named():
    values = run_dict()
    del values["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps is missing"):
        from_dict(RunConfig, values)


def test_layer_kinds_follow_first_dense_and_every_nth():
    config = ModelConfig(
        vocab_size=8, width=8, num_layers=6, num_heads=2, first_dense_layers=1, moe_every=2, moe=MoEConfig()
    )
    assert config.layer_kinds == ("dense", "dense", "moe", "dense", "moe", "dense")
    assert config.num_moe_layers == 2


def test_no_experts_means_dense_and_active_matched():
    config = ModelConfig(
        vocab_size=8, width=8, num_layers=2, num_heads=2,
        moe=MoEConfig(num_experts=0, experts_per_token=2, expert_hidden=24),
    )
    assert config.layer_kinds == ("dense", "dense")
    assert config.dense_hidden_size == 48


def test_tokens_and_checkpoint_interval():
    train = TrainConfig(steps=29_803, batch_size=1024, sequence_length=4096)
    assert train.tokens == 29_803 * 1024 * 4096
    assert train.checkpoint_interval == 2981


@given(points=st.integers(1, 20), steps=st.integers(1, 500))
def test_evaluation_steps_end_at_the_last_step(points, steps):
    chosen = EvaluationConfig(points=points).steps_of(steps)
    assert chosen[-1] == steps
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] >= 1
    assert len(chosen) <= points


def test_no_source_is_named_as_the_mixture_is():
    """Its training record would overwrite the mixture's."""
    with pytest.raises(ConfigError, match="named 'all'"):
        DataConfig(sources={"all": ReasoningSource()})


def mesh_error(mesh, **model):
    """What is said of a run of 8 sequences of 16 tokens whose model does not fit the mesh."""
    sizes = {"vocab_size": 96, "width": 32, "num_layers": 1, "num_heads": 4, "moe": MoEConfig(num_experts=6)} | model
    with pytest.raises(ConfigError) as error:
        check_mesh(mesh, ModelConfig(**sizes), TrainConfig(steps=1, batch_size=8, sequence_length=16))
    return str(error.value)


def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_do():
    """Experts, heads, batch and sequence: the numbers, the sizes of the axes and of the model that would fit."""
    told = mesh_error(MeshConfig(fsdp=1, expert=4))
    assert "num_experts=6" in told
    assert "expert x tensor = 2, or num_experts = 4 or 8" in told, "3 and 6 would not divide 4 devices"
    assert "tensor = 2 or 4, or num_heads = 3 or 6" in mesh_error(MeshConfig(data=4, fsdp=1, tensor=3))
    assert "num_kv_heads=1" in mesh_error(MeshConfig(fsdp=1, tensor=2), num_kv_heads=1)
    assert "data x fsdp x expert = 8, or batch_size = 16" in mesh_error(MeshConfig(data=16, fsdp=1))
    assert "context x tensor = 2 or 4" in mesh_error(MeshConfig(fsdp=1, context=3, data=4))
    assert "context=16 devices; choose a multiple of 32" in mesh_error(MeshConfig(fsdp=1, context=16))


def test_micro_batches_are_what_a_mesh_divides():
    train = TrainConfig(steps=1, batch_size=8, sequence_length=16, gradient_accumulation=2)
    model = ModelConfig(vocab_size=96, width=32, num_layers=1, num_heads=4, dense_hidden=8)
    check_mesh(MeshConfig(fsdp=4), model, train)
    told = "batch_size / gradient_accumulation = 8 / 2 = 4 cannot be divided .* gradient_accumulation = 8"
    with pytest.raises(ConfigError, match=told):
        check_mesh(MeshConfig(fsdp=8), model, train)


def test_an_open_axis_is_what_is_left_of_the_devices():
    assert MeshConfig(expert=4).resolved(16).fsdp == 4
    with pytest.raises(ConfigError, match="multiply to 2 or 4"):
        MeshConfig(expert=3).resolved(8)
    with pytest.raises(ConfigError, match="makes 4 devices, and there are 8; what fits: fsdp=8, or fsdp=-1"):
        MeshConfig(fsdp=4).resolved(8)
    with pytest.raises(ConfigError, match="makes 6 devices, and there are 8; what fits: expert=4."):
        MeshConfig(fsdp=2, expert=3).resolved(8)


def test_meshes_are_written_as_presets_and_sizes():
    assert parse_mesh("fsdp_ep") == MESH_PRESETS["fsdp_ep"]
    assert parse_mesh("fsdp_ep,expert=16") == MeshConfig(expert=16)
    assert parse_mesh("fsdp=4, context=2") == MeshConfig(fsdp=4, context=2)
    with pytest.raises(ConfigError, match="Did you mean 'expert'"):
        parse_mesh("fsdp=4,exprt=2")
    with pytest.raises(ConfigError, match="Did you mean 'fsdp_ep_tp'"):
        parse_mesh("fsdp_ep_pt")


def test_the_mesh_is_no_part_of_a_run_s_identity():
    """A run goes on on another mesh."""
    run = from_dict(RunConfig, run_dict())
    other = from_dict(RunConfig, run_dict(mesh={"expert": 8}))
    assert other.mesh.expert == 8
    assert config_hash(other) == config_hash(run)
