"""The report of a study: its numbers are the records', and its page holds together."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from jaxmoe.scaling import results_table
from jaxmoe.scaling.report import ReportError, build_report, plots, style, tables
from jaxmoe.storage import write_json

from .synthetic_study import FAMILY, STEPS, Page, Run, png_size, write_study

# ---------------------------------------------------------------------------------------------------- numbers and files


def test_the_csv_of_a_figure_holds_the_records_numbers(quick):
    """Not a digit is lost between a record and the CSV of the figure that shows it."""
    drawn = pd.read_csv(quick / "summary.csv", keep_default_na=False)
    for run in FAMILY:
        for source, split, accuracy in (("knowledge", "train", run.recall), ("reasoning", "test", run.solved)):
            row = drawn[(drawn.member == run.name) & (drawn.source == source) & (drawn.split == split)].iloc[0]
            record = json.loads(
                (quick.parent / run.name / "records" / f"task-{source}-{split}-{STEPS:08d}.json").read_text()
            )
            assert row.value == record["accuracy"] == accuracy
            assert row.total_parameters == run.total
        assert drawn[(drawn.member == run.name) & (drawn.metric == "training_loss")].value.tolist() == [run.loss]


def test_the_member_table_holds_sizes_results_and_speed(quick):
    table = pd.read_csv(quick / "members.csv").set_index("member")
    assert table["accuracy/reasoning/test"].tolist() == [run.solved for run in FAMILY]
    assert table["task_loss/knowledge/train"].tolist() == [2 - run.recall for run in FAMILY]
    assert table.tokens_per_parameter.tolist() == [20.0, 10.0, 1.25]
    assert table.minutes.tolist() == pytest.approx([STEPS * 0.6 / 60] * 3)
    assert table.skipped_steps.tolist() == [1, 1, 1]
    gap = table["generalization_gap/reasoning/train_clean"]
    assert gap.tolist() == pytest.approx([-0.05 * run.solved for run in FAMILY])
    results = results_table(quick.parent)
    same = results[results["last"]].set_index("member")["generalization_gap/reasoning"]
    assert same.to_dict() == pytest.approx(gap.to_dict()), "one definition, in bits per token"
    np.testing.assert_allclose(table["loss_accuracy_gap/reasoning/test"], 0, atol=1e-12)
    assert "reasoning loss–accuracy gap (test)" in Page(quick / "index.html").text


def test_the_loss_accuracy_gap_is_drawn_and_is_that_of_the_table(tmp_path, undrawn):
    """E8 solves more than the others at a larger loss, so a falling function gives all three the mean."""
    directory = write_study(tmp_path, FAMILY)
    path = directory / "E8" / "records" / f"task-reasoning-test-{STEPS:08d}.json"
    write_json(path, {**json.loads(path.read_text()), "bits_per_token": 1.5})
    report = build_report(directory).parent
    drawn = pd.read_csv(report / "main-loss-accuracy-gap.csv").set_index(["source", "member"]).gap
    assert drawn["reasoning"].to_dict() == pytest.approx(
        {run.name: run.solved - (0.75 + 0.81 + 0.74) / 3 for run in FAMILY}
    )
    pooled = (0.21 + 0.10 + 0.325) / 3  # with E64 at half time, which recalls more at a larger loss
    assert drawn["knowledge"].to_dict() == pytest.approx({"E2": 0.10 - pooled, "E8": 0.21 - pooled, "E64": 0})
    table = pd.read_csv(report / "members.csv").set_index("member")["loss_accuracy_gap/reasoning/test"]
    assert table.to_dict() == pytest.approx(drawn["reasoning"].to_dict())
    assert "Loss–accuracy gap." in Page(report / "index.html").text


def test_the_numbers_of_both_tables_are_named(quick):
    assert "reasoning gap (test − train, corrected, bits per token)" in Page(quick / "index.html").text


def test_every_number_is_in_results_csv(quick):
    results = pd.read_csv(quick / "results.csv", keep_default_na=False)
    files = list(quick.parent.glob("*/records/*.json"))
    assert len(results[["member", "step", "evaluation", "source", "split"]].drop_duplicates()) == len(files)


def test_the_page_has_every_file_it_names_and_needs_no_other(quick):
    page = Page(quick / "index.html")
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.anchors
        else:
            assert (quick / link).stat().st_size > 0, link
    assert len(page.images) == len(page.sources) == 9
    for image, narrow in zip(page.images, page.sources):
        assert len(image["alt"]) > 20
        assert png_size(quick / image["src"]) == (int(image["width"]), int(image["height"]))
        assert png_size(quick / narrow["srcset"]) == (int(narrow["width"]), int(narrow["height"]))
    assert png_size(quick / "summary.png")[0] == 1650  # 11 inches at 150 dots
    assert "A <synthetic> study" in page.text
    assert "Mind the <b>corruption</b>." in page.text
    assert "python -m experiments.run --config=mine.py" in page.text


def test_files_of_an_earlier_report_are_removed_and_others_are_not(tmp_path, undrawn):
    control = Run("clean", "clean", 1_000, slices=("control",), corruption=0.0)
    report = build_report(write_study(tmp_path, [*FAMILY[:2], control]), svg=True).parent
    assert (report / "control-effect.csv").exists()
    (report / "mine.png").write_bytes(b"")
    build_report(write_study(tmp_path, FAMILY[:2]))
    assert not list(report.glob("control-*"))
    assert not list(report.glob("*.svg"))
    listed = (report / "files.txt").read_text().split()
    assert sorted(path.name for path in report.iterdir()) == sorted([*listed, "files.txt", "mine.png"])


def test_sections_after_the_headline_have_no_narrow_images(tmp_path, undrawn):
    control = Run("clean", "clean", 1_000, slices=("control",), corruption=0.0)
    report = build_report(write_study(tmp_path, [*FAMILY[:2], control])).parent
    assert (report / "main-effect-narrow.png").exists()
    assert not (report / "control-effect-narrow.png").exists()
    page = Page(report / "index.html")
    assert {image["srcset"] for image in page.sources} == {path.name for path in report.glob("*-narrow.png")}


def test_what_accuracy_counts_is_said_with_what_guessing_would_give(tmp_path, undrawn):
    text = Page(build_report(write_study(tmp_path, FAMILY[:2]))).text
    assert "knowledge, share of attribute values recalled (chance 0.004)" in text
    assert "reasoning, share of worked solutions right in every step (chance 0.004)" in text


def test_examples_longer_than_rows_of_training_are_mentioned(tmp_path, undrawn):
    directory = write_study(tmp_path, FAMILY[:2])
    assert "extrapolated" not in Page(build_report(directory)).text
    path = directory / "E8" / "records" / f"task-reasoning-test-{STEPS:08d}.json"
    write_json(path, {**json.loads(path.read_text()), "examples_beyond_training_length": 7})
    text = Page(build_report(directory)).text
    assert "Longer than the rows of training, so extrapolated: 7 of 100 of reasoning (test) examples." in text


def test_equal_records_give_equal_files(tmp_path):
    directory = write_study(tmp_path / "study", FAMILY[:2], sources=("reasoning",))
    first, second = (build_report(directory, tmp_path / name, svg=True).parent for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_matplotlibs_settings_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    build_report(write_study(tmp_path, FAMILY[:2], sources=("documents",)))
    assert dict(matplotlib.rcParams) == before


def test_importing_the_report_imports_no_plotting():
    code = "import sys, jaxmoe.scaling.report; sys.exit(bool({'pandas', 'matplotlib', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------- unfinished studies


def test_unfinished_members_are_named_and_left_out_of_comparisons(tmp_path, undrawn):
    runs = [*FAMILY[:2], dataclasses.replace(FAMILY[2], reached=STEPS // 2), Run("E128", "E128", 32_000, reached=0)]
    report = build_report(write_study(tmp_path, runs)).parent
    page = Page(report / "index.html")
    assert "This study is not complete: 2 of 4 runs are not finished" in page.text
    assert "E64: running or interrupted, evaluated up to step 10 of 20" in page.text
    assert "E128: not started" in page.text
    assert "Not finished, so left out: E64, E128." in page.text
    assert set(pd.read_csv(report / "main-effect.csv").member) == {"E2", "E8"}
    assert set(pd.read_csv(report / "main-training-curves.csv").member) == {"E2", "E8", "E64"}
    assert set(pd.read_csv(report / "main-task-loss.csv").member) == {"E2", "E8", "E64"}


def test_while_none_is_finished_the_last_common_step_is_compared(tmp_path, undrawn):
    runs = [dataclasses.replace(run, reached=reached) for run, reached in zip(FAMILY, (STEPS - 1, STEPS // 2, 12))]
    report = build_report(write_study(tmp_path, runs)).parent
    assert "compared at step 10" in Page(report / "index.html").text
    drawn = pd.read_csv(report / "main-tokens-per-parameter.csv")
    assert set(drawn.step) == {10}
    assert set(drawn.tokens_per_parameter) == {10.0, 5.0, 0.625}


def test_a_headline_without_a_finished_member_still_makes_a_page(tmp_path, undrawn):
    control = Run("clean", "clean", 1_000, slices=("control",), corruption=0.0)
    runs = [dataclasses.replace(FAMILY[0], reached=STEPS // 2), control]
    page = Page(build_report(write_study(tmp_path, runs)))
    assert "The slice shown is “control”." in page.text


def test_a_slice_of_which_only_borrowed_members_were_run_is_no_comparison(tmp_path, undrawn):
    """Running the headline alone must not give a learning-rate section with one learning rate."""
    described = {"main": {}, "rates": {"x": "learning_rate", "title": "Rates"}}
    lent = [dataclasses.replace(run, slices=("main", "rates")) for run in FAMILY]
    report = build_report(write_study(tmp_path / "headline", lent, slices=described)).parent
    assert "Rates" not in Page(report / "index.html").text
    assert not list(report.glob("rates-*"))
    other = Run("E2-lr", "E2-lr", 1_000, slices=("rates",), learning_rate=0.02)
    report = build_report(write_study(tmp_path / "both", [*lent, other], slices=described)).parent
    assert "Rates" in Page(report / "index.html").text


def test_the_summary_has_memorization_and_reasoning_however_many_sources_there_are(tmp_path, undrawn):
    sources = ("a", "b", "c", "d", "knowledge", "reasoning")
    report = build_report(write_study(tmp_path, FAMILY, sources=sources)).parent
    drawn = pd.read_csv(report / "summary.csv", keep_default_na=False)
    assert list(dict.fromkeys(zip(drawn.metric, drawn.source))) == [
        ("accuracy", "knowledge"), ("accuracy", "reasoning"), ("training_loss", ""), ("validation_loss", "a"),
    ]  # fmt: skip


def test_names_of_lines_at_the_bottom_stay_off_the_axis():
    with style.figure_style():
        _, (axes,) = style.new_figure(1, 1)
        axes.set_ylim(-0.02, 1)
        plots.label_lines(axes, [(0.0, "one", "k"), (0.0, "two,\nlines", "k"), (0.0, "three", "k"), (0.9, "top", "k")])
    heights = [text.xy[1] for text in axes.texts]
    assert heights[0] >= 0
    assert all(after - before > 0.05 for before, after in itertools.pairwise(heights))
    assert heights[3] == pytest.approx(0.92 / 1.02, abs=1e-3), "one that nothing touches stays where it is"


def test_what_another_configuration_left_is_excluded_and_said(tmp_path, undrawn):
    directory = write_study(tmp_path, FAMILY)
    study = json.loads((directory / "study.json").read_text())
    study["members"][2]["config_hash"] = "another"
    write_json(directory / "study.json", study)
    report = build_report(directory).parent
    page = Page(report / "index.html")
    assert "Some records are of another configuration than study.json states" in page.text
    files = len(list((directory / "E64" / "records").iterdir()))
    assert f"E64: {files} records left out" in page.text
    assert "E64: not started" in page.text
    for name in ("results", "main-effect", "main-training-curves"):
        assert set(pd.read_csv(report / f"{name}.csv").member) == {"E2", "E8"}


def test_a_line_of_the_log_that_is_being_written_is_left_out(tmp_path):
    directory = write_study(tmp_path, FAMILY[:2])
    with (directory / "E2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    curves = tables.load_study(directory).curves
    assert curves[(curves.member == "E2") & (curves.source == "")].step.max() == STEPS


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda study: None, "no such folder"),
        (lambda study: study.mkdir(), "has no study.json"),
        (lambda study: write_study(study, [Run("E2", "E2", 1000, reached=0)]), r"no records yet \(1 members"),
        (lambda study: (write_study(study, FAMILY) / "E8/records/x.json").write_text("{"), r"x\.json is not JSON"),
        (lambda study: (write_study(study, FAMILY) / "E8/metrics.jsonl").write_text("{\n"), r"metrics\.jsonl, line 1"),
        (lambda study: write_study(study, FAMILY, slices={"main": {"x": "colour"}}), "drawn against 'colour'"),
    ],
)
def test_what_no_report_can_be_made_of_is_said(tmp_path, spoil, message):
    spoil(tmp_path / "study")
    with pytest.raises(ReportError, match=message):
        build_report(tmp_path / "study")


# -------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("value", "text"),
    [(119_360, "119k"), (1_651_008, "1.7M"), (320_160_256, "320M"), (26e9, "26B"), (999_700, "1.0M"), (512, "512"),
     (None, "–"), (math.nan, "–")],
)  # fmt: skip
def test_counts_are_written_as_people_say_them(value, text):
    assert style.count(value) == text


def test_every_kind_of_source_has_its_own_colour():
    kinds = {"k": "knowledge", "r": "reasoning", "q": "question_answer", "t": "text", "t2": "text", "other": "other"}
    colours = style.source_colours(kinds)
    assert len(set(colours.values())) == len(kinds)
    assert style.source_colours({"t": "text"})["t"] == colours["t"]
