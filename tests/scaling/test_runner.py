"""Running a study: what is written, resumed, skipped, refused; nothing that was done is lost."""

import copy
import errno
import json
import math
import os
import shutil
import signal

import pytest

from jaxmoe.config import ConfigError, config_hash
from jaxmoe.exclusive import exclusive
from jaxmoe.scaling import (
    Study,
    StudyResult,
    pending_records,
    preflight,
    read_records,
    results_table,
    run_member,
    run_study,
    runner,
)
from jaxmoe.training import NoSpaceLeftError, ProgressReporter
from jaxmoe.training.checkpoints import _checksum as checksum
from pallas_kernels import native

CONFIG = {
    "study": {"name": "tiny", "title": "Tiny", "held_fixed": {"tokens": 0.0}},
    "model": {
        "vocab_size": 280, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8, "capacity_factor": 0.5},
    },
    "data": {
        "tokenizer": "symbols",
        "sources": {
            "knowledge": {"kind": "knowledge", "entities": 50, "test_entities": 8},
            "reasoning": {"kind": "reasoning", "problems": 50, "test_problems": 8, "corruption": 0.2},
        },
    },
    "train": {"steps": 8, "batch_size": 4, "sequence_length": 16, "learning_rate": 1e-2, "log_every": 1,
              "checkpoint_every": 2},
    "evaluation": {"points": 2, "examples": 8, "batch_size": 8, "validation_rows": 8},
    "members": {"first": {}, "second": {"train": {"learning_rate": 2e-2}}},
}  # fmt: skip


def study_of(**values):
    """The study with entries set by dotted path, `__` for the dots."""
    config = copy.deepcopy(CONFIG)
    for path, value in values.items():
        *sections, last = path.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Study.from_config_dict(config)


def contents(folder):
    """Every file that a run writes for good, except what tells the time."""
    keep = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/records/*.json"), *folder.glob("*/DONE")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in keep}


class Stopping(ProgressReporter):
    """Asks the run to stop as a scheduler would, once a member has done `step` steps."""

    def __init__(self, member, step):
        super().__init__(terminal=False)
        self.where, self.at, self.now = member, step, None

    def member(self, name, total, done=0):
        super().member(name, total, done)
        self.now = name

    def advance(self, step, *args, **kwargs):
        super().advance(step, *args, **kwargs)
        if (self.now, step) == (self.where, self.at):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_study(study_of(), folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished study that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "study")


def test_every_member_is_trained_evaluated_and_marked_done(finished):
    folder, result = finished
    assert result.status == "done"
    assert [(member.name, member.status, member.step) for member in result.members] == [
        ("first", "done", 8), ("second", "done", 8),
    ]  # fmt: skip
    for member in study_of().members:
        done = json.loads((folder / member.name / "DONE").read_text())
        last = json.loads((folder / member.name / "metrics.jsonl").read_text().splitlines()[-1])
        assert done == {
            "member": member.name, "step": 8, "loss": last["loss"], "config_hash": config_hash(member.config),
        }  # fmt: skip
        saved = json.loads((folder / member.name / "config.json").read_text())
        assert saved["train"]["steps"] == 8
        assert saved["model"]["moe"]["score_order"] == "topk_then_softmax", "defaults are written out"


def test_records_are_complete_and_labelled(finished):
    records = read_records(finished[0])
    expected = {("training", source, "train") for source in ("all", "knowledge", "reasoning")}
    expected |= {(kind, source, split) for kind in ("validation", "task") for source in ("knowledge", "reasoning")
                 for split in ("train", "test")}  # fmt: skip
    expected |= {("task", "reasoning", "train_clean")}
    for member in ("first", "second"):
        for step in (4, 8):
            own = [entry for entry in records if (entry["member"], entry["step"]) == (member, step)]
            assert {(entry["evaluation"], entry["source"], entry["split"]) for entry in own} == expected
            assert all(entry["tokens"] == step * 4 * 16 and entry["study"] == "tiny" for entry in own)
    assert all(entry["dropped_fraction"] == 0 for entry in records if entry["evaluation"] != "training")
    assert any(entry["dropped_fraction"] > 0 for entry in records if entry["evaluation"] == "training")


def test_the_records_say_what_the_logs_say(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()]
    records = {(entry["evaluation"], entry["source"], entry["split"], entry["step"]): entry
               for entry in read_records(folder) if entry["member"] == "first"}  # fmt: skip
    record = records["training", "all", "train", 8]
    window = lines[-record["averaging_steps"] :]
    assert record["loss"] == pytest.approx(sum(line["loss"] for line in window) / len(window), rel=1e-5)
    assert record["skipped_steps"] == 0
    assert sum(record["expert_load"][0]) == pytest.approx(1)
    task = records["task", "knowledge", "train", 8]
    assert (task["accuracy_kind"], task["accuracy"]) == ("value_recall", task["value_recall"])
    assert task["value_recall"] == task["token_accuracy"], "in symbols every token of an answer is a value"
    assert task["chance_accuracy"] == 1 / 256
    assert task["bits_per_byte"] == pytest.approx(task["bits_per_token"] / 2), "each letter is two bytes"
    task = records["task", "reasoning", "test", 8]
    assert (task["accuracy_kind"], task["accuracy"]) == ("exact_match", task["exact_match"])
    assert task["chance_accuracy"] == pytest.approx(1e-3)


def test_the_results_table_has_every_evaluation(finished):
    table = results_table(finished[0])
    assert list(zip(table["member"], table["step"])) == [("first", 4), ("first", 8), ("second", 4), ("second", 8)]
    trained = "train_clean" if "bits_per_token/reasoning/train_clean" in table else "train"
    gap = table["bits_per_token/reasoning/test"] - table[f"bits_per_token/reasoning/{trained}"]
    assert (table["generalization_gap/reasoning"] == gap).all()
    assert table["training_loss"].notna().all()


def test_running_again_skips_and_changes_nothing(copied, monkeypatch):
    before = contents(copied)
    monkeypatch.setattr(runner, "train", None)
    result = run_study(study_of(), copied)
    assert [member.status for member in result.members] == ["skipped", "skipped"]
    assert result.status == "done"
    assert contents(copied) == before


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_study_goes_on_to_the_same_files(finished, tmp_path, step):
    """Step 3 lies between checkpoints, step 4 is evaluated and saved."""
    stopped = run_study(study_of(), tmp_path, progress=Stopping("first", step))
    assert stopped.status == "resumable"
    assert [member.status for member in stopped.members] == ["resumable", "pending"]
    assert not (tmp_path / "first" / "DONE").exists()
    result = run_study(study_of(), tmp_path)
    assert result.status == "done"
    assert result.members == finished[1].members
    assert contents(tmp_path) == contents(finished[0])


def test_a_folder_of_another_configuration_is_refused_with_the_difference(copied):
    before = contents(copied)
    changed = study_of(train__weight_decay=0.5)
    with pytest.raises(ConfigError) as error:
        run_study(changed, copied)
    message = str(error.value)
    for part in ("train.weight_decay", "0.1", "0.5", "--resume=force", "another folder", "first"):
        assert part in message
    assert contents(copied) == before


def test_force_evaluates_again_with_the_new_settings_and_trains_no_further(copied):
    changed = study_of(evaluation__examples=4)
    result = run_study(changed, copied, only="first", resume="force")
    done = json.loads((copied / "first" / "DONE").read_text())
    assert done["config_hash"] == config_hash(changed.member("first").config)
    assert result.members[0].status == "done"
    records = [entry for entry in read_records(copied) if entry["member"] == "first" and entry["evaluation"] == "task"]
    assert {entry["examples"] for entry in records if entry["step"] == 8} == {4}
    assert not [entry for entry in records if entry["step"] == 4], "those are of the other configuration"
    assert len({entry["config_hash"] for entry in records}) == 1
    aside = copied / "first" / "earlier_records" / config_hash(study_of().member("first").config)
    for step in (4, 8):
        earlier = json.loads((aside / f"task-reasoning-test-{step:08d}.json").read_text())
        assert earlier["examples"] == 8, "set aside, not lost"


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


def test_force_on_an_unfinished_member_is_recorded(tmp_path):
    run_study(study_of(), tmp_path, progress=Stopping("first", 3))
    stopped = max(int(path.name) for path in (tmp_path / "first" / "checkpoints").iterdir() if path.name.isdigit())
    run_study(study_of(train__weight_decay=0.5), tmp_path, only="first", resume="force")
    old = config_hash(study_of().member("first").config)
    done = json.loads((tmp_path / "first" / "DONE").read_text())
    assert (done["resumed_from_config"], done["resumed_at_step"]) == (old, stopped)
    last = [entry for entry in read_records(tmp_path) if entry["step"] == 8]
    assert {(entry["resumed_from_config"], entry["resumed_at_step"]) for entry in last} == {(old, stopped)}


@pytest.mark.parametrize("moment", ["the last evaluation", "between members"])
def test_a_signal_outside_of_training_stops_the_study_too(tmp_path, monkeypatch, moment):
    """Nothing more is begun: an evaluation is done anew, and the second member is left for later."""

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    whole_evaluation, whole_member = runner.evaluate_all, runner.run_member

    def evaluate_all(context, labels):
        if moment == "the last evaluation" and context.step == 8:
            terminate()
        return whole_evaluation(context, labels)

    def run_member(*args, **kwargs):
        result = whole_member(*args, **kwargs)
        if moment == "between members":
            terminate()
        return result

    monkeypatch.setattr(runner, "evaluate_all", evaluate_all)
    monkeypatch.setattr(runner, "run_member", run_member)
    before = signal.getsignal(signal.SIGTERM)
    result = run_study(study_of(), tmp_path)
    first = {"the last evaluation": "resumable", "between members": "done"}[moment]
    assert [member.status for member in result.members] == [first, "pending"]
    assert result.status == "resumable"
    assert (tmp_path / "first" / "DONE").exists() == (first == "done")
    assert not (tmp_path / "second").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("content", ["{", "[1]", '{"members": 3}'])
def test_a_broken_study_file_is_named(copied, content):
    (copied / "study.json").write_text(content)
    for use in (lambda: run_study(study_of(), copied), lambda: read_records(copied)):
        with pytest.raises(ConfigError, match=r"study\.json .*; restore it, or delete it and run the study again"):
            use()


@pytest.mark.parametrize("content", ["", "[]", '{"step": 8}'])
def test_a_broken_done_counts_as_not_done(copied, finished, caplog, content):
    (copied / "first" / "DONE").write_text(content)
    result = run_study(study_of(), copied, only="first")
    assert result.members[0].status == "done"
    assert "DONE cannot be used" in caplog.text
    assert contents(copied) == contents(finished[0])


def test_force_trains_on_when_there_are_more_steps(copied):
    result = run_study(study_of(train__steps=10), copied, only="first", resume="force")
    assert (result.members[0].status, result.members[0].step) == ("done", 10)
    steps = [json.loads(line)["step"] for line in (copied / "first" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_a_folder_of_another_study_is_refused(copied):
    with pytest.raises(ConfigError, match="study.name is 'tiny' in the folder, 'other' now"):
        run_study(study_of(study__name="other"), copied)


def test_only_one_member(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(runner, "run_member", lambda member, *args, **kwargs: trained.append(member.name) or
                        runner.MemberResult(member.name, "done", 8, 1.0))  # fmt: skip
    run_study(study_of(), tmp_path, only="second")
    assert trained == ["second"]
    listed = json.loads((tmp_path / "study.json").read_text())
    assert [member["name"] for member in listed["members"]] == ["first", "second"]
    with pytest.raises(ConfigError, match="unknown member 'secnd'. Did you mean 'second'"):
        run_study(study_of(), tmp_path, only="secnd")


def test_a_member_that_fails_does_not_cost_the_others(finished, tmp_path, monkeypatch):
    whole = runner.train

    def failing(run, *args, **kwargs):
        if run.name == "first":
            raise MemoryError("too large")
        return whole(run, *args, **kwargs)

    monkeypatch.setattr(runner, "train", failing)
    result = run_study(study_of(), tmp_path)
    assert result.status == "failed"
    assert [member.status for member in result.members] == ["failed", "done"]
    assert "first: failed (MemoryError: too large)" in str(result)
    own, undisturbed = contents(tmp_path), contents(finished[0])
    assert own == {name: value for name, value in undisturbed.items() if name.startswith("second/")}


def test_a_mistake_is_told_from_a_failure(tmp_path, monkeypatch):
    """A scheduler tries a failure again, and a mistake not."""

    def mistaken(run, *args, **kwargs):
        raise ConfigError("no such thing")

    monkeypatch.setattr(runner, "train", mistaken)
    result = run_study(study_of(), tmp_path)
    assert (result.status, result.mistaken) == ("failed", True)
    assert not StudyResult((*result.members, runner.MemberResult("third", "failed", error="lost"))).mistaken
    assert not StudyResult((runner.MemberResult("third", "done"),)).mistaken


def test_a_full_disk_stops_the_study(tmp_path, monkeypatch):
    def failing(run, *args, **kwargs):
        raise NoSpaceLeftError("no space left at there; free space and run again.")

    monkeypatch.setattr(runner, "train", failing)
    result = run_study(study_of(), tmp_path)
    assert [member.status for member in result.members] == ["failed", "pending"]
    assert result.status == "failed"


@pytest.fixture
def full_for_records(monkeypatch):
    """Has so many attempts to write records fail as on a full disk; how many are left."""
    left = [0]
    write = pending_records.write_records

    def write_records(*arguments):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(pending_records, "write_records", write_records)
    return left


def test_records_that_a_full_disk_has_no_room_for_come_when_there_is_some(finished, full_for_records, tmp_path, caplog):
    """Those of step 4, and with them the first attempt at its checkpoint, have to wait."""
    full_for_records[0] = 2
    assert run_study(study_of(), tmp_path).status == "done"
    assert full_for_records == [0]
    assert "records cannot be written to" in caplog.text
    assert contents(tmp_path) == contents(finished[0])


def test_records_for_which_there_is_never_room_stop_the_run_and_are_made_again(finished, full_for_records, tmp_path):
    study = study_of(train__max_missed_saves=1, train__storage_patience_seconds=0.5)
    full_for_records[0] = 10**6
    result = run_study(study, tmp_path, only="first").members[0]
    assert (result.status, result.fatal) == ("failed", True)
    assert "no space left at" in result.error
    assert "last good checkpoint: step 2; free space and run again" in result.error
    full_for_records[0] = 0
    assert run_study(study, tmp_path).status == "done"
    assert contents(tmp_path).keys() == contents(finished[0]).keys()
    log = "first/metrics.jsonl"
    assert contents(tmp_path)[log] == contents(finished[0])[log]


def test_running_slices_one_after_the_other_adds_to_the_study(copied):
    (copied / "study.json").unlink()
    study = study_of(members__first__slices=("headline",), members__second__slices=("other",),
                     study__slices={"other": {"title": "Other", "x": "learning_rate"}})  # fmt: skip
    run_study(study.select("other"), copied)
    run_study(study.select("headline"), copied)
    listed = json.loads((copied / "study.json").read_text())
    assert {member["name"] for member in listed["members"]} == {"first", "second"}
    assert listed["slices"] == {"other": {"title": "Other", "x": "learning_rate"}, "headline": {}}
    assert listed["headline"] == "headline"


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


def test_a_compiled_backend_that_was_not_built_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", str(tmp_path / "nothing"))
    native.load.cache_clear()
    with pytest.raises(ConfigError, match="member 'first': model.moe.backend='cpu_native' .*build_native"):
        run_study(study_of(model__moe__backend="cpu_native"), tmp_path / "study")
    with pytest.raises(ConfigError, match="float32 alone, but model.compute_dtype='bfloat16'"):
        run_study(study_of(model__moe__backend="cpu_native", model__compute_dtype="bfloat16"), tmp_path / "study")
    assert not (tmp_path / "study" / "first").exists()


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


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        run_study(study_of(), tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written to"):
        run_study(study_of(), tmp_path / "file" / "folder")


def test_one_member_alone_is_a_run_of_its_own(copied):
    member = study_of().member("first")
    assert run_member(member, copied).status == "skipped"
    result = run_member(member, copied)
    assert math.isfinite(result.loss)
    assert result.step == 8
