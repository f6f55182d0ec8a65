"""Sampling a trained study: what is written, gone on with, skipped, and refused."""

import copy
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest

from jaxmoe.config import ConfigError
from jaxmoe.data import load_tokenizer
from jaxmoe.evaluation import greedy_answers
from jaxmoe.scaling import Study, run_study
from jaxmoe.scaling.report.comparison import compare
from jaxmoe.scaling.report.tables import load_study
from jaxmoe.scaling.report.test_time import sampling_figure
from jaxmoe.scaling.test_time import describe_sampling, sample_study
from jaxmoe.storage import as_path
from jaxmoe.training import StopRequest, read_parameters

CONFIG = {
    "study": {"name": "tiny", "title": "Tiny", "held_fixed": {"tokens": 0.0}},
    "model": {
        "vocab_size": 280, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8},
    },
    "data": {
        "tokenizer": "symbols",
        "sources": {"reasoning": {"kind": "reasoning", "problems": 50, "test_problems": 8}},
    },
    "train": {"steps": 4, "batch_size": 4, "sequence_length": 16, "learning_rate": 1e-2},
    "evaluation": {
        "points": 1, "examples": 4, "batch_size": 4, "validation_rows": 4, "generate": False,
        "test_time": {"samples": 4, "max_new_tokens": 4, "batch_size": 8, "temperature": 1.0},
    },
    "members": {"only": {}},
}  # fmt: skip


def study_of(**settings):
    """The study with settings of `evaluation.test_time`."""
    config = copy.deepcopy(CONFIG)
    config["evaluation"]["test_time"].update(settings)
    return Study.from_config_dict(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_study(study_of(), folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "study")


def files(folder):
    return sorted((folder / "only" / "samples").glob("*.jsonl"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def texts(path):
    return {line["problem"]: line["samples"] for line in lines(path)}


def test_done_is_skipped_and_a_cut_off_line_is_made_again(folder, monkeypatch):
    (member,) = sample_study(study_of(), folder)
    assert (member.status, member.step) == ("done", 4)
    (record,) = member.records
    assert (record["problems"], record["samples"], record["evaluation"]) == (8, 4, "test_time")
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert sample_study(study_of(), folder)[0].records == member.records
    assert path.read_bytes() == whole
    monkeypatch.setattr("jaxmoe.evaluation.generation._compiled", None)  # sampling anything would fail
    assert sample_study(study_of(), folder)[0].records == member.records


def test_samples_do_not_depend_on_a_stop_or_the_batch_size(folder):
    (whole,) = sample_study(study_of(), folder)
    (path,) = files(folder)
    expected = path.read_bytes()
    path.unlink()
    with StopRequest() as stop:

        def progress(what, done, total):
            if done and stop.requested is None:
                os.kill(os.getpid(), signal.SIGTERM)

        assert sample_study(study_of(), folder, stop=stop, progress=progress)[0].status == "resumable"
    assert 0 < len(lines(path)) < 8
    assert sample_study(study_of(), folder)[0].records == whole.records
    assert path.read_bytes() == expected
    first = texts(path)
    path.unlink()
    sample_study(study_of(batch_size=3), folder)  # fewer than the samples of a problem
    assert texts(*files(folder)) == first


def test_the_command_samples_in_a_bucket_and_on_a_mesh(folder, bucket, tmp_path):
    """The same samples as from a disk and on one device, also where the file was cut off."""
    (expected,) = sample_study(study_of(), folder)
    (path,) = files(folder)
    remote = as_path(bucket) / "sampled"
    for kept in (file.relative_to(folder) for file in (folder / "only").rglob("*") if file.is_file()):
        content = (folder / kept).read_bytes()
        if "records" not in kept.parts:
            (remote / str(kept)).write_bytes(content[: len(content) // 3] if "samples" in kept.parts else content)
    config = tmp_path / "tiny.py"
    config.write_text(f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({CONFIG})\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.test_time_compute", f"--config={config}", f"--workdir={bucket}/sampled",
            "--mesh=fsdp=2,expert=2", "--json",
        ],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, capture_output=True, text=True,
        cwd=pathlib.Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (remote / "only" / "samples" / path.name).read_bytes() == path.read_bytes()
    (record,) = json.loads(done.stdout)
    assert [key for key in record if record[key] != expected.records[0][key]] == ["device"]


def test_other_settings_make_other_files_and_set_the_record_aside(folder):
    (before,) = sample_study(study_of(), folder)
    (after,) = sample_study(study_of(seed=1), folder)
    assert len(files(folder)) == 2
    assert texts(files(folder)[0]) != texts(files(folder)[1])
    aside = folder / "only" / "earlier_records" / before.records[0]["sampling_hash"]
    assert [json.loads(path.read_text()) for path in aside.iterdir()] == [before.records[0]]
    assert after.records[0]["sampling_seed"] == 1


def test_temperature_0_is_greedy(folder):
    study = study_of(temperature=0.0, samples=1)
    sample_study(study, folder)
    (path,) = files(folder)
    run = study.members[0].config
    _, model = read_parameters(run, folder / "only", None)
    found = sorted(lines(path), key=lambda line: line["problem"])
    prompts = [line["prompt"] for line in found]
    greedy = greedy_answers(model, prompts, load_tokenizer("symbols"), max_new_tokens=4, batch_size=8)
    assert [line["samples"] for line in found] == [[one.text] for one in greedy]


def test_a_broken_line_is_named(folder):
    sample_study(study_of(), folder)
    (path,) = files(folder)
    first, second, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first + second.replace('"problem"', '"prblem"') + "".join(rest))
    with pytest.raises(ConfigError, match="line 2 is broken"):
        sample_study(study_of(), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "greedy decoding writes the same answer"),
        ({"samples": 1025}, "choose 1 <= samples <= 1024"),
        ({"top_p": 0.0}, "choose 0 < top_p <= 1"),
        ({"stops": ("",)}, "an empty text"),
        ({"splits": ("tset",)}, "'tset' is no split.*test"),
        ({"sources": ("reasonin",)}, "no source of data.sources is called 'reasonin'.*reasoning"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        study_of(**settings)


def test_what_cannot_be_sampled_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="no trained member of 'tiny'"):
        sample_study(study_of(), tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="only question_answer prompts take worked examples"):
        sample_study(study_of(shots=1), folder)


def test_the_description_counts_tokens():
    (described,) = describe_sampling(study_of(max_new_tokens=100).members)
    assert described["sources"] == ["reasoning"]
    assert described["tokens_per_problem"] == 4 * 8  # half of the model's 16 each


def test_the_report_draws_what_was_sampled_and_nothing_where_nothing_was(folder):
    unsampled = load_study(folder)
    assert sampling_figure(unsampled, compare(unsampled, unsampled.slices[0]), "curves") is None
    (record,) = sample_study(study_of(), folder)[0].records
    tables = load_study(folder)
    figure = sampling_figure(tables, compare(tables, tables.slices[0]), "curves")
    rows = figure.data.set_index(["measure", "n"])
    for measure in ("coverage", "majority"):
        for n in (1, 2, 4):
            assert rows.value[measure, n] == record[f"expected_{measure}_{n}"]
            assert rows.standard_error[measure, n] == record[f"expected_{measure}_{n}_standard_error"]
            assert rows.tokens[measure, n] == pytest.approx(n * record["tokens_per_sample"])
    assert 1 <= record["tokens_per_sample"] <= 4
    assert len(figure.draw(3).axes) == 2

    def with_another(table, **differs):
        return pd.concat([table, table.assign(member="more", arm="more", **differs)], ignore_index=True)

    part = dataclasses.replace(tables.slices[0], arms=("only", "more"))
    two = dataclasses.replace(
        tables, members=with_another(tables.members, total_parameters=10_000), sampling=with_another(tables.sampling)
    )
    drawn = sampling_figure(two, compare(two, part), "curves").draw(3)
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "reasoning: pass@n", "reasoning: majority of n", "reasoning: majority of n",
    ]  # fmt: skip
    assert drawn.axes[2].get_xlabel() == "total parameters"
