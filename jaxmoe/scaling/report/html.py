"""The report's page: one HTML file that needs nothing but the images beside it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.comparison import x_label
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.findings import Finding
from jaxmoe.scaling.report.stylesheet import STYLESHEET
from jaxmoe.scaling.report.tables import StudySlice, StudyTables

if TYPE_CHECKING:
    import pandas as pd

NARROW = "-narrow"
"""What the files of figures laid out for a phone add to their names."""

_SCALE = 0.69  # page pixels for an image pixel, so that letters are equally large in every figure


@dataclasses.dataclass(frozen=True)
class DrawnFigure:
    """A figure whose files are written.

    Attributes:
      figure: what it shows.
      size, narrow_size: width and height in pixels of the wide and of the narrow image; None without a narrow one.
      formats: endings of the files it has besides `csv`.
    """

    figure: ReportFigure
    size: tuple[int, int]
    narrow_size: tuple[int, int] | None
    formats: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One slice: its figures and what its numbers say."""

    part: StudySlice
    figures: tuple[DrawnFigure, ...]
    findings: tuple[Finding, ...]


def page(
    tables: StudyTables,
    summary: DrawnFigure | None,
    sections: Sequence[Section],
    checks: Sequence[Finding],
    arm_table: pd.DataFrame,
    member_table: pd.DataFrame,
) -> str:
    """The whole page.

    Args:
      tables: of the study.
      summary: the first figure; None if there is nothing to compare yet.
      sections: the headline slice first.
      checks: what was held fixed and what might be wrong.
      arm_table, member_table: cells as text, by column heading; a second line of a cell is its spread.
    """
    headline = sections[0]
    sections = [dataclasses.replace(headline, findings=()), *sections[1:]]  # its findings stand in the summary
    numbers = iter(range(1, 1 + sum(len(section.figures) for section in sections)))
    links = [("summary", "Summary"), *((_anchor(section.part), section.part.title) for section in sections),
             ("members", "Members"), ("reading", "How to read this"), ("reproduce", "Reproduce")]  # fmt: skip
    body = [
        _header(tables),
        _tag("nav", _list((_link(f"#{target}", text) for target, text in links), ""), aria_label="Sections"),
        "<main>",
        _summary(tables, summary, headline, checks),
        *(_section(section, numbers, bool(tables.notes)) for section in sections),
        _members(arm_table, member_table),
        _reading(tables),
        _reproduction(tables),
        "</main>",
        f"<footer>Written by <code>python -m experiments.report</code> from the records of {_text(tables.name)}. "
        f"Every number is in the CSV files beside this page; all of them in {_link('results.csv', 'results.csv')}."
        "</footer>",
    ]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(tables.title)}</title>",
        f"<style>{STYLESHEET}</style>",
        "</head>",
        "<body>",
        *body,
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------- blocks


def _header(tables: StudyTables) -> str:
    members = tables.members
    arms, seeds = members.arm.nunique(), members.groupby("arm").seed.nunique()
    seed_text = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    finished = int((members.status == "finished").sum())
    chips = [f"{arms} members × {seed_text} seed{'s' if seeds.max() > 1 else ''}",
             f"{finished} of {len(members)} runs finished"]  # fmt: skip
    chips += [f"held fixed: {style.words(name)}" + (f" (within {100 * tolerance:g} %)" if tolerance else " (exactly)")
              for name, tolerance in tables.held_fixed.items()]  # fmt: skip
    chips += [f"varies: {style.words(name)}" for name in tables.varies]
    return (
        f'<header class="top"><h1>{_text(tables.title)}</h1>'
        f"{_list(map(_text, chips), 'chips')}{_foreign(tables)}{_progress(tables)}</header>"
    )


def _foreign(tables: StudyTables) -> str:
    """Which records are not of the study as it is now; empty if all are."""
    if not tables.foreign:
        return ""
    items = [f"<b>{_text(member)}</b>: {count} records left out" for member, count in tables.foreign.items()]
    return (
        '<div class="box warning" role="status" style="margin-top:1rem">'
        "<h3>Some records are of another configuration than study.json states</h3>"
        f"<p>They were written before the configuration was changed and are in no number below.</p>{_list(items, '')}"
        "</div>"
    )


def _progress(tables: StudyTables) -> str:
    """What is not finished, plainly; empty if all is."""
    unfinished = tables.unfinished()
    if unfinished.empty:
        return ""
    items = []
    for member in unfinished.itertuples():
        steps = f" of {member.steps:.0f}" if member.steps == member.steps and member.steps else ""
        reached = f"evaluated up to step {member.step:.0f}{steps}" if member.step else "not evaluated yet"
        where = "not started" if member.status == "not started" else f"running or interrupted, {reached}"
        items.append(f"<b>{_text(member.member)}</b>: {where}")
    kept = (
        f"No member is finished, so everything below is compared at step {tables.interim}, which all evaluated members "
        "have reached." if tables.interim is not None and tables.interim >= 0 else
        "Comparisons below are between finished members only; training curves show the others too."
    )  # fmt: skip
    return (
        '<div class="box warning" role="status" style="margin-top:1rem">'
        f"<h3>This study is not complete: {len(unfinished)} of {len(tables.members)} runs are not finished</h3>"
        f"<p>{kept}</p>{_list(items, '')}</div>"
    )


def _summary(
    tables: StudyTables, summary: DrawnFigure | None, headline: Section, checks: Sequence[Finding]
) -> str:
    notes = f'<div class="notes" id="notes"><b>Read with care.</b>{_list(map(_text, tables.notes), "")}</div>'
    notes = notes if tables.notes else ""
    figure = _figure(summary, "Summary", notes) if summary else f"<p>There is nothing to compare yet.</p>{notes}"
    explained = (
        '<p class="small">Computed from the records. A change counts if it is larger than the mean spread between '
        "seeds and than two standard errors over examples; anything smaller is called noise.</p>"
    )
    findings = _box("What the numbers say", map(_finding, [*headline.findings, *checks]), "box findings", explained)
    return f'<section id="summary"><h2 class="first">Summary</h2>{figure}{findings}</section>'


def _section(section: Section, numbers: Iterator[int], has_notes: bool) -> str:
    part = section.part
    intro = f"<p>{len(part.arms)} members against {_text(x_label(part.x))}: {_text(', '.join(part.arms))}.</p>"
    boxes = []
    if section.findings:
        boxes.append(_box("What the numbers say", map(_finding, section.findings)))
    if part.note:
        boxes.append(_box("Note", [_text(part.note)], "box note"))
    beside = f'<div class="beside{"" if len(boxes) == 2 else " single"}">{"".join(boxes)}</div>' if boxes else ""
    after = f'<p class="files">{_link("#notes", "Read with care")}: notes on this study.</p>' if has_notes else ""
    figures = "".join(_figure(drawn, f"Figure {next(numbers)}", after) for drawn in section.figures)
    if not section.figures:
        figures = "<p>No member of this slice has been evaluated yet.</p>"
    return f'<section id="{_anchor(part)}"><h2>{_text(part.title)}</h2>{intro}{beside}{figures}</section>'


def _figure(drawn: DrawnFigure, number: str, after: str) -> str:
    """A figure with its caption, its files, and `after` them."""
    figure = drawn.figure
    width, height = drawn.size
    narrow = ""
    if drawn.narrow_size is not None:
        narrow = (
            f'<source media="(max-width: 720px)" srcset="{figure.name}{NARROW}.png" '
            f'width="{drawn.narrow_size[0]}" height="{drawn.narrow_size[1]}">'
        )
    files = [_link(f"{figure.name}.{ending}", ending.upper()) for ending in (*drawn.formats, "csv")]
    title = "" if figure.title == number else f" {_text(figure.title)}."
    return (
        f'<figure id="{figure.name}"><a href="{figure.name}.png"><picture>{narrow}'
        f'<img src="{figure.name}.png" width="{width}" height="{height}" style="max-width:{_SCALE * width:.0f}px" '
        f'loading="lazy" alt="{_text(figure.alt)}">'
        f"</picture></a><figcaption><p><b>{number}.{title}</b> {_text(figure.caption)}</p>"
        f'<p class="files">{" · ".join(files)}</p>{after}</figcaption></figure>'
    )


def _members(arm_table: pd.DataFrame, member_table: pd.DataFrame) -> str:
    return (
        '<section id="members"><h2>Members</h2><p>Means over finished seeds; the second line of a cell is the lowest '
        f"and highest seed. Unrounded: {_link('members.csv', 'members.csv')}.</p>{_table(arm_table, 'Members')}"
        f"<details><summary>Every run by itself</summary>{_table(member_table, 'Runs')}</details></section>"
    )


def _table(table: pd.DataFrame, label: str) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = []
    for row in table.itertuples(index=False):
        cells = []
        for place, value in enumerate(map(str, row)):
            first, _, spread = value.partition("\n")
            inner = _text(first) + (f'<span class="spread">{_text(spread)}</span>' if spread else "")
            cells.append(f'<th scope="row">{inner}</th>' if place == 0 else f"<td>{inner}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" aria-label="{_text(label)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _reading(tables: StudyTables) -> str:
    has = set(tables.results.metric)
    entries = [
        ("Total and active parameters", "All parameters of a model, and those that one token uses: a router keeps K of "
         "its E experts. Members of a family differ in the first and (nearly) agree in the second."),
        ("Tokens per parameter (TPP)", "Training tokens, padding included, over total parameters. The paper "
         "(arXiv 2508.18672) sees the best reasoning accuracy near 20 and memorization improving below it."),
        ("Sparsity", "1 − K / E."),
        ("Training loss", "Nats per token of the mixture, weighted as in training and without auxiliary losses, "
         "averaged over the steps before the evaluation."),
    ]  # fmt: skip
    if "validation_loss" in has:
        entries.append(("Validation loss", "The same loss on rows of one source's train or test split."))
    if "task_loss" in has:
        entries += [
            ("Task loss", "Bits per token of the answer alone given its prompt, mean over examples, as in the paper's "
             "code."),
            ("Generalization gap", "How much worse the test split is than the training split; of task losses in bits "
             "per answer token. “Train, corrected” has the training problems"
             " with correct solutions, so it is the fair partner of a clean test split."),
            ("Loss–accuracy gap", "Accuracy minus what the best non-increasing function of the task loss gives, fitted "
             "to all evaluations of all members: negative where a member turns its loss into less accuracy than the "
             "others do."),
        ]  # fmt: skip
    entries += [
        ("Seeds", "Lines join means over seeds, bands reach from the lowest to the highest seed, small points are the "
         "seeds. The seed changes initialization, order and generated data. With one seed there is no band."),
        ("Expert load", "Share of a layer's assignments that an expert received, over its fair share 1 / E."),
    ]  # fmt: skip
    items = "".join(f"<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>" for term, meaning in entries)
    return f'<section id="reading"><h2>How to read this</h2><dl>{items}</dl></section>'


def _reproduction(tables: StudyTables) -> str:
    command = tables.command or "python -m experiments.run --config=CONFIG --workdir=WORKDIR"
    rows = []
    for column, heading in (("device", "Device"), ("versions", "Versions")):
        for value, group in tables.members.dropna(subset=[column]).groupby(column):
            everyone = len(group) == tables.members[column].notna().sum()
            who = "all evaluated runs" if everyone else ", ".join(group.member)
            if value:
                rows.append(f"<dt>{heading}</dt><dd>{_text(value)} ({_text(who)})</dd>")
    hashes = tables.members.dropna(subset=["config_hash"])
    listed = _list((f"{_text(row.member)}: <code>{_text(row.config_hash)}</code>" for row in hashes.itertuples()), "")
    return (
        '<section id="reproduce"><h2>Reproduce</h2>'
        f"<pre>{_text(command)}\npython -m experiments.report --workdir=WORKDIR</pre><dl>{''.join(rows)}</dl>"
        f"<details><summary>Configuration hashes</summary>{listed}</details></section>"
    )


# ------------------------------------------------------------------------------------------------- pieces


def _finding(finding: Finding) -> str:
    evidence = f' <span class="evidence">({_text(finding.evidence)})</span>' if finding.evidence else ""
    return f"<b>{_text(finding.subject)}</b> {_text(finding.statement)}{evidence}."


def _box(heading: str, items: Iterable[str], kind: str = "box", after: str = "") -> str:
    return f'<aside class="{kind}"><h3>{_text(heading)}</h3>{_list(items, "")}{after}</aside>'


def _list(items: Iterable[str], kind: str) -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<ul{attribute}>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _link(target: str, text: str) -> str:
    return f'<a href="{_text(target)}">{_text(text)}</a>'


def _tag(name: str, inner: str, **attributes: str) -> str:
    listed = "".join(f' {key.replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    return f"<{name}{listed}>{inner}</{name}>"


def _anchor(part: StudySlice) -> str:
    return f"slice-{style.file_stem(part.name)}"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
