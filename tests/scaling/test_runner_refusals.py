"""What keeps a study from starting is found before anything is trained, and changes nothing in its folder."""

import json
import shutil

import pytest

from jaxmoe.config import ConfigError
from jaxmoe.exclusive import exclusive
from jaxmoe.scaling import preflight, read_records, run_study
from jaxmoe.training.description import _checksum as checksum
from pallas_kernels import native

from .tiny_study import contents, study_of


def test_a_folder_of_another_configuration_is_refused_with_the_difference(copied):
    before = contents(copied)
    changed = study_of(train__weight_decay=0.5)
    with pytest.raises(ConfigError) as error:
        run_study(changed, copied)
    message = str(error.value)
    for part in ("train.weight_decay", "0.1", "0.5", "--resume=force", "another folder", "first"):
        assert part in message
    assert contents(copied) == before


def test_a_folder_of_another_study_is_refused(copied):
    with pytest.raises(ConfigError, match="study.name is 'tiny' in the folder, 'other' now"):
        run_study(study_of(study__name="other"), copied)


def test_a_study_does_not_start_while_another_process_trains_a_member(tmp_path):
    with exclusive(tmp_path / "second"), pytest.raises(ConfigError, match="second: process .* is training in this"):
        run_study(study_of(), tmp_path)
    assert not (tmp_path / "first").exists()
    assert not (tmp_path / "study.json").exists()


def test_a_checkpoint_of_a_newer_version_is_noticed_before_anything_is_trained(copied):
    (copied / "second" / "DONE").unlink()
    shutil.rmtree(copied / "first")
    path = copied / "second" / "checkpoints" / "8" / "metadata" / "metadata"
    newer = {**json.loads(path.read_text()), "format_version": 99}
    newer.pop("checksum")
    path.write_text(json.dumps({**newer, "checksum": checksum(newer)}))
    with pytest.raises(ConfigError, match="member 'second': the checkpoint of step 8 .* has format 99"):
        run_study(study_of(), copied)
    assert not (copied / "first").exists()
    path.write_text("{")  # damaged: the one before it will be taken
    run_study(study_of(), copied)
    assert (copied / "second" / "unreadable_checkpoints" / "8").is_dir()


def test_force_does_not_relabel_a_finished_member(copied):
    before = contents(copied) | {"config": (copied / "first" / "config.json").read_bytes()}
    with pytest.raises(ConfigError, match="finished run") as error:
        run_study(study_of(train__weight_decay=0.5), copied, resume="force")
    assert "train.weight_decay: 0.1 in the folder, 0.5 now" in str(error.value)
    assert contents(copied) | {"config": (copied / "first" / "config.json").read_bytes()} == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"members": 3}'])
def test_a_broken_study_file_is_named(copied, content):
    (copied / "study.json").write_text(content)
    for use in (lambda: run_study(study_of(), copied), lambda: read_records(copied)):
        with pytest.raises(ConfigError, match=r"study\.json .*; restore it, or delete it and run the study again"):
            use()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__vocab_size": 100}, r"member 'first': model\.vocab_size=100 is smaller than the tokenizer's \d+"),
        ({"model__moe__backend": "tpu"}, "member 'first': model.moe.backend='tpu' runs on TPU .* platform is 'cpu'"),
        ({"model__attention": "splash"}, "member 'first': model.attention='splash': it runs on TPUs"),
        ({"train__sequence_length": 8}, r"member 'first': .*sequence_length=\d+ or more is needed"),
        (
            {"members__second__data": {"sources": {"text": {"kind": "text", "weight": 0.0, "paths": ("no/such.txt",)}}},
             "members__second__slices": ("other",)},
            r"member 'second': .*no/such\.txt",
        ),
        ({"members__second__train__steps": 9}, r"tokens fixed, but member 'second'"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_known_before_training(tmp_path, values, message):
    study = study_of(**values)
    if "text" in message or "such" in message:
        study = study_of(**values, data__tokenizer="bytes", model__max_sequence_length=64, train__sequence_length=32)
    with pytest.raises(ConfigError, match=message):
        run_study(study, tmp_path)
    assert not (tmp_path / "first").exists()
    assert not (tmp_path / "study.json").exists()


def test_a_disk_too_small_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"no space left for the checkpoints of 2 members: .* KB are needed"):
        run_study(study_of(), tmp_path)


def test_checkpoints_that_are_there_need_no_space_again(copied, monkeypatch):
    """Of two members with two checkpoints each, one more is needed while it is being written."""
    for name in ("first", "second"):
        (copied / name / "DONE").unlink()
    usage = shutil.disk_usage(copied)
    size = preflight.checkpoint_bytes(study_of().members[0])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert run_study(study_of(), copied).status == "done"
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    assert run_study(study_of(), copied).status == "done", "all are done, nothing is needed"
    (copied / "first" / "DONE").unlink()
    with pytest.raises(ConfigError, match="no space left for the checkpoints of 1 members"):
        run_study(study_of(), copied)


def test_a_compiled_backend_that_was_not_built_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", str(tmp_path / "nothing"))
    native.load.cache_clear()
    with pytest.raises(ConfigError, match="member 'first': model.moe.backend='cpu_native' .*build_native"):
        run_study(study_of(model__moe__backend="cpu_native"), tmp_path / "study")
    with pytest.raises(ConfigError, match="float32 alone, but model.compute_dtype='bfloat16'"):
        run_study(study_of(model__moe__backend="cpu_native", model__compute_dtype="bfloat16"), tmp_path / "study")
    assert not (tmp_path / "study" / "first").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        run_study(study_of(), tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written to"):
        run_study(study_of(), tmp_path / "file" / "folder")


def test_a_bucket_that_is_not_there_is_said_to_be_missing(bucket):
    with pytest.raises(ConfigError, match="gs://none/study cannot be written to: there is no such bucket"):
        run_study(study_of(), "gs://none/study")
