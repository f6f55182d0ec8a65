"""Presets against the published counts."""

import pytest

from jaxmoe.accounting import member_name, parameter_count
from jaxmoe.config import ConfigError
from jaxmoe.models import preset, presets

PUBLISHED = {
    # Numbers in the checkpoints' tensors, and the active parameters that the model cards give.
    "mixtral-8x7b": (46_702_792_704, 12.9e9),
    "mixtral-8x22b": (140_630_071_296, 39e9),
    "olmoe-1b-7b": (6_919_161_856, 1.3e9),
    "qwen3-30b-a3b": (30_532_122_624, 3.3e9),
    "qwen3-235b-a22b": (235_093_634_560, 22e9),
    "deepseek-moe-16b": (16_375_728_128, 2.8e9),
    "smollm2-135m": (134_515_008, 135e6),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_counts_equal_the_published_ones(name):
    count = parameter_count(preset(name))
    total, active = PUBLISHED[name]
    assert count.total == total
    assert count.active == pytest.approx(active, rel=0.02)


def test_the_study_s_65_members_follow_its_formula():
    members = {name: config for name, config in presets().items() if name.startswith("optimal-sparsity-math-")}
    assert len(members) == 65
    for name, config in members.items():
        d, experts, k = config.width, config.moe.num_experts, config.moe.experts_per_token
        assert name == f"optimal-sparsity-math-d{d}-E{experts}-k{k}"
        rest = 16 * (4 * d * d + d * experts + 2 * d) + d + 2 * 99_584 * d
        assert parameter_count(config).total == rest + 16 * 6 * experts * d * d
        assert parameter_count(config).active == rest + 16 * 6 * k * d * d
    assert parameter_count(members["optimal-sparsity-math-d512-E8-k2"]).total == 320_160_256
    assert parameter_count(members["optimal-sparsity-math-d1024-E16-k2"]).active == 472_679_424


@pytest.mark.parametrize("name", ["d512-E8-k2-320M-A170M", "d1024-E16-k2-1.9B-A470M"])
def test_a_member_has_its_published_name_too(name):
    assert member_name(preset(f"optimal-sparsity-math-{name}")) == name


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'mixtral-8x7b'"):
        preset("mixtral_8x7b")
    with pytest.raises(ConfigError, match="optimal-sparsity-math-d512-E8-k2"):
        preset("optimal-sparsity-math-d512-E8-k2-999M-A1M")
