"""Makes docs/fit_table.md: for each member, the smallest slice of each chip on which its train step fits.

    python -m experiments.fit_table --config=experiments/configs/paper_math.py --output=docs/fit_table.md

Every entry is a compilation of one to three minutes on 2 cores, so all 65 members on three chips take hours. Results
are kept beside the table, in fit_table.json: stopped and called again, the command goes on, and entries that are there
are not compiled again while the versions of JAX and libtpu are the same. The argument of the configuration narrows the
members, `--chips` the chips, and `--limit` how many entries one call compiles; what else the table has stays in it.
`--again` compiles entries that are there, too, and says what changed, as after a change of kernels or of the program.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a device that is here is not what the question is about

import ml_collections
from absl import flags

from experiments.flags import run_with_config
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, nearest

_OUTPUT = flags.DEFINE_string("output", "docs/fit_table.md", "The table; its results are in a .json of the same name.")
_CHIPS = flags.DEFINE_list("chips", ["v5p", "v6e", "h100"], "Columns of the table.")
_AGAIN = flags.DEFINE_bool("again", False, "Compile entries that are there once more, and compare.")
_LIMIT = flags.DEFINE_integer("limit", None, "Compile for the first so many entries alone.", lower_bound=0)


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    from jaxmoe.scaling.fit_table import SLICES, fill, rows_and_columns, table, versions
    from jaxmoe.scaling.study import Study
    from jaxmoe.storage import as_path, write_bytes, write_json

    log_to_terminal()
    unknown = [chip for chip in _CHIPS.value if chip not in SLICES]
    if unknown:
        raise ConfigError(f"--chips={unknown[0]}: no such column.{nearest(unknown[0], SLICES)}")
    study = Study.from_config_dict(config)
    output = as_path(_OUTPUT.value)
    results_file = output.parent / f"{output.stem}.json"
    kept = json.loads(results_file.read_text()) if results_file.exists() else {}
    results = kept.get("entries", {}) if kept.get("versions") == versions() else {}
    if kept and not results:
        earlier = output.parent / f"{output.stem}.earlier.json"
        write_json(earlier, kept)
        print(f"{results_file} is of {kept['versions']}, not of {versions()}: begun anew; it is kept as {earlier}.")
    selected = [member.name for member in study.members]
    names, chips = rows_and_columns(results, selected, _CHIPS.value)

    def write() -> None:
        write_json(results_file, {"versions": versions(), "entries": results})
        write_bytes(output, table(names, chips, results).encode())

    if results:
        write()
    for said in fill(results, study.members, _CHIPS.value, again=_AGAIN.value, limit=_LIMIT.value):
        print(said, file=sys.stderr)
        write()
    missing = sum(f"{name} {chip}" not in results for name in selected for chip in _CHIPS.value)
    print(f"{output}: {f'{missing} entries are missing; run again to go on' if missing else 'complete'}.")
    return 0


if __name__ == "__main__":
    run_with_config(main)
