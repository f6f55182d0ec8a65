"""From a study's folder to the files of its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from jaxmoe.scaling.report import expert_load, figures, findings, html, members, style, trajectories
from jaxmoe.scaling.report.comparison import Comparison, compare
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.tables import StudyTables, load_study

if TYPE_CHECKING:
    import pandas as pd


def write_report(study_dir: epath.PathLike, output: epath.PathLike | None, *, svg: bool) -> epath.Path:
    """`jaxmoe.scaling.report.build_report`."""
    tables = load_study(study_dir)
    directory = epath.Path(study_dir) / "report" if output is None else epath.Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    summary, sections = None, []
    for part in tables.slices:
        comparison = compare(tables, part)
        if summary is None and not comparison.rows.empty:
            summary = _write_figure(directory, figures.summary_figure(tables, comparison), svg)
        drawn = [_write_figure(directory, figure, svg) for figure in slice_figures(tables, comparison)]
        sections.append(html.Section(part, tuple(drawn), tuple(findings.slice_findings(tables, comparison))))
    numbers = members.member_numbers(tables)
    _write_csv(directory / "members.csv", numbers)
    _write_csv(directory / "results.csv", tables.results)
    text = html.page(
        tables,
        summary,
        sections,
        findings.study_checks(tables),
        members.arm_table(numbers),
        members.run_table(numbers),
    )
    index = directory / "index.html"
    index.write_text(text)
    return index


def slice_figures(tables: StudyTables, comparison: Comparison) -> Iterator[ReportFigure]:
    """The figures of a slice for which there are numbers, in the order of the page."""
    part = comparison.part
    stem = style.file_stem(part.name)
    if not comparison.rows.empty:
        yield figures.effect_figure(tables, comparison, part.x, f"{stem}-effect")
        if part.x == "total_parameters" and part == tables.slices[0]:
            yield figures.effect_figure(tables, comparison, "tokens_per_parameter", f"{stem}-tokens-per-parameter")
    optional = (
        trajectories.loss_figure(tables, part, f"{stem}-task-loss"),
        trajectories.accuracy_figure(tables, part, f"{stem}-accuracy"),
        figures.gap_figure(tables, comparison, f"{stem}-gap"),
        expert_load.load_figure(tables, part, f"{stem}-expert-load"),
        trajectories.training_figure(tables, part, f"{stem}-training-curves"),
    )
    yield from (figure for figure in optional if figure is not None)


def _write_figure(directory: epath.Path, figure: ReportFigure, svg: bool) -> html.DrawnFigure:
    """Writes a figure's wide and narrow image and its table."""
    wide, narrow = figure.draw(figure.columns), figure.draw(1)
    (directory / f"{figure.name}.png").write_bytes(style.image_bytes(wide))
    (directory / f"{figure.name}{html.NARROW}.png").write_bytes(style.image_bytes(narrow))
    if svg:
        (directory / f"{figure.name}.svg").write_bytes(style.image_bytes(wide, "svg"))
    _write_csv(directory / f"{figure.name}.csv", figure.data)
    formats = ("png", "svg") if svg else ("png",)
    return html.DrawnFigure(figure, style.pixels(wide), style.pixels(narrow), formats)


def _write_csv(path: epath.Path, table: pd.DataFrame) -> None:
    """Numbers are written so that reading them gives the same numbers back."""
    path.write_text(table.to_csv(index=False, lineterminator="\n"))
