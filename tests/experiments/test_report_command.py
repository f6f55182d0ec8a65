"""`python -m experiments.report`: where the page is, and mistakes in one line."""

import subprocess
import sys

from jaxmoe.evaluation.records import make_record, write_record
from jaxmoe.storage import write_json


def report(*arguments):
    """Runs the command."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.report", *arguments], capture_output=True, text=True, check=False
    )


def write_study(directory):
    """One member, evaluated once."""
    size = {"total_parameters": 1000, "active_parameters": 500, "flops_per_token": 3000, "tokens_per_parameter": 2.0,
            "sparsity": 0.5, "num_experts": 2, "experts_per_token": 1, "learning_rate": 0.01}  # fmt: skip
    identity = {
        **size, "study": "tiny", "member": "E2", "arm": "E2", "slices": "main", "seed": 0, "evaluation": "training",
        "source": "all", "split": "train", "step": 2, "tokens": 2000, "init_std": 0.02, "config_hash": "0" * 16,
        "device": "cpu x1", "dropped_fraction": 0.0,
    }  # fmt: skip
    write_record(directory / "E2", make_record(identity, {"loss": 1.5}))
    write_json(directory / "E2" / "DONE", {"step": 2})
    member = {"name": "E2", "arm": "E2", "seed": 0, "slices": ["main"], "tokens": 2000, "steps": 2, **size}
    write_json(directory / "study.json", {"name": "tiny", "title": "Tiny", "members": [member]})


def test_it_says_where_the_page_is(tmp_path):
    write_study(tmp_path / "study")
    done = report(f"--workdir={tmp_path / 'study'}", f"--output={tmp_path / 'page'}")
    assert (done.returncode, done.stdout) == (0, f"report: {tmp_path / 'page' / 'index.html'}\n"), done.stderr
    assert "1.500" in (tmp_path / "page" / "index.html").read_text()
    assert not (tmp_path / "study" / "report").exists()


def test_a_folder_without_a_study_is_one_line_and_status_2(tmp_path):
    failed = report(f"--workdir={tmp_path}")
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path} has no study.json, so it is not the folder of a study.\n"


def test_a_misspelt_flag_is_one_line_and_status_2(tmp_path):
    failed = report(f"--wrkdir={tmp_path}")
    assert failed.returncode == 2
    assert failed.stderr == "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?\n"
