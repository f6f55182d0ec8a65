"""Tables made of records."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from jaxmoe.config import ConfigError
from jaxmoe.evaluation import make_record, write_record
from jaxmoe.scaling import read_records, records_table, results_table
from jaxmoe.scaling.results import loss_accuracy_gap, sift_records


def record(member, step, evaluation, source, split, **numbers):
    identity = {
        "study": "s", "member": member, "arm": member, "slices": "old", "seed": 0, "evaluation": evaluation,
        "source": source, "split": split, "step": step, "tokens": step * 100, "total_parameters": 1000,
        "active_parameters": 500, "flops_per_token": 3000, "tokens_per_parameter": 0.1 * step, "sparsity": 0.5,
        "num_experts": 4, "experts_per_token": 2, "learning_rate": 1e-3, "init_std": 0.02, "config_hash": "ab",
        "device": "cpu x1", "dropped_fraction": 0.0,
    }  # fmt: skip
    return make_record(identity, numbers)


@pytest.fixture
def study_dir(tmp_path):
    members = [{"name": name, "slices": ["headline"]} for name in ("E8", "E2")]
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "members": members}))
    losses = {("E8", 10): (2.0, 0.5), ("E8", 20): (1.0, 0.8), ("E2", 20): (3.0, 0.2)}
    for (member, step), (loss, accuracy) in losses.items():
        for split, shift in (("train", 0.0), ("test", 0.25)):
            task = record(
                member, step, "task", "reasoning", split, loss=loss + shift, accuracy=accuracy - shift,
                bits_per_token=1.5 * loss + shift, bits_per_byte=loss, accuracy_standard_error=0.01,
            )  # fmt: skip
            write_record(tmp_path / member, task)
        write_record(tmp_path / member, record(member, step, "training", "all", "train", loss=loss - 0.125))
        write_record(tmp_path / member, record(member, step, "training", "reasoning", "train", loss=loss - 0.5))
        write_record(tmp_path / member, record(member, step, "validation", "reasoning", "test", loss=loss + 0.5))
    return tmp_path


def test_records_come_in_the_studys_order_with_its_slices(study_dir):
    records = read_records(study_dir)
    assert len(records) == 15
    assert [entry["member"] for entry in records] == ["E8"] * 10 + ["E2"] * 5
    assert {entry["slices"] for entry in records} == {"headline"}, "study.json knows better than an old record"
    assert len(records_table(records)) == 15


def test_one_row_for_each_member_and_step(study_dir):
    table = results_table(study_dir)
    assert list(zip(table["member"], table["step"], table["last"])) == [
        ("E8", 10, False), ("E8", 20, True), ("E2", 20, True),
    ]  # fmt: skip
    np.testing.assert_allclose(table["training_loss"], [1.875, 0.875, 2.875])
    np.testing.assert_allclose(table["training_loss/reasoning"], [1.5, 0.5, 2.5])
    np.testing.assert_allclose(table["validation_loss/reasoning/test"], [2.5, 1.5, 3.5])
    np.testing.assert_allclose(table["bits_per_token/reasoning/test"], [3.25, 1.75, 4.75])
    np.testing.assert_allclose(table["accuracy/reasoning/test"], [0.25, 0.55, -0.05])
    assert table["tokens"].tolist() == [1000, 2000, 2000]


def test_gaps(study_dir):
    table = results_table(study_dir)
    np.testing.assert_allclose(table["generalization_gap/reasoning"], 0.25)
    np.testing.assert_allclose(table["accuracy_gap/reasoning"], 0.25)
    np.testing.assert_allclose(table["task_minus_training_loss/reasoning"], 0.375)


def test_gaps_are_against_corrected_solutions_where_there_are_any(study_dir):
    """E8 has them at its last step; its own row changes and no other."""
    write_record(
        study_dir / "E8",
        record("E8", 20, "task", "reasoning", "train_clean", loss=1.0, bits_per_token=1.7, accuracy=0.6),
    )
    table = results_table(study_dir)
    np.testing.assert_allclose(table["generalization_gap/reasoning"], [0.25, 0.05, 0.25])
    np.testing.assert_allclose(table["accuracy_gap/reasoning"], [0.25, 0.05, 0.25])


def test_records_of_another_configuration_are_left_out(study_dir):
    study = json.loads((study_dir / "study.json").read_text())
    for member, config_hash in zip(study["members"], ("ab", "cd")):
        member["config_hash"] = config_hash
    (study_dir / "study.json").write_text(json.dumps(study))
    kept, foreign = sift_records(study_dir)
    assert {entry["member"] for entry in kept} == {"E8"}
    assert foreign == {"E2": 5}
    assert set(results_table(study_dir)["member"]) == {"E8"}


def test_the_loss_accuracy_gap_is_what_a_falling_function_of_the_loss_leaves():
    loss = pd.Series([1.0, 2.0, 3.0, 4.0, math.nan])
    accuracy = pd.Series([0.9, 0.4, 0.6, 0.1, 0.5])
    gap = loss_accuracy_gap(loss, accuracy)
    np.testing.assert_allclose(gap, [0.0, -0.1, 0.1, 0.0, math.nan], atol=1e-12)
    assert loss_accuracy_gap(loss[:2], accuracy[:2]).isna().all()


def test_points_of_equal_loss_share_one_expectation():
    gap = loss_accuracy_gap(pd.Series([1.0, 1.0, 2.0]), pd.Series([0.9, 0.7, 0.1]))
    np.testing.assert_allclose(gap, [0.1, -0.1, 0.0], atol=1e-12)


def test_a_study_without_records_gives_an_empty_table(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "members": [{"name": "E2", "slices": ["main"]}]}))
    table = results_table(tmp_path)
    assert len(table) == 0
    assert "training_loss" not in table


def test_a_folder_that_is_no_study_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no study\.json"):
        read_records(tmp_path)


def test_a_broken_record_is_named(study_dir):
    path = study_dir / "E2" / "records" / "task-reasoning-test-00000020.json"
    broken = json.loads(path.read_text())
    del broken["seed"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"task-reasoning-test-00000020\.json: record without field 'seed'"):
        read_records(study_dir)
