"""The report of a study: figures, tables and a page, made from its records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.scaling.report.errors import ReportError

if TYPE_CHECKING:
    from etils import epath

__all__ = ["ReportError", "build_report"]


def build_report(
    study_dir: epath.PathLike, output: epath.PathLike | None = None, *, svg: bool = False
) -> epath.Path:
    """Writes the report of a study, finished or not: `index.html`, PNG images, and a CSV file for every figure.

    Equal records give equal files. Besides the figures' there are `summary.png`, `members.csv` (a row each run) and
    `results.csv` (every number).

    Args:
      study_dir: the folder that `python -m experiments.run` wrote to, local or gs://.
      output: where to write; None: `report` in the study's folder.
      svg: write every figure as SVG too.

    Returns:
      The path of `index.html`.

    Raises:
      ReportError: no study there, nothing evaluated yet, or a broken file; the message names it.
    """
    from jaxmoe.scaling.report.build import write_report

    return write_report(study_dir, output, svg=svg)
