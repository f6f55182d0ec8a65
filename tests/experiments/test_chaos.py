"""`python -m experiments.chaos`: killed at random moments and resumed, a run ends as undisturbed, bit for bit."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.disturbance import plan_kills
from experiments.end_state import differences

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = """
import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.study = {"name": "tiny", "title": "Tiny"}
    config.model = {
        "vocab_size": 288, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8},
    }
    config.data = {"tokenizer": "symbols", "sources": {
        "knowledge": {"kind": "knowledge", "entities": 40, "test_entities": 8},
        "sums": {"kind": "reasoning", "problems": 50, "test_problems": 8},
    }}
    config.train = {"steps": 60, "batch_size": 4, "sequence_length": 16, "log_every": 1, "checkpoint_every": 7}
    config.evaluation = {"points": 2, "examples": 8, "validation_rows": 8}
    config.members = {"E2": {"model": {"moe": {"num_experts": 2}}}, "E4": {}}
    return config
"""


def chaos(folder, *arguments, devices=1):
    (folder / "tiny.py").write_text(CONFIG)
    xla = {} if devices == 1 else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.chaos", f"--config={folder / 'tiny.py'}", *arguments],
        cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"} | xla, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Three kills: while a step is computed, while a checkpoint is being written, before the first step."""
    folder = tmp_path_factory.mktemp("chaos")
    done = chaos(folder, "--member=E4", "--kills=3", f"--workdir={folder / 'runs'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs", done.stdout


def test_it_says_where_each_kill_fell_and_that_the_ends_are_the_same(killed):
    _, said = killed
    assert "undisturbed: 60 steps of E4" in said
    kills = re.findall(r"^kill \d: (KILL|TERM|INT) .*(killed|exit status 75)\)", said, re.MULTILINE)
    assert len(kills) == 3
    assert {signal: status for signal, status in kills}["KILL"] == "killed"
    assert all(status == "exit status 75" for signal, status in kills if signal != "KILL")
    for part in ("parameters", "optimizer state", "counters and random key", "data position", "metrics.jsonl"):
        assert f"  {part}: bit-identical" in said
    assert said.splitlines()[-2] == "bit-identical to the undisturbed run"


def test_the_log_has_every_step_once(killed):
    folder, _ = killed
    lines = (folder / "killed" / "E4" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))


def test_on_a_mesh_of_eight_devices_the_end_is_as_undisturbed(tmp_path):
    """Parameters over fsdp, experts over expert."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=4", "--config.train.batch_size=8")
    few = ("--config.train.steps=24", "--config.train.checkpoint_every=5", "--config.evaluation.points=1",
           "--config.evaluation.generate=False")  # fmt: skip
    done = chaos(tmp_path, "--member=E4", "--kills=2", "--signals=KILL,TERM", *mesh, *few, devices=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 2 of 2 times: 24 steps" in done.stdout
    assert done.stdout.splitlines()[-1] == "bit-identical to the undisturbed run"


def test_what_differs_is_found(killed, tmp_path):
    """One more line of log, a record less, and the checkpoint before the last."""
    undisturbed, other = killed[0] / "undisturbed" / "E4", shutil.copytree(killed[0] / "killed" / "E4", tmp_path / "E4")
    assert not any(differences(undisturbed, other).values())
    with open(other / "metrics.jsonl", "a") as log:
        log.write('{"step": 61}\n')
    (other / "records" / "task-sums-test-00000060.json").unlink()
    shutil.rmtree(other / "checkpoints" / "60")
    found = differences(undisturbed, other)
    assert found["metrics.jsonl"] == ["line 61 (60 and 61 lines)"]
    assert found["records"] == ["task-sums-test-00000060.json"]
    assert {"iterator", "rows", "step"} <= set(found["data position"])
    assert "step" in found["counters and random key"]
    assert "params/output" in {name.removesuffix("/value") for name in found["parameters"]}
    assert found["optimizer state"]


@given(st.integers(3, 12), st.integers(1, 2000), st.sampled_from([("KILL", "TERM", "INT"), ("TERM",)]), st.integers(0))
def test_planned_kills_rise_and_leave_nothing_out(kills, steps, signals, seed):
    plans = plan_kills(kills, steps, signals, seed)
    places = [plan.step for plan in plans]
    assert len(plans) == kills
    assert places == sorted(places)
    assert all(1 <= place <= max(1, 0.9 * steps) for place in places)
    assert {plan.moment for plan in plans} == {"training", "saving", "starting"}
    assert {plan.signal for plan in plans} <= set(signals)
    assert plans == plan_kills(kills, steps, signals, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--signals=STOP"], "--signals=STOP; choose of KILL, TERM, INT"),
        (["--member=E3"], "unknown member 'E3'"),
        (["--workdir={folder}"], "not empty; both runs must begin at their beginning"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(tmp_path, arguments, message):
    done = chaos(tmp_path, *(argument.format(folder=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
