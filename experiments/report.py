"""Writes the report of a study: figures, tables and a page, from the records in its folder.

    python -m experiments.report --workdir=runs/quickstart

The study need not be finished. The page is WORKDIR/report/index.html; open it with any browser. Exit status: 0 done,
2 there is nothing to report on.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from experiments.flags import fail, run_command
from experiments.terminal import log_to_terminal
from jaxmoe.scaling.report import ReportError, build_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study, local or gs://.")
_OUTPUT = flags.DEFINE_string("output", None, "Where to write. Default: report, in the study's folder.")
_SVG = flags.DEFINE_bool("svg", False, "Write every figure as SVG too.")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if len(argv) > 1:
        fail(ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value."))
    if not _WORKDIR.value:
        fail(ValueError("--workdir is missing; give the folder that `python -m experiments.run` wrote to."))
    log_to_terminal()
    try:
        index = build_report(_WORKDIR.value, _OUTPUT.value, svg=_SVG.value)
    except (ReportError, OSError) as error:
        fail(error)
    print(f"report: {index}")
    return 0


if __name__ == "__main__":
    run_command(main)
