"""GRPO members of a study: where they start from, their records, their report, and what is refused beforehand."""

import json

import pytest

from jaxmoe.config import ConfigError, to_dict
from jaxmoe.scaling import Study, results_table, run_study
from jaxmoe.scaling.preflight import preflight
from jaxmoe.scaling.report import build_report


def study_of(run, start_from, **grpo):
    """A study of one member like `run`, which starts from the folder of its name."""
    sections = {key: value for key, value in to_dict(run).items() if key in ("model", "data", "train", "evaluation")}
    return Study.from_config_dict({
        "study": {"name": "after"}, "seeds": (run.seed,), **sections, "start_from": f"{start_from}/{{member}}",
        "grpo": {**to_dict(run.grpo), **grpo}, "members": {"small": {"name": "pretrained"}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def starts(pretrained, tmp_path_factory):
    """A folder of runs, of which one is `pretrained`."""
    folder = tmp_path_factory.mktemp("starts")
    (folder / "pretrained").symlink_to(pretrained)
    return folder


@pytest.fixture(scope="module")
def finished(grpo_run, starts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("after")
    study = study_of(grpo_run, starts)
    return folder, study, run_study(study, folder)


def test_the_member_starts_from_the_run_of_its_name(finished, starts):
    folder, study, outcome = finished
    assert outcome.status == "done"
    assert study.members[0].config.start_from == f"{starts}/pretrained"
    assert json.loads((folder / "pretrained" / "DONE").read_text())["step"] == 4
    assert run_study(study, folder).members[0].status == "skipped"


def test_rewards_of_greedy_responses_are_recorded_before_and_after(finished):
    folder = finished[0]
    table = results_table(folder)
    assert table.step.tolist() == [0, 2, 4]
    assert table["reward/reasoning/test"].between(0, 1).all()
    # Exact match of the written answer, when the end token has to come after it, is exact match with teacher forcing
    # or less.
    assert (table["reward/reasoning/test"] <= table["accuracy/reasoning/test"] + 1e-9).all()
    record = json.loads((folder / "pretrained/records/reward-reasoning-test-00000000.json").read_text())
    assert (record["examples"], record["skipped"], record["tokens"]) == (8, 0, 0)
    last = json.loads((folder / "pretrained/records/reward-reasoning-test-00000004.json").read_text())
    assert last["tokens"] == 4 * 4 * 5 * 12


def test_the_report_shows_before_and_after(finished):
    folder = finished[0]
    page = build_report(folder, svg=False)
    text = page.read_text()
    assert "Before and after GRPO" in text
    assert "Training curves" not in text  # the loss of GRPO is none of a language model
    lines = (page.parent / "main-grpo.csv").read_text().splitlines()
    assert lines[0].startswith("source,split,metric,arm,seed,member,total_parameters,when,step,value")
    assert len(lines) == 1 + 2 * 2  # reward and accuracy, before and after


def test_the_tables_count_rollouts(finished):
    study = finished[1]
    summary = study.members[0].summary()
    assert summary["tokens"] == 4 * 4 * 5 * 12
    assert summary["grpo"] == {
        "prompts_per_step": 4, "group_size": 5, "responses_per_step": 20, "updates_per_step": 2,
        "responses_per_update": 10, "max_prompt_tokens": 8, "max_response_tokens": 4, "reward": "exact",
    }  # fmt: skip
    assert "GRPO, per rollout step" in study.describe()


def test_what_is_missing_is_known_before_the_first_step(grpo_run, starts, tmp_path, monkeypatch):
    study = study_of(grpo_run, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"member 'pretrained': start_from=.*nowhere/pretrained: no such folder"):
        preflight(study, study.members, tmp_path)
    study = study_of(grpo_run, starts, max_prompt_tokens=3)
    with pytest.raises(ConfigError, match="member 'pretrained': source 'reasoning': none of its 20 prompts has 1..3"):
        preflight(study, study.members, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    study = study_of(grpo_run, starts, reward="math")
    with pytest.raises(ConfigError, match=r"member 'pretrained': .*pip install 'jaxmoe\[post\]'"):
        preflight(study, study.members, tmp_path)
