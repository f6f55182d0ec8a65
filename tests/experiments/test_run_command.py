"""`python -m experiments.run` as a user starts it: dry runs, a short study to its report, mistakes."""

import fcntl
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (REPOSITORY / "experiments" / "configs").glob("[!_]*.py"))
COUNTS = {"total_parameters", "active_parameters", "flops_per_token", "tokens", "seed"}
NUMBERS = {"tokens_per_parameter", "sparsity"}


def run(*arguments, module="experiments.run", folder=REPOSITORY, check=0):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("config", CONFIGS)
def test_dry_run_prints_every_member(config):
    """One object a member, whatever the file: counts are integers, names are distinct."""
    members = json.loads(run(f"--config=experiments/configs/{config}", "--dry_run", "--json").stdout)
    assert members
    assert len({member["name"] for member in members}) == len(members)
    for member in members:
        assert {"name", *COUNTS, *NUMBERS} <= set(member)
        assert all(type(member[key]) is int for key in COUNTS)
        assert member["tokens_per_parameter"] == pytest.approx(member["tokens"] / member["total_parameters"])
        assert member["flops_per_token"] == 6 * member["active_parameters"]


def test_the_micro_study_has_members_on_both_sides_of_twenty_tokens_per_parameter():
    members = json.loads(run("--config=micro_study.py:headline", "--dry_run", "--json").stdout)
    ratios = {member["num_experts"]: member["tokens_per_parameter"] for member in members}
    assert sorted(ratios) == [2, 4, 8, 16, 32, 64]
    assert ratios[4] > 20 > ratios[8]
    assert {member["seed"] for member in members} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=quickstar.py"], "Did you mean 'quickstart.py'?"),
        (["--config=quickstart.py", "--config.train.stepz=3"], "--config.train.stepz. Did you mean 'steps'?"),
        (["--config=quickstart.py", "--dry_run", "--member=E9"], "unknown member 'E9'. Did you mean 'E"),
        (["--config=quickstart.py", "--json"], "--json goes with --dry_run"),
        (["--config=quickstart.py", "--dry_run", "--config.model.moe.num_experts=4"], "every member sets"),
        (["--config=quickstart.py", "--config.model.vocab_size=200"], "smaller than the tokenizer's 276"),
        (["--config=quickstart.py", "--dry_run", "--config.model.vocab_size=200"], "smaller than the tokenizer's 276"),
        (["--config=quickstart.py", "--dry_run", "--config.train.steps=0.5"], "--config.train.steps=0.5"),
        (["--config=quickstart.py", "--dry_run", "--membr=E2"], "Did you mean: member"),
        (
            ["--config=quickstart.py", "--dry_run", "--config.members.E64.model.moe.expert_hidden=128"],
            "E64",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_two(arguments, message, tmp_path):
    done = run(*arguments, f"--workdir={tmp_path / 'study'}", check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("study/*/checkpoints"))


def test_an_unmatched_member_is_refused_with_both_numbers():
    done = run("--config=quickstart.py", "--dry_run", "--config.members.E64.model.moe.expert_hidden=128", check=2)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{4,}", done.stderr)]
    assert 119_360 in numbers
    assert any(number > 170_000 for number in numbers)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A three-member study of a few steps, run from another folder."""
    folder = tmp_path_factory.mktemp("user")
    arguments = (
        "--config=quickstart.py", "--workdir=study", "--config.train.steps=6", "--config.train.warmup_steps=2",
        "--config.train.log_every=1", "--config.evaluation.points=2", "--config.evaluation.examples=64",
        "--config.evaluation.validation_rows=64", "--config.data.sources.knowledge.entities=200",
    )  # fmt: skip
    return folder, arguments, run(*arguments, folder=folder)


def test_a_study_leaves_records_of_every_member(study):
    folder, _, done = study
    assert "done: study" in done.stdout
    for member in ("E2", "E8", "E64"):
        directory = folder / "study" / member
        assert len((directory / "metrics.jsonl").read_text().splitlines()) == 6
        assert (directory / "DONE").exists()
        record = json.loads((directory / "records" / "task-reasoning-test-00000006.json").read_text())
        assert record["member"] == member
        assert 0 <= record["accuracy"] <= 1
        assert record["dropped_fraction"] == 0
        assert record["bits_per_token"] > 0


def test_run_again_skips_what_is_done(study):
    folder, arguments, _ = study
    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    done = run(*arguments, folder=folder)
    assert done.stderr.count("done before, skipped") == 3
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == before


def test_a_folder_of_another_configuration_shows_the_difference(study):
    folder, arguments, _ = study
    done = run(*arguments, "--config.train.learning_rate=0.001", folder=folder, check=2)
    assert "train.learning_rate" in done.stderr
    assert "--resume=force" in done.stderr


def test_the_report_follows(study):
    folder, _, _ = study
    done = run("--workdir=study", module="experiments.report", folder=folder)
    page = folder / done.stdout.strip().splitlines()[-1].split("report: ")[-1]
    assert page.name == "index.html"
    assert (page.parent / "summary.png").stat().st_size > 10_000


def test_readme_examples_run(monkeypatch, capsys, tmp_path):
    """Every Python block of the README does what it says, from any folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scopes = []
    for block in blocks:
        scope = {}
        exec(compile(block, "README.md", "exec"), scope)
        scopes.append(scope)
    assert scopes[0]["y"].shape == (4, 16, 64)
    assert capsys.readouterr().out.strip() == "d512-E8-k2-320M-A170M 320160256"


_IMPATIENT = """
import runpy
from jaxmoe import exclusive
exclusive._SECONDS_OF_A_LEASE = 0.2
runpy.run_module("experiments.run", run_name="__main__")
"""


def test_a_folder_that_another_host_holds_is_to_be_tried_again(tmp_path):
    """By a lock whose file says that its holder is elsewhere; status 75, and nothing is written there."""
    lock = tmp_path / "E2" / ".lock"
    lock.parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7 on lost-host")
        file.flush()
        done = subprocess.run(
            [sys.executable, "-c", _IMPATIENT, "--config=quickstart.py", f"--workdir={tmp_path}", "--member=E2"],
            cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "not now: " in done.stderr
    assert "process 7 on lost-host is training in this folder now" in done.stderr
    assert [path.name for path in lock.parent.iterdir()] == [".lock"]
