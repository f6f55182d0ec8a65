"""Records: schema, file names."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.evaluation.records import make_record, record_file, set_aside, validate_record, write_record


def identity(**changes):
    fields = {
        "study": "s", "member": "E2-seed0", "arm": "E2", "slices": "main,topk", "seed": 0, "evaluation": "task",
        "source": "reasoning", "split": "test", "step": 600, "tokens": 1200, "total_parameters": 100,
        "active_parameters": 50, "flops_per_token": 300, "tokens_per_parameter": 12.0, "sparsity": 0.5,
        "num_experts": 4, "experts_per_token": 2, "learning_rate": 1e-3, "init_std": 0.02, "config_hash": "ab",
        "device": "cpu x1", "dropped_fraction": 0.0,
    }  # fmt: skip
    return {**fields, **changes}


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = make_record(identity(), {"loss": np.float32(0.5), "examples": np.int64(7), "bits": jnp.float32(2.0)})
    path = write_record(tmp_path, record)
    assert path.name == "task-reasoning-test-00000600.json"
    assert json.loads(path.read_text()) == {**identity(), "loss": 0.5, "examples": 7, "bits": 2.0}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    record = make_record(identity(), {"loss": float("nan"), "bits": np.float32("inf")})
    assert record["loss"] is None
    assert record["bits"] is None
    assert "NaN" not in write_record(tmp_path, record).read_text()


def test_writing_again_replaces(tmp_path):
    write_record(tmp_path, make_record(identity(), {"loss": 1.0}))
    write_record(tmp_path, make_record(identity(), {"loss": 2.0}))
    files = list((tmp_path / "records").iterdir())
    assert [json.loads(file.read_text())["loss"] for file in files] == [2.0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"step": 1.5}, "step=1.5"),
        ({"step": True}, "step=True"),
        ({"evaluation": "tasks"}, "Did you mean 'task'"),
        ({"loss": float("nan")}, "not finite"),
        ({"loss": [1.0]}, "flat"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused_and_not_written(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write_record(tmp_path, identity(**broken))
    assert not (tmp_path / "records").exists()


def test_a_missing_field_is_named():
    record = identity()
    del record["seed"]
    with pytest.raises(ValueError, match="'seed'"):
        validate_record(record)


def test_a_number_may_not_replace_the_identity():
    with pytest.raises(ValueError, match="step"):
        make_record(identity(), {"step": 3})


def test_arrays_are_refused_except_the_expert_load():
    with pytest.raises(ValueError, match="scalars only"):
        make_record(identity(), {"loss": np.zeros(2)})
    record = make_record(identity(), {"expert_load": np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)})
    assert record["expert_load"] == [[0.25, 0.75], [0.5, 0.5]]


def test_records_of_an_earlier_configuration_are_set_aside(tmp_path):
    assert set_aside(tmp_path, "new") == 0
    for config_hash, step in (("old", 100), ("old", 200), ("new", 300)):
        write_record(tmp_path, make_record(identity(config_hash=config_hash, step=step), {"loss": 1.0}))
    assert set_aside(tmp_path, "new") == 2
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.json")}
    assert names == {
        "records/task-reasoning-test-00000300.json",
        "earlier_records/old/task-reasoning-test-00000100.json",
        "earlier_records/old/task-reasoning-test-00000200.json",
    }
    assert set_aside(tmp_path, "new") == 0


def test_different_sources_never_share_a_file():
    names = {record_file(identity(source=source)) for source in ("a/b", "a_b", "a b", "a%2Fb", "ab")}
    assert len(names) == 5
    assert not any("/" in name for name in names)
