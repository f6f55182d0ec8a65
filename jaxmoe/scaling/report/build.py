"""From a study's folder to the files of its report."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.scaling.report import (
    expert_load,
    figures,
    findings,
    html,
    members,
    post_training,
    style,
    test_time,
    trajectories,
)
from jaxmoe.scaling.report.comparison import Comparison, compare
from jaxmoe.scaling.report.errors import ReportError
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.tables import StudyTables, load_study
from jaxmoe.storage import as_path, write_bytes, write_text

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "files.txt"
"""Names of the files that the report consists of, one a line."""


def write_report(study_dir: epath.PathLike, output: epath.PathLike | None, *, svg: bool) -> epath.Path:
    """`jaxmoe.scaling.report.build_report`."""
    try:
        directory = as_path(study_dir)
        folder = directory / "report" if output is None else as_path(output)
    except ConfigError as error:
        raise ReportError(str(error)) from error
    tables = load_study(directory)
    folder = _Folder(folder, svg)
    summary, sections = None, []
    for part in tables.slices:
        comparison = compare(tables, part)
        if summary is None and not comparison.rows.empty:
            summary = folder.write_figure(figures.summary_figure(tables, comparison), narrow=True)
        headline = part == tables.slices[0]
        drawn = [folder.write_figure(figure, narrow=headline) for figure in slice_figures(tables, comparison)]
        sections.append(html.Section(part, tuple(drawn), tuple(findings.slice_findings(tables, comparison))))
    numbers = members.member_numbers(tables)
    folder.write_csv("members.csv", numbers)
    folder.write_csv("results.csv", tables.results)
    text = html.page(
        tables,
        summary,
        sections,
        findings.study_checks(tables),
        members.arm_table(numbers),
        members.run_table(numbers),
    )
    folder.write("index.html", text.encode())
    folder.remove_stale()
    return folder.directory / "index.html"


def slice_figures(tables: StudyTables, comparison: Comparison) -> Iterator[ReportFigure]:
    """The figures of a slice for which there are numbers, in the order of the page."""
    part = comparison.part
    stem = style.file_stem(part.name)
    if not comparison.rows.empty:
        yield figures.effect_figure(tables, comparison, part.x, f"{stem}-effect")
        if part.x == "total_parameters" and part == tables.slices[0]:
            yield figures.effect_figure(tables, comparison, "tokens_per_parameter", f"{stem}-tokens-per-parameter")
    optional = (
        post_training.reward_figure(tables, comparison, f"{stem}-grpo"),
        test_time.sampling_figure(tables, comparison, f"{stem}-test-time"),
        trajectories.loss_figure(tables, part, f"{stem}-task-loss"),
        trajectories.accuracy_figure(tables, part, f"{stem}-accuracy"),
        figures.loss_accuracy_figure(tables, comparison, f"{stem}-loss-accuracy-gap"),
        figures.gap_figure(tables, comparison, f"{stem}-gap"),
        expert_load.load_figure(tables, part, f"{stem}-expert-load"),
        trajectories.training_figure(tables, part, f"{stem}-training-curves"),
    )
    yield from (figure for figure in optional if figure is not None)


class _Folder:
    """The report's folder: writes files, and removes those that an earlier report wrote and this one did not."""

    def __init__(self, directory: epath.Path, svg: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.svg = directory, svg
        self._written: list[str] = []

    def write(self, name: str, contents: bytes) -> None:
        """Writes a file of the report and lists it."""
        write_bytes(self.directory / name, contents)
        self._written.append(name)

    def write_csv(self, name: str, table: pd.DataFrame) -> None:
        """Numbers are written so that reading them gives the same numbers back."""
        self.write(name, table.to_csv(index=False, lineterminator="\n").encode())

    def write_figure(self, figure: ReportFigure, *, narrow: bool) -> html.DrawnFigure:
        """Writes a figure's image, its table and, for phones, an image with all panels below each other."""
        wide, slim = figure.draw(figure.columns), figure.draw(1) if narrow else None
        self.write(f"{figure.name}.png", style.image_bytes(wide))
        if slim is not None:
            self.write(f"{figure.name}{html.NARROW}.png", style.image_bytes(slim))
        if self.svg:
            self.write(f"{figure.name}.svg", style.image_bytes(wide, "svg"))
        self.write_csv(f"{figure.name}.csv", figure.data)
        formats = ("png", "svg") if self.svg else ("png",)
        return html.DrawnFigure(figure, style.pixels(wide), style.pixels(slim) if slim is not None else None, formats)

    def remove_stale(self) -> None:
        """Removes what `MANIFEST` lists of the last time and is not written any more; other files are left alone."""
        manifest = self.directory / MANIFEST
        earlier = manifest.read_text().splitlines() if manifest.exists() else []
        for name in set(earlier) - set(self._written):
            if name == pathlib.PurePosixPath(name).name:
                (self.directory / name).unlink(missing_ok=True)
        write_text(manifest, "".join(f"{name}\n" for name in sorted(self._written)))
