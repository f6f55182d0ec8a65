"""`python -m experiments.test_time_compute`: the plan, and mistakes in one line."""

import json
import subprocess
import sys

CONFIG = "--config=experiments/configs/paper_ttc.py:d512-E8-k2"


def command(*arguments):
    """Runs the command."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.test_time_compute", *arguments], capture_output=True, text=True, check=False
    )


def test_the_plan_of_the_papers_study():
    done = command(CONFIG, "--dry_run", "--json")
    assert done.returncode == 0, done.stderr
    (member,) = json.loads(done.stdout)
    assert (member["samples"], member["temperature"], member["top_p"]) == (128, 0.6, 0.95)
    assert member["tokens_per_problem"] == 128 * 1024
    assert member["sources"] == ["gsm8k_zero_shot"]


def test_a_folder_without_a_trained_member_is_one_line_and_status_2(tmp_path):
    failed = command(CONFIG, f"--workdir={tmp_path}")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {tmp_path} has no trained member of 'paper_ttc'")
    assert failed.stderr.count("\n") == 1
