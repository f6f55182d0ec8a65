"""Samples several answers to each problem from trained members, and counts what any of them, or a vote, is worth.

    python -m experiments.test_time_compute --config=experiments/configs/paper_ttc.py --workdir=STUDY_FOLDER
    python -m experiments.test_time_compute --config=experiments/configs/quickstart.py --workdir=runs/quickstart \\
        --config.evaluation.test_time.samples=32

The workdir is the folder of the study that trained the members; their newest checkpoints are sampled as the section
`evaluation.test_time` says. Run it again and it goes on at the problem where it stopped; what is done is skipped. With
other settings everything is sampled anew, into other files. `--dry_run` counts and samples nothing.

Exit status: 0 done, 2 a mistake of yours, 75 stopped by SIGTERM or SIGINT and resumable, 1 anything else.
"""

from __future__ import annotations

import json
import sys

import ml_collections
from absl import flags

from experiments.execution import read_study
from experiments.flags import run_with_config
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, parse_mesh
from jaxmoe.exit_status import RESUMABLE

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study that trained the members, local or gs://.")
_MEMBER = flags.DEFINE_string("member", None, "Sample only this member.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the settings and count; sample nothing.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON: the records, or with --dry_run an object per member.")
_MESH = flags.DEFINE_string("mesh", None, "Preset and sizes of the mesh, such as fsdp_ep,expert=4.")


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    study = read_study(config, overridden)
    only = None if _MEMBER.value is None else study.member(_MEMBER.value).name
    if _DRY_RUN.value:
        from jaxmoe.scaling.test_time import describe_sampling

        described = describe_sampling([member for member in study.members if only in (None, member.name)])
        print(json.dumps(described, indent=2) if _JSON.value else "\n".join(map(_plan, described)))
        return 0
    if not _WORKDIR.value:
        raise ConfigError("--workdir is missing; give the folder that `python -m experiments.run` wrote to.")
    log_to_terminal()

    from jaxmoe.scaling.test_time import sample_study
    from jaxmoe.training import StopRequest, TrainingError

    mesh = None if _MESH.value is None else parse_mesh(_MESH.value)
    try:
        with StopRequest(second="exit") as stop:
            members = sample_study(study, _WORKDIR.value, only=only, mesh=mesh, stop=stop, progress=_say)
    except (TrainingError, OSError) as error:
        print(f"failed: {error}\nWhat is done is kept; run the same command again to go on.", file=sys.stderr)
        return 1
    records = [record for member in members for record in member.records]
    if _JSON.value:
        print(json.dumps(records, indent=2))
    else:
        for member in members:
            if member.status == "skipped":
                print(f"{member.name}: not trained yet, left out")
            for record in member.records:
                print(_curve(record))
    if members[-1].status == "resumable":
        print(f"stopped ({stop.requested}), resumable: run the same command again to go on.", file=sys.stderr)
        return RESUMABLE
    if not _JSON.value:
        print(f"done. Next: python -m experiments.report --workdir={_WORKDIR.value}")
    return 0


def _plan(described: dict) -> str:
    return (
        f"{described['name']}: {', '.join(described['sources']) or 'no source'} ({', '.join(described['splits'])}), "
        f"{described['samples']} samples at temperature {described['temperature']}, top_p {described['top_p']}, "
        f"{described['shots']} shots; a problem: at most {described['tokens_per_problem']:,} tokens, "
        f"{described['flops_per_problem']:.3g} FLOPs"
    )


def _curve(record: dict) -> str:
    """A member's numbers as a small table."""
    from jaxmoe.evaluation import budgets

    lines = [
        f"{record['member']}: {record['source']} ({record['split']}), step {record['step']}, {record['problems']} "
        f"problems, {record['samples']} samples, temperature {record['temperature']}",
        "  samples   coverage  expected   majority  expected ± standard error",
    ]
    for n in budgets(record["samples"]):
        lines.append(
            f"  {n:7d} {record[f'coverage_{n}']:10.3f} {record[f'expected_coverage_{n}']:9.3f} "
            f"{record[f'majority_{n}']:10.3f} {record[f'expected_majority_{n}']:9.3f} "
            f"± {record[f'expected_majority_{n}_standard_error'] or 0:.3f}"
        )
    return "\n".join(lines)


def _say(what: str, done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{what}: {done} of {total} problems", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_with_config(main)
