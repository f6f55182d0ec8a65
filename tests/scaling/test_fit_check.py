"""The fit check: plans for devices that are not here, by the compilers that would be used there."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments.flags import load_config
from jaxmoe.config import ConfigError, MeshConfig
from jaxmoe.models import preset
from jaxmoe.scaling import Study, fit_search, fit_table
from jaxmoe.scaling.fit import Fit, StepTime, _parsed_bytes, _refused, check_fit, memory_limit
from jaxmoe.scaling.fit_report import describe_fit
from jaxmoe.scaling.fit_search import expected_bytes, expected_seconds, plans_of
from jaxmoe.scaling.fit_table import fill, rows_and_columns, smallest_fit, table, versions
from jaxmoe.scaling.topologies import GIB, describe_topology

pytestmark = pytest.mark.usefixtures("optimized")


def topology_of(name, slices=1):
    """The topology; the test is skipped where its compiler is not installed."""
    try:
        return describe_topology(name, slices)
    except ConfigError as error:
        if "is not at hand" in str(error):
            pytest.skip(str(error))
        raise


def member(name, **mesh):
    run = Study.from_config_dict(load_config("paper_math.py")).member(name).config
    return dataclasses.replace(run, mesh=MeshConfig(**mesh))


def small(run, **train):
    """Two narrow layers and short rows, for a quick compilation."""
    moe = dataclasses.replace(run.model.moe, expert_hidden=256)
    model = dataclasses.replace(
        run.model, num_layers=2, width=256, num_heads=2, vocab_size=1024, max_sequence_length=256, moe=moe
    )
    train = dataclasses.replace(run.train, batch_size=8, sequence_length=256, **train)
    return dataclasses.replace(run, model=model, train=train)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "unknown chip 'v9'. Known: v4, v5e, v5p, v6e, tpu7x, h100, h200, b200"),
        ("v5p", "no shape can be read after the chip. A topology is written like v4:4x4x4"),
        ("v5e:2x2x2", "v5e has 2 directions, 2x2 or more"),
        ("v5p:1x1x1", "v5p has 3 directions, 2x2x1 or more"),
        ("h100:12", "h100:12: choose a number of GPUs, up to 8 or a multiple of 8. A topology is written like"),
    ],
)
def test_unknown_topologies_say_what_there_is(name, message):
    with pytest.raises(ConfigError) as caught:
        describe_topology(name)
    assert message in str(caught.value)


def test_slices_of_tpus():
    topology = topology_of("v5p:2x2x1", slices=2)
    assert [device.slice_index for device in topology.devices] == [0] * 4 + [1] * 4


def test_what_the_compiler_says_of_memory():
    message = "Ran out of memory in memory space hbm. Used 114.20G of 95.74G hbm. Exceeded hbm capacity by 18.46G."
    assert _refused(message) == (round(114.2 * GIB), round(95.74 * GIB))
    message = "the total memory required for HLO temporaries (8.00T) exceeds available HBM (30.75G)."
    assert _refused(message) == (8 << 40, round(30.75 * GIB))
    assert _refused("something else") == (None, None)
    assert _parsed_bytes("512.00M") == 512 << 20
    assert 15 * GIB < memory_limit(topology_of("v5e:2x2")) < 16 * GIB  # the compiler keeps a part of it


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2"])
def test_a_step_on_a_tpu_slice(name):
    run = dataclasses.replace(small(member("d512-E8-k2")), mesh=MeshConfig(fsdp=2, expert=2))
    fit = check_fit(run, topology_of(name))
    assert fit.fits
    assert fit.peak >= fit.arguments > 0
    kinds = {exchange.kind for exchange in fit.exchanges}
    assert "ragged-all-to-all" in kinds
    assert all(exchange.between_slices == 0 for exchange in fit.exchanges)
    assert 0.7 < fit.operations.total / fit.model_flops < 2
    assert (fit.operations.unknown_loops, fit.operations.unknown_kernels) == (0, 0)
    assert "fits" in describe_fit(fit)
    summary = json.loads(json.dumps(fit.summary()))
    assert summary["mesh"] == {"fsdp": 2, "expert": 2}
    assert summary["estimate"]["label"] == "estimate at peak rates, not a measurement"


def test_bytes_between_slices():
    run = dataclasses.replace(small(member("d512-E8-k2")), mesh=MeshConfig(data=2, slices=2, fsdp=2, expert=2))
    fit = check_fit(run, topology_of("v5e:2x2", slices=2))
    assert sum(exchange.between_slices for exchange in fit.exchanges) > 0
    assert sum(exchange.between_slices for exchange in fit.exchanges) < sum(each.bytes for each in fit.exchanges)
    assert "train step on 2 slices of v5e:2x2 (8 devices): fits" in describe_fit(fit)


def test_a_chip_of_v4_is_one_device():
    topology = topology_of("v4:2x2x1")
    assert len(topology.devices) == 4
    assert 30 * GIB < memory_limit(topology) < 32 * GIB


@pytest.mark.parametrize(("name", "memory"), [("h100:4", 80), ("b200:4", 180)])
def test_a_decode_step_on_gpus(name, memory):
    run = dataclasses.replace(small(member("d512-E8-k2")), mesh=MeshConfig(fsdp=2, expert=2))
    fit = check_fit(run, topology_of(name), what="decode", rows=8, length=128)
    assert fit.fits
    assert (fit.tokens, fit.limit) == (8, memory * 10**9)


def test_updates_and_rollouts_of_grpo():
    """Beside the updates lies the reference, beside a rollout's decode step the moments, too."""
    run = Study.from_config_dict(load_config("paper_grpo.py:d512-E8-k2")).members[0].config
    grpo = dataclasses.replace(
        run.grpo, group_size=2, updates_per_step=2, max_prompt_tokens=128, max_response_tokens=128,
        rollout_batch_size=12,
    )  # fmt: skip
    whole = dataclasses.replace(run, train=dataclasses.replace(run.train, sequence_length=256, batch_size=8), grpo=grpo)
    run = dataclasses.replace(small(whole, gradient_accumulation=2), mesh=MeshConfig(fsdp=2, expert=2))
    topology = topology_of("v5e:2x2")
    updates, decode = check_fit(run, topology), check_fit(run, topology, what="decode")
    assert (updates.fits, updates.tokens) == (True, 2 * 2 * 4 * 256)
    assert updates.peak > updates.held > 0
    assert 0.7 < updates.operations.total / updates.model_flops < 2.5
    assert (decode.tokens, decode.held) == (12, pytest.approx(3 * updates.held, rel=1e-3))
    assert "updates of a GRPO step" in describe_fit(updates)
    assert "held beside the program" in describe_fit(decode)
    assert json.loads(json.dumps(updates.summary()))["held"] == updates.held
    plans = list(plans_of(run, topology))
    assert {plan.train.gradient_accumulation for plan in plans} == {1, 2}  # 8 rows of an update, over 4 devices
    assert min(map(expected_bytes, plans)) > min(expected_bytes(dataclasses.replace(p, grpo=None)) for p in plans)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "mesh"),
    [
        ("d2048-E128-k16", "v5p:4x4x4", {"fsdp": 8, "expert": 8}),
        ("olmoe", "v5p:4x4x4", {"fsdp": 16, "expert": 4}),
    ],
)
def test_the_largest_member_and_one_like_olmoe_compile(name, topology, mesh):
    run = member("d2048-E128-k16" if name != "olmoe" else "d2048-E64-k8", **mesh)
    model = run.model if name != "olmoe" else dataclasses.replace(preset("olmoe-1b-7b"), compute_dtype="bfloat16")
    model = dataclasses.replace(model, remat="full")
    train = dataclasses.replace(run.train, gradient_accumulation=8)
    fit = check_fit(dataclasses.replace(run, model=model, train=train), topology_of(topology))
    assert fit.fits
    assert 1 < fit.balanced_operations / fit.model_flops < 2  # a layer is recomputed, and tiles are padded


def test_a_mesh_that_does_not_fit_is_refused_first():
    with pytest.raises(ConfigError, match="makes 8 devices, and there are 4"):
        check_fit(member("d512-E8-k2", fsdp=8), topology_of("v5e:2x2"))
    with pytest.raises(ConfigError, match="num_experts=8"):
        check_fit(member("d512-E8-k2", expert=16), topology_of("v5e:4x4"))
    with pytest.raises(ConfigError, match="length=4097 is more than model.max_sequence_length=4096"):
        check_fit(member("d512-E8-k2", fsdp=4), topology_of("v5e:2x2"), what="decode", length=4097)


def test_plans_divide_the_model_and_the_batch():
    plans = list(plans_of(member("d512-E8-k2"), topology_of("v5p:2x2x1")))
    assert {(plan.mesh.fsdp, plan.mesh.expert) for plan in plans} == {(4, 1), (2, 2), (1, 4)}
    assert {plan.model.remat for plan in plans} == {"none", "dots", "full"}
    fewer = [plan for plan in plans if plan.train.gradient_accumulation == 64 and plan.model.remat == "full"]
    assert max(map(expected_bytes, fewer)) < min(
        expected_bytes(plan) for plan in plans if plan.train.gradient_accumulation == 1 and plan.model.remat == "none"
    )


def compiled_as(needed, slower, limit):
    """A compiler for which plans need so many times what is expected, and take so many times as long."""
    compiled = []

    def check(plan, topology):
        compiled.append(plan)
        peak = round(needed * expected_bytes(plan))
        time = StepTime(slower * max(expected_seconds(plan, topology)), 0.0, 0.0) if peak <= limit else None
        return Fit(
            member=plan.name, topology=topology.name, mesh=plan.mesh, what="train", remat=plan.model.remat,
            gradient_accumulation=plan.train.gradient_accumulation, devices=16, fits=peak <= limit, limit=limit,
            peak=peak, arguments=None, outputs=None, temporaries=None, operations=None, room=1.0, model_flops=1,
            exchanges=(), tokens=1, compile_seconds=0.0, estimate=time,
        )  # fmt: skip

    return check, compiled


@pytest.mark.parametrize("needed", [0.7, 1.25, 1.6, 3.0])
def test_the_search_finds_the_fastest_plan_that_fits_in_a_few_compilations(needed, monkeypatch):
    run, topology, limit = member("d1024-E64-k8"), topology_of("v6e:4x4"), 31 * GIB
    check, compiled = compiled_as(needed, 1.2, limit)
    monkeypatch.setattr(fit_search, "check_fit", check)
    monkeypatch.setattr(fit_search, "memory_limit", lambda topology: limit)
    best = fit_search.search(run, topology, tries=6)[0]
    possible = [plan for plan in plans_of(run, topology) if needed * expected_bytes(plan) <= limit]
    fastest = min(max(expected_seconds(plan, topology)) for plan in possible)
    assert best.fits
    assert best.estimate.seconds == pytest.approx(1.2 * fastest)
    assert len(compiled) <= 4


def test_a_search_where_nothing_fits_ends_with_what_lacks_the_least(monkeypatch):
    run, topology, limit = member("d2048-E128-k16"), topology_of("v6e:2x2"), 31 * GIB
    check, compiled = compiled_as(1.0, 1.2, limit)
    monkeypatch.setattr(fit_search, "check_fit", check)
    monkeypatch.setattr(fit_search, "memory_limit", lambda topology: limit)
    fits = fit_search.search(run, topology, tries=3)
    assert len(compiled) == 3
    assert not any(fit.fits for fit in fits)
    assert fits[0].peak == min(map(expected_bytes, plans_of(run, topology)))


def test_the_command_needs_a_member_and_a_topology():
    def run(*arguments):
        command = [sys.executable, "-m", "experiments.fit_check", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--config=paper_math.py", "--topology=v5e:2x2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--member is missing: paper_math has 65" in done.stderr
    done = run("--config=paper_math.py:d512-E8-k2")
    assert done.returncode == 2
    assert "--topology is missing; for example one of v4:4x4x4" in done.stderr


def test_the_table_says_what_was_compiled():
    entry = {
        "topology": "v5p:2x2x1", "mesh": {"fsdp": 4}, "peak": 2 * GIB, "limit": 95 * GIB, "remat": "full",
        "gradient_accumulation": 8,
    }  # fmt: skip
    text = table(["a", "b"], ["v5p", "v6e"], {"a v5p": entry, "a v6e": None})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == (
        "| a | v5p:2x2x1 (fsdp=4): 2 of 95 GiB; remat full, 8 micro-batches | none up to v6e:16x16 |"
    )
    assert rows[3] == "| b | not compiled yet | not compiled yet |"


def test_the_smallest_slice_is_found_by_compiling():
    run = small(member("d512-E8-k2"))
    fit = smallest_fit(run, "v5e")
    assert (fit.topology, fit.fits) == ("v5e:2x2", True)


def test_the_next_mesh_is_tried_where_the_thriftiest_plan_does_not_fit(monkeypatch):
    """The count is not exact enough at the limit: d2048-E16-k16 fits on two H100s with the second mesh alone."""
    run, limit = member("d512-E8-k2"), 31 * GIB
    check, compiled = compiled_as(1.0, 1.0, limit)

    def check_but_first(plan, topology):
        fit = check(plan, topology)
        return fit if len(compiled) > 1 else dataclasses.replace(fit, fits=False)

    monkeypatch.setattr(fit_table, "check_fit", check_but_first)
    topology_of("v6e:2x2")
    found = smallest_fit(run, "v6e")
    assert (found.topology, found.fits, len(compiled)) == ("v6e:2x2", True, 2)
    assert compiled[0].mesh != compiled[1].mesh
    assert expected_bytes(compiled[0]) <= expected_bytes(compiled[1])


def test_a_table_is_filled_and_entries_are_compared_with_those_before(monkeypatch):
    check, _ = compiled_as(1.0, 1.0, 31 * GIB)
    monkeypatch.setattr(fit_table, "check_fit", lambda *plan: dataclasses.replace(check(*plan), estimate=None))
    members = Study.from_config_dict(load_config("paper_math.py:d512-E8-k2+d512-E16-k2")).members
    topology_of("v6e:2x2")
    results = {}
    assert len(list(fill(results, members, ["v6e"], limit=1))) == 1
    (first,) = results
    results[first] = {**results[first], "peak": 2 * results[first]["peak"]}
    (said,) = fill(results, members, ["v6e"])
    assert said.startswith(f"{members[1].name}, v6e: v6e:2x2 (")
    again, more = fill(results, members, ["v6e"], again=True)
    assert again.endswith("; 0.500 times the memory of before")
    assert more.endswith("; 1.000 times the memory of before")
    results[first] = None
    again, _ = fill(results, members, ["v6e"], again=True)
    assert again.endswith("; before, none fits")
    names = [member.name for member in members]
    assert rows_and_columns(results, ["other"], ["h100"]) == ([*names, "other"], ["v6e", "h100"])


def test_versions_do_not_depend_on_the_compilers_used_before():
    """Else a table would be started again from nothing whenever its command is."""
    before = versions()
    topology_of("h100:1")
    assert versions() == before
    assert {"jax", "jaxlib", "jax-cuda12-plugin"} <= set(before)
