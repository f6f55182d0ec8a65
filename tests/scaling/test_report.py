"""The report of a study: its numbers are the records', its words follow from them, and its page holds together."""

import dataclasses
import html.parser
import itertools
import json
import math
import pathlib
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.evaluation.records import make_record, write_records
from jaxmoe.scaling import results_table
from jaxmoe.scaling.report import ReportError, build_report, comparison, findings, plots, style, tables
from jaxmoe.storage import write_json

STEPS, TOKENS_PER_STEP = 20, 1000
CONFIG_HASH = "0123456789abcdef"


@dataclasses.dataclass
class Run:
    """One run of a synthetic study; `recall` and `solved` are its final accuracies."""

    name: str
    arm: str
    total: int
    recall: float = 0.5
    solved: float = 0.5
    loss: float = 2.0
    seed: int = 0
    slices: tuple = ("main",)
    learning_rate: float = 0.01
    corruption: float = 0.2
    reached: int = STEPS
    experts: int = 2


def write_study(directory, runs, *, sources=("knowledge", "reasoning"), slices=None, notes=()):
    """A study's folder as `experiments.run` leaves it, evaluated at half time and at the end."""
    members = []
    for run in runs:
        summary = {
            "name": run.name, "arm": run.arm, "seed": run.seed, "slices": list(run.slices),
            "total_parameters": run.total, "active_parameters": 100, "flops_per_token": 600,
            "tokens": STEPS * TOKENS_PER_STEP, "tokens_per_parameter": STEPS * TOKENS_PER_STEP / run.total,
            "sparsity": 1 - 2 / run.experts,
            "num_experts": run.experts, "experts_per_token": 2, "learning_rate": run.learning_rate,
            "config_hash": CONFIG_HASH,
        }  # fmt: skip
        members.append(summary)
        if run.reached:
            write_run(directory / run.name, run, summary, sources)
    study = {
        "name": "synthetic", "title": "A <synthetic> study", "held_fixed": {"active_parameters": 0.1, "tokens": 0.0},
        "varies": ["total_parameters"], "notes": list(notes), "headline": runs[0].slices[0],
        "slices": slices or {}, "members": members, "command": "python -m experiments.run --config=mine.py",
    }  # fmt: skip
    write_json(directory / "study.json", study)
    return directory


def write_run(folder, run, summary, sources):
    kinds = {"knowledge": {"kind": "knowledge"}, "reasoning": {"kind": "reasoning", "corruption": run.corruption}}
    config = {
        "name": run.name, "seed": run.seed, "train": {"steps": STEPS, "learning_rate": run.learning_rate},
        "data": {"sources": {source: kinds.get(source, {"kind": "text"}) for source in sources}},
    }  # fmt: skip
    write_json(folder / "config.json", config)
    by_source = {f"loss/{source}": run.loss for source in sources}
    logs = {"metrics": {"loss": run.loss, **by_source, "skipped": 1},
            "throughput": {"step_seconds": 0.6, "tokens_per_second": 100.0}}  # fmt: skip
    for name, numbers in logs.items():
        lines = [json.dumps({"step": step, **numbers}) + "\n" for step in range(1, run.reached + 1)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for step in (STEPS // 2, STEPS):
        if step <= run.reached:
            write_records(folder, records(run, summary, sources, step))
    if run.reached == STEPS:
        write_json(folder / "DONE", {"step": STEPS, "loss": run.loss, "config_hash": CONFIG_HASH})


def records(run, summary, sources, step):
    identity = {name: value for name, value in summary.items() if name != "name"}
    identity |= {
        "study": "synthetic", "member": run.name, "slices": ",".join(run.slices), "step": step,
        "tokens": step * TOKENS_PER_STEP, "init_std": 0.02, "device": "cpu x1",
        "version_jax": "0.10.2", "dropped_fraction": 0.0,
    }  # fmt: skip
    part = step / STEPS

    def record(evaluation, source, split, **numbers):
        return make_record({**identity, "evaluation": evaluation, "source": source, "split": split}, numbers)

    load = [[0.75] + [0.25 / (run.experts - 1)] * (run.experts - 1)] * 2
    numbers = {"dead_experts": 0, "load_max_over_mean": 1.5, "skipped_steps": 1}
    yield record("training", "all", "train", loss=run.loss / part, expert_load=load, **numbers)
    for source in sources:
        for split, worse in (("train", 0.0), ("test", 0.25)):
            yield record("validation", source, split, loss=run.loss + worse, standard_error=0.001)
    scores = {
        ("knowledge", "train"): run.recall, ("knowledge", "test"): 0.004, ("reasoning", "train"): 0.9 * run.solved,
        ("reasoning", "train_clean"): 0.95 * run.solved, ("reasoning", "test"): run.solved,
    }  # fmt: skip
    for (source, split), accuracy in scores.items():
        if source in sources:
            yield record(
                "task", source, split, bits_per_token=(2 - accuracy) / part, bits_per_token_standard_error=0.01,
                bits_per_byte=1.0, loss=1.0, accuracy=accuracy * part, accuracy_standard_error=0.01,
                accuracy_kind="value_recall" if source == "knowledge" else "exact_match", chance_accuracy=0.004,
                examples=100,
            )  # fmt: skip


FAMILY = [
    Run("E2", "E2", 1_000, recall=0.10, solved=0.75, loss=3.9, experts=2),
    Run("E8", "E8", 2_000, recall=0.21, solved=0.81, loss=3.4, experts=8),
    Run("E64", "E64", 16_000, recall=0.65, solved=0.74, loss=1.7, experts=64),
]


def seeds(runs, spread=0.1):
    """Each run with seeds 0 and 1, which differ by `spread` in what they solve."""
    for run, seed in itertools.product(runs, (0, 1)):
        solved = run.solved + spread * (seed - 0.5)
        yield dataclasses.replace(run, name=f"{run.arm}-seed{seed}", seed=seed, solved=solved)


class Page(html.parser.HTMLParser):
    """Links, images and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.images, self.sources, self.anchors, self.words = [], [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id")}
        if tag == "a":
            self.links.append(attributes["href"])
        if tag in ("img", "source"):
            (self.images if tag == "img" else self.sources).append(attributes)
        assert tag not in ("script", "link"), "the page needs nothing but its images"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Report of three members with one seed, in full."""
    directory = write_study(tmp_path_factory.mktemp("quick"), FAMILY, notes=("Mind the <b>corruption</b>.",))
    return pathlib.Path(build_report(directory, svg=True)).parent


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the time that images take: every figure is still laid out."""
    monkeypatch.setattr(style, "image_bytes", lambda figure, kind="png": b"")


# -------------------------------------------------------------------------------------- numbers and files


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


# ------------------------------------------------------------------------------------------------ findings


def said(directory):
    """What the first slice's findings say, as text."""
    loaded = tables.load_study(directory)
    compared = comparison.compare(loaded, loaded.slices[0])
    return [str(one) for one in (*findings.slice_findings(loaded, compared), *findings.study_checks(loaded))]


def test_findings_of_one_seed(quick):
    sentences = said(quick.parent)
    assert sentences[:3] == [
        "Training loss falls with total parameters: 3.900 → 3.400 → 1.700 "
        "(3 members, 1 seed; down in 2 of 2 adjacent pairs).",
        "Knowledge accuracy (train) rises with total parameters: 0.100 → 0.210 → 0.650 "
        "(3 members, 1 seed; up in 2 of 2 adjacent pairs).",
        "Reasoning accuracy (test) does not go one way with total parameters: 0.750 → 0.810 → 0.740 "
        "(3 members, 1 seed; up in 1 and down in 1 of 2 adjacent pairs).",
    ]
    assert (
        "Reasoning accuracy (test) is highest at E8 (2k parameters, TPP 10), inside the family, by 0.060 over the "
        "better edge (one seed: may be chance)."
    ) in sentences
    assert "Tokens are 20,000 for every member of the headline." in sentences
    assert "Some steps were skipped because a number was not finite (E2 1, E8 1, E64 1)." in sentences
    text = Page(quick / "index.html").text
    assert all(sentence in text for sentence in sentences)


def test_a_change_within_the_spread_of_seeds_is_no_trend(tmp_path):
    sentences = said(write_study(tmp_path, list(seeds(FAMILY))))
    assert (
        "Reasoning accuracy (test) does not change beyond its noise with total parameters: 0.750 → 0.810 → 0.740 "
        "(3 members, 2 seeds; up in 2 and down in 2 of 4 adjacent pairs; seeds differ by 0.100)."
    ) in sentences
    assert not any("highest" in sentence for sentence in sentences)


def test_an_optimum_at_the_edge_is_called_one(tmp_path):
    runs = [dataclasses.replace(run, solved=solved) for run, solved in zip(FAMILY, (0.9, 0.7, 0.5))]
    sentences = said(write_study(tmp_path, runs))
    assert (
        "Reasoning accuracy (test) is highest at E2 (1k parameters, TPP 20), an edge of the family: it shows no "
        "optimum inside." in sentences
    )


def line(values, errors=0.0):
    """Rows of one line, a list of values per seed."""
    rows = [(f"a{place}", seed, float(place), value, errors)
            for seed, own in enumerate(values) for place, value in enumerate(own)]  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "seed", "x", "value", "standard_error"])


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=7, unique=True))
def test_monotone_means_every_step_goes_one_way(values):
    found = findings.trend(line([values]), "x")
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert (found.up, found.down, found.pairs) == (sum(s > 0 for s in steps), sum(s < 0 for s in steps), len(steps))
    assert found.monotone == (values in (sorted(values), sorted(values, reverse=True)))
    if found.monotone:
        assert found.verdict() == ("rises" if values[-1] > values[0] else "falls")
        assert found.spearman == pytest.approx(math.copysign(1, values[-1] - values[0]))


def test_the_error_over_examples_counts_for_one_seed():
    assert findings.trend(line([[0.50, 0.52]], errors=0.01), "x").verdict() == "does not change beyond its noise"
    assert findings.trend(line([[0.50, 0.54]], errors=0.01), "x").verdict() == "rises"


def test_one_arm_has_no_trend():
    assert findings.trend(line([[1.0]]), "x") is None


# -------------------------------------------------------------------------------------- unfinished studies


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


# -------------------------------------------------------------------------------------------------- slices


def test_a_slice_over_another_setting_has_a_line_for_each_size(tmp_path, undrawn):
    runs = [
        Run(f"E{size}-lr{rate}", f"E{size}-lr{rate}", size * 1000, solved=solved, learning_rate=rate, slices=("rates",))
        for (size, rate), solved in zip(itertools.product((2, 64), (0.001, 0.01)), (0.9, 0.5, 0.4, 0.6))
    ]
    directory = write_study(tmp_path, runs, slices={"rates": {"x": "learning_rate", "title": "Rates", "note": "Mind."}})
    loaded = tables.load_study(directory)
    compared = comparison.compare(loaded, loaded.slices[0])
    assert compared.series == ("2k parameters", "64k parameters")
    assert (
        "Reasoning accuracy (test) against learning rate – 2k parameters: falls, 0.900 → 0.500; 64k parameters: rises, "
        "0.400 → 0.600 (1 seed)." in said(directory)
    )
    page = Page(build_report(directory))
    assert "Losses and accuracy against learning rate." in page.text
    assert "Rates" in page.text
    assert "Mind." in page.text


def test_another_slice_over_total_parameters_shows_the_headline_beside_it(tmp_path, undrawn):
    clean = [
        dataclasses.replace(run, name=f"{run.name}-clean", arm=f"{run.arm}-clean", solved=1.0, slices=("control",),
                            corruption=0.0)
        for run in FAMILY
    ]  # fmt: skip
    report = build_report(write_study(tmp_path, [*FAMILY, *clean], slices={"main": {}, "control": {}})).parent
    drawn = pd.read_csv(report / "control-effect.csv", keep_default_na=False)
    solved = drawn[(drawn.source == "reasoning") & (drawn.metric == "accuracy") & (drawn.split == "test")]
    assert solved[solved.series == "control"].value.tolist() == [1.0] * 3
    assert solved[solved.series == "main"].value.tolist() == [0.75, 0.81, 0.74]
    assert "By comparison “main” does not go one way: 0.750 → 0.810 → 0.740" in Page(report / "index.html").text


def test_text_alone_is_compared_by_validation_loss(tmp_path, undrawn):
    report = build_report(write_study(tmp_path, FAMILY, sources=("documents",))).parent
    drawn = pd.read_csv(report / "main-effect.csv", keep_default_na=False)
    assert set(drawn.metric) == {"training_loss", "validation_loss"}
    gap = pd.read_csv(report / "main-gap.csv")
    assert gap.gap.tolist() == pytest.approx([0.25] * 3)
    assert not (report / "main-accuracy.csv").exists()


def test_one_member_makes_a_page(tmp_path, undrawn):
    assert "1 members × 1 seed" in Page(build_report(write_study(tmp_path, FAMILY[:1]))).text


# ------------------------------------------------------------------------------------------------- writing


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

