"""Studies: resolving members, what is held fixed, what varies, what is refused."""

import copy
import json
import math
import subprocess
import sys

import ml_collections
import pytest

from jaxmoe import accounting
from jaxmoe.config import ConfigError, to_dict
from jaxmoe.scaling import Study
from jaxmoe.scaling.matching import relative_difference
from jaxmoe.scaling.quantities import quantity


def experiment(**changes):
    """A small experiment configuration; `changes` replace whole top-level entries."""
    config = {
        "study": {
            "name": "tiny", "title": "Tiny family", "held_fixed": {"active_parameters": 0.1, "tokens": 0.0},
            "varies": ("total_parameters",), "notes": ("a note",),
        },
        "seeds": (0, 1),
        "model": {
            "vocab_size": 280, "width": 32, "num_layers": 2, "num_heads": 2, "max_sequence_length": 16,
            "moe": {"num_experts": 2, "experts_per_token": 2, "expert_hidden": 32},
        },
        "data": {
            "tokenizer": "symbols",
            "sources": {
                "knowledge": {"kind": "knowledge", "entities": 50, "test_entities": 10},
                "reasoning": {"kind": "reasoning", "problems": 50, "test_problems": 10, "corruption": 0.2},
            },
        },
        "train": {"steps": 10, "batch_size": 4, "sequence_length": 16},
        "members": {
            "E2": {"slices": ("headline", "control")},
            "E8": {"slices": ("headline",), "model": {"moe": {"num_experts": 8}}},
            "clean": {"slices": ("control",), "data": {"sources": {"reasoning": {"corruption": 0.0}}}},
        },
    }  # fmt: skip
    return copy.deepcopy({**config, **changes})


def with_value(path, value):
    """The experiment with one entry set, by dotted path."""
    config = experiment()
    *sections, last = path.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return config


def active_parameters(study, name):
    return accounting.parameter_count(study.member(name).config.model).active


@pytest.fixture(scope="module")
def study():
    return Study.from_config_dict(experiment())


def test_members_are_arms_times_seeds(study):
    assert [member.name for member in study.members] == [
        "E2-seed0", "E2-seed1", "E8-seed0", "E8-seed1", "clean-seed0", "clean-seed1",
    ]  # fmt: skip
    assert [member.seed for member in study.members] == [0, 1] * 3
    for member in study.members:
        assert (member.config.name, member.config.seed) == (member.name, member.seed)


def test_overrides_merge_into_the_sections(study):
    member = study.member("clean-seed1")
    assert member.config.data.sources["reasoning"].corruption == 0.0
    assert member.config.data.sources["reasoning"].problems == 50, "the rest of the source stays"
    assert member.config.data.sources["knowledge"].entities == 50
    assert study.member("E8-seed0").config.model.moe.num_experts == 8
    assert study.member("E8-seed0").config.model.moe.expert_hidden == 32


def test_a_source_of_another_kind_replaces_the_old_one():
    paths = {"kind": "text", "paths": ("a.txt",)}
    study = Study.from_config_dict(with_value("members.E2.data.sources.reasoning", paths))
    assert study.member("E2-seed0").config.data.sources["reasoning"].paths == ("a.txt",)


def test_one_seed_leaves_the_arm_as_name_and_members_may_have_their_own():
    assert [member.name for member in Study.from_config_dict(experiment(seeds=(3,))).members] == ["E2", "E8", "clean"]
    own = with_value("members.E8.seeds", (5,))
    assert [member.name for member in Study.from_config_dict(own).members][2] == "E8-seed5"


def test_a_config_dict_gives_the_same_members_in_natural_order():
    values = experiment()
    values["members"]["E16"] = {"slices": ("headline",), "model": {"moe": {"num_experts": 16}}}
    study = Study.from_config_dict(ml_collections.ConfigDict(values))
    assert [member.arm for member in study.members][::2] == ["E2", "E8", "E16", "clean"]
    plain = Study.from_config_dict(values)
    for member in study.members:
        assert member.config == plain.member(member.name).config


def test_values_that_refer_to_each_other_are_resolved():
    config = ml_collections.ConfigDict(experiment())
    config.train.warmup_steps = config.train.get_ref("steps") // 2
    config.train.steps = 6
    assert Study.from_config_dict(config).members[0].config.train.warmup_steps == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("members.E8.model.moe.num_expert", 4, r"members\.E8\.model\.moe\.num_expert\. Did you mean 'num_experts'"),
        ("members.E8.modle", {}, r"unknown key members\.E8\.modle\. Did you mean 'model'"),
        ("members.E8.seed", 1, r"unknown key members\.E8\.seed\. Did you mean 'seeds'"),
        ("members.E8.data.sources.reasoning.corrupt", 1.0, r"members\.E8\.data\.sources\.reasoning\.corrupt"),
        ("members.E8.model.moe.experts_per_token", 9, r"members\.E8\.model\.moe: experts_per_token=9 but .* 8 experts"),
        ("model.moe.experts_per_token", 9, r"^model\.moe: experts_per_token=9 but the layer has 2 experts"),
        ("train.stepz", 1, r"^unknown key train\.stepz\. Did you mean 'steps'"),
        ("train.steps", -1, r"^train: steps=-1"),
        ("trian", {}, r"^unknown key trian\. Did you mean 'train'"),
        ("study.varys", (), r"unknown key study\.varys\. Did you mean 'varies'"),
        ("study.varies", "total_parameters", r"study\.varies='total_parameters'; a list"),
        ("study.name", "a/b", r"study\.name: 'a/b' cannot name a folder"),
        ("study.held_fixed", {"tokens": -0.1}, r"study\.held_fixed\.tokens=-0\.1"),
        ("study.slices", {"control": {"titel": "x"}}, r"study\.slices\.control\.titel\. Did you mean 'title'"),
        ("members.report", {}, "'report' cannot name a folder"),
        ("members.E8.slices", (), r"members\.E8\.slices is empty"),
        ("seeds", (0, 0), "names a seed twice"),
        ("seeds", (), r"seeds=\(\)"),
        ("members", {}, "members is empty"),
    ],
)
def test_mistakes_are_refused_where_they_stand(path, value, message):
    with pytest.raises(ConfigError, match=message):
        Study.from_config_dict(with_value(path, value))


def test_a_matched_family_passes(study):
    study.check()


def test_an_unmatched_member_is_named_with_both_numbers():
    study = Study.from_config_dict(with_value("members.E8.model.moe.expert_hidden", 64))
    large, small = (active_parameters(study, name) for name in ("E8-seed0", "E2-seed0"))
    with pytest.raises(ConfigError) as error:
        study.check()
    message = str(error.value)
    for part in ("'headline'", "active_parameters", "'E8-seed0'", f"{large:,}", "'E2-seed0'", f"{small:,}", "10 %"):
        assert part in message


def test_the_tolerance_is_relative_to_the_smallest_member_of_the_slice(study):
    small, large = (active_parameters(study, name) for name in ("E2-seed0", "E8-seed0"))
    difference = (large - small) / small
    for factor, accepted in ((1.001, True), (0.999, False)):
        held = {"active_parameters": difference * factor}
        config = with_value("study.held_fixed", held)
        config["members"] = dict(reversed(config["members"].items()))
        family = Study.from_config_dict(config)
        if accepted:
            family.check()
        else:
            with pytest.raises(ConfigError, match="active_parameters"):
                family.check()


def test_tokens_must_be_equal_when_the_tolerance_is_zero():
    with pytest.raises(ConfigError, match=r"tokens fixed.*704.*640.*must be equal"):
        Study.from_config_dict(with_value("members.E8.train.steps", 11)).check()


def test_slices_are_matched_apart():
    config = with_value("members.clean.train.steps", 20)
    config["members"]["clean"]["slices"] = ("long",)
    Study.from_config_dict(config).check()


def test_what_varies_must_vary():
    with pytest.raises(ConfigError, match=r"varies names experts_per_token, but it is 2 for every member"):
        Study.from_config_dict(with_value("study.varies", ("experts_per_token",))).check()
    Study.from_config_dict(with_value("study.varies", ("model.moe.num_experts",))).check()


@pytest.mark.parametrize("key", ["held_fixed", "varies"])
def test_an_unknown_quantity_gives_the_nearest(key):
    value = {"active_parameter": 0.1} if key == "held_fixed" else ("active_parameter",)
    with pytest.raises(ConfigError, match="Did you mean 'active_parameters'"):
        Study.from_config_dict(with_value(f"study.{key}", value)).check()


def test_only_numbers_can_be_held_fixed():
    with pytest.raises(ConfigError, match=r"data\.tokenizer, which is 'symbols'"):
        Study.from_config_dict(with_value("study.held_fixed", {"data.tokenizer": 0.0})).check()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("members.E8.model.vocab_size", 281, "model.vocab_size=281"),
        ("members.E8.data.tokenizer", "bytes", "data.tokenizer='bytes'"),
        ("members.E8.evaluation.examples", 7, "evaluation.examples=7"),
        ("members.E8.data.sources.extra", {"kind": "knowledge", "weight": 0.0}, "only one of them has extra"),
    ],
)
def test_members_whose_losses_mean_different_things_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        Study.from_config_dict(with_value(path, value)).check()


def test_another_sequence_length_is_refused_even_at_equal_tokens():
    config = with_value("members.E8.train", {"steps": 20, "sequence_length": 8})
    with pytest.raises(ConfigError, match=r"train\.sequence_length=8"):
        Study.from_config_dict(config).check()


def test_names_that_one_folder_would_serve_are_refused():
    config = with_value("members.e2", {"slices": ("headline",)})
    with pytest.raises(ConfigError, match="'E2-seed0' .* and 'e2-seed0' .* would share a folder"):
        Study.from_config_dict(config).check()


def test_selecting_a_slice_keeps_its_members_and_only_its_comparison(study):
    control = study.select("control")
    assert [member.arm for member in control.members] == ["E2", "E2", "clean", "clean"]
    assert control.slices == ("control",)
    assert study.slices == ("headline", "control")
    with pytest.raises(ConfigError, match="unknown slice 'contrl'. Did you mean 'control'"):
        study.select("contrl")


def test_an_unknown_member_gives_the_nearest(study):
    with pytest.raises(ConfigError, match="unknown member 'E8-sed0'. Did you mean 'E8-seed0'"):
        study.member("E8-sed0")


def test_the_summary_counts(study):
    member = study.member("E8-seed1")
    summary = member.summary()
    count = accounting.parameter_count(member.config.model)
    assert list(summary)[:8] == [
        "name", "total_parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_parameter",
        "sparsity", "seed",
    ]  # fmt: skip
    assert summary["total_parameters"] == count.total
    assert summary["active_parameters"] == count.active
    assert summary["flops_per_token"] == 6 * count.active
    assert summary["tokens"] == 10 * 4 * 16
    assert summary["tokens_per_parameter"] == pytest.approx(640 / count.total)
    assert summary["sparsity"] == 1 - 2 / 8
    assert summary["approximate_training_flops"] == 6 * count.active * 640
    assert summary["training_flops"] == summary["matmul_flops_per_token"] * 640
    assert summary["state_bytes"] == 12 * count.total
    for name in ("total_parameters", "active_parameters", "flops_per_token", "matmul_flops_per_token", "seed"):
        assert type(summary[name]) is int
    assert json.loads(json.dumps(summary)) == summary


def test_a_dense_member_has_no_experts_and_no_sparsity():
    study = Study.from_config_dict(with_value("members.E8.model", {"moe": None, "dense_hidden": 64}))
    summary = study.member("E8-seed0").summary()
    assert (summary["num_experts"], summary["experts_per_token"], summary["sparsity"]) == (0, 0, 0.0)


def test_the_description_states_what_is_fixed_what_varies_and_every_member(study):
    text = study.describe()
    assert "held fixed: active_parameters (within 10 %)" in text
    assert "held fixed: tokens (exactly): 640" in text
    assert "varies:     total_parameters:" in text
    for member in study.members:
        assert sum(line.startswith(f"{member.name} ") for line in text.splitlines()) == 3


def test_quantities_name_configuration_keys_too(study):
    config = study.member("E8-seed0").config
    assert quantity("train.learning_rate", config) == config.train.learning_rate
    assert quantity("model.moe.num_experts", config) == 8
    assert quantity("sparsity", config) == 0.75
    with pytest.raises(ConfigError, match="Did you mean"):
        quantity("train.learning_rat", config)


def test_relative_difference():
    assert relative_difference(110, 100) == pytest.approx(0.1)
    assert relative_difference(90, 100) == pytest.approx(0.1)
    assert relative_difference(0, 0) == 0
    assert relative_difference(1, 0) == math.inf


def test_the_configuration_stays_as_it_was():
    config = experiment()
    before = copy.deepcopy(config)
    study = Study.from_config_dict(config)
    assert config == before
    assert to_dict(study.members[0].config)["seed"] == 0


def test_planning_a_study_needs_no_jax():
    code = "import sys; import jaxmoe.scaling.study; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_description_counts_what_a_member_costs(study):
    summary = study.members[0].summary()
    assert sum(summary["components"].values()) == summary["total_parameters"]
    assert sum(summary["active_components"].values()) == summary["active_parameters"]
    assert (summary["weights_bytes"], summary["optimizer_bytes"]) == (
        4 * summary["total_parameters"], 8 * summary["total_parameters"]
    )  # fmt: skip
    cost = study.describe().split("FLOPs of training")[1]
    row = next(line for line in cost.splitlines() if line.startswith(f"{study.members[0].name} "))
    assert f"{summary['training_flops']:.3g}" in row.split()


def test_a_member_may_have_a_name_that_no_key_can_have():
    study = Study.from_config_dict(with_value("members.E8.name", "E8-1.9B"))
    assert study.member("E8-1.9B-seed0").arm == "E8-1.9B"
    with pytest.raises(ConfigError, match="unknown member 'E8-1'"):
        study.member("E8-1")
