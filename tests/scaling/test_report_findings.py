"""What the report of a study says follows from its numbers; slices are compared as they are described."""

import dataclasses
import itertools
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.scaling.report import build_report, comparison, findings, tables

from .synthetic_study import FAMILY, Page, Run, seeds, write_study

# ------------------------------------------------------------------------------------------------------------- findings


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


# --------------------------------------------------------------------------------------------------------------- slices


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
