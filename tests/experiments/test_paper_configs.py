"""The paper's studies: every member by name, what each file holds fixed, and the published facts."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.configs import paper_math
from experiments.flags import load_config
from jaxmoe.accounting import parameter_count
from jaxmoe.config import ConfigError
from jaxmoe.data.mixture import whole_proportions
from jaxmoe.scaling import Study

FILES = {
    "paper_math.py": 65, "paper_code.py": 65, "paper_decontaminated.py": 65, "paper_1t.py": 65, "paper_depth.py": 12,
    "paper_lr_init.py": 16, "paper_topk.py": 7, "paper_grpo.py": 65, "paper_ttc.py": 65,
}  # fmt: skip


def study_of(specification):
    return Study.from_config_dict(load_config(specification))


@pytest.mark.parametrize("file", FILES)
def test_every_family_is_matched(file):
    study = study_of(file)
    study.check()
    assert len(study.members) == FILES[file]


@pytest.mark.parametrize(
    ("specification", "members"),
    [
        ("paper_lr_init.py:learning_rate", 10), ("paper_lr_init.py:init", 8),
        ("paper_lr_init.py:init+learning_rate", 16),
        ("paper_topk.py:expert_size", 4), ("paper_topk.py:width_470M", 2), ("paper_topk.py:width_1500M", 2),
    ],
)  # fmt: skip
def test_every_slice_that_an_argument_names_is_matched(specification, members):
    study = study_of(specification)
    study.check()
    assert len(study.members) == members


def test_members_have_the_published_sizes():
    members = {member.name: member.config.model for member in study_of("paper_math.py").members}
    count = parameter_count(members["d512-E8-k2-320M-A170M"])
    assert (count.total, count.active) == (320_160_256, 169_165_312)
    count = parameter_count(members["d1024-E16-k2-1.9B-A470M"])
    assert (count.total, count.active) == (1_881_965_568, 472_679_424)
    assert members["d2048-E128-k16-52.2B-A7.1B"].moe.expert_hidden == 4_096


@pytest.mark.parametrize(
    ("argument", "count"),
    [("d512-E8-k2", 1), ("d1024-k16", 5), ("k=2", 17), ("d=512,k=2", 6), ("E=8+d2048-k2", 13), ("k=16,E=8+k=2", 17)],
)
def test_the_argument_selects(argument, count):
    if argument.startswith("k=16,E=8"):
        with pytest.raises(ConfigError, match="no member meets all of it"):
            load_config(f"paper_math.py:{argument}")
        return
    assert len(load_config(f"paper_math.py:{argument}").members) == count


def test_a_whole_published_name_selects_too():
    assert set(load_config("paper_math.py:d512-E8-k2-320M-A170M").members) == {"d512-E8-k2"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("d512-E8-k3", "neither a slice nor a member. Did you mean 'd512-E8-k8' or 'd512-E8-k4' or 'd512-E8-k2'?"),
        ("k=3", "'k=3': no member has it; k is one of 2, 4, 8, 16"),
        ("w=3", "nothing is called 'w' here. Known: E, d, k"),
    ],
)
def test_an_unknown_selection_says_what_there_is(argument, message):
    with pytest.raises(ConfigError) as caught:
        load_config(f"paper_math.py:{argument}")
    assert message in str(caught.value)


def test_the_mixture_is_the_published_one():
    assert len(paper_math.MIXTURE) == 27
    assert sum(paper_math.MIXTURE.values()) == 252_525_252_526
    shares = {name: tokens / 252_525_252_526 for name, tokens in paper_math.MIXTURE.items()}
    assert shares["dclm_dedup"] == pytest.approx(0.26776, abs=5e-6)
    assert shares["finemath_4plus"] * 125e9 == pytest.approx(5.116e9, rel=1e-4)


def test_rows_follow_the_mixture_down_to_its_smallest_source():
    weights = list(paper_math.MIXTURE.values())
    counts = whole_proportions([float(weight) for weight in weights])
    np.testing.assert_allclose(counts / counts.sum(), np.array(weights) / sum(weights), rtol=0.06)


def test_top_k_members_match_in_active_and_total_parameters():
    study = study_of("paper_topk.py")
    for name in ("expert_size", "width_470M", "width_1500M"):
        counts = [parameter_count(member.config.model) for member in study.members_of(name)]
        for attribute in ("active", "total"):
            values = [getattr(count, attribute) for count in counts]
            assert max(values) / min(values) < 1.03


def test_grpo_starts_every_member_from_its_pre_training():
    pretrained = {member.name: member.config for member in study_of("paper_math.py:k=2").members}
    for member in study_of("paper_grpo.py:k=2").members:
        run, grpo = member.config, member.config.grpo
        assert run.start_from == f"runs/paper_math/{member.name}"
        assert run.model == pretrained[member.name].model
        assert (run.train.steps, run.train.batch_size * grpo.group_size) == (105, 5_120)
        assert (grpo.responses_per_update(run.train), run.tokens_per_step) == (1_280, 5_120 * 1_536)
        assert run.evaluation.steps_of(105) == tuple(range(5, 106, 5))
    config = load_config("paper_grpo.py:d512-E8-k2")
    config.start_from = "gs://bucket/paper_math/{member}"
    (member,) = Study.from_config_dict(config).members
    assert member.config.start_from == "gs://bucket/paper_math/d512-E8-k2-320M-A170M"


def test_the_dry_run_prints_every_member_in_numbers():
    command = [sys.executable, "-m", "experiments.run", "--config=paper_math.py:d512-k2", "--dry_run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    members = json.loads(done.stdout)
    first = members[0]
    assert first["name"] == "d512-E8-k2-320M-A170M"
    assert (first["steps"], first["tokens"]) == (29_803, 125_002_842_112)
    assert first["flops_per_token"] == 6 * 169_165_312
    assert first["components"]["experts"] == 201_326_592
    assert first["tokens_per_parameter"] == pytest.approx(390.4, abs=0.1)
    assert first["optimizer_bytes"] == 8 * 320_160_256
