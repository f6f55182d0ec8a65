"""Kills a run at random moments, resumes it each time, and tells whether the end is as if nothing had happened.

    python -m experiments.chaos --config=experiments/configs/quickstart.py --member=E8 --kills=10

The member is trained once undisturbed. In another folder it is trained by processes that are killed: while a step is
computed, while a checkpoint is being written, before the first step. Then the ends of the two are compared bit for bit:
parameters, optimizer state, counters, random key, data position, metrics.jsonl and the records. On 2 cores ten kills of
a quickstart member take 2 to 4 minutes; `--config.train.steps=200` shortens that.
Exit status: 0 bit-identical, 1 not, 2 a mistake in the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ml_collections
from absl import flags
from absl import logging as absl_logging

from experiments.execution import read_study
from experiments.flags import run_with_config
from jaxmoe.config import ConfigError
from jaxmoe.exit_status import RESUMABLE

if TYPE_CHECKING:
    from experiments.disturbance import Kill

SIGNALS = ("KILL", "TERM", "INT")

_MEMBER = flags.DEFINE_string("member", None, "Train this member. Default: the first.")
_KILLS = flags.DEFINE_integer("kills", 10, "How many times to kill it.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.", lower_bound=0)
_SIGNALS = flags.DEFINE_list("signals", list(SIGNALS), f"Signals to kill with, of {', '.join(SIGNALS)}.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "An empty folder for both runs, local or gs://. Default: a temporary one, kept if they differ."
)


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    study = read_study(config, overridden)
    member = study.member(_MEMBER.value or study.members[0].name)
    steps = member.config.train.steps
    unknown = [name for name in _SIGNALS.value if name not in SIGNALS]
    if unknown or not _SIGNALS.value:
        raise ConfigError(f"--signals={','.join(_SIGNALS.value)}; choose of {', '.join(SIGNALS)}.")

    from experiments.disturbance import plan_kills, train_to_end, train_until_killed

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells of every file that it reads
    with _folder(_WORKDIR.value) as (workdir, logs):
        undisturbed, disturbed = (os.path.join(workdir, name) for name in ("undisturbed", "killed"))
        status, pace = train_to_end(study, member.name, undisturbed, logs / "undisturbed.log")
        if status != 0 or pace is None:
            return _unexpected(status, logs / "undisturbed.log")
        print(f"undisturbed: {steps} steps of {member.name} in {pace.whole:.0f} s", flush=True)
        started, fell = time.monotonic(), 0
        log = logs / "killed.log"
        for number, plan in enumerate(plan_kills(_KILLS.value, steps, _SIGNALS.value, _SEED.value), 1):
            kill = train_until_killed(study, member.name, disturbed, log, plan, pace)
            if kill.status == 0:
                print(f"kill {number}: the run was over before it")
                break
            if kill.status != (-9 if plan.signal == "KILL" else RESUMABLE):
                return _unexpected(kill.status, log)
            fell += 1
            if kill.start is not None:  # the first process compiled, which the others need not
                pace = dataclasses.replace(pace, start=min(pace.start, kill.start))
            print(f"kill {number}: {_told(kill)}", flush=True)
        status, _ = train_to_end(study, member.name, disturbed, log)
        if status != 0:
            return _unexpected(status, log)
        print(f"killed {fell} of {_KILLS.value} times: {steps} steps in {time.monotonic() - started:.0f} s")
        same = _compare(os.path.join(undisturbed, member.name), os.path.join(disturbed, member.name))
        if same and _WORKDIR.value is None:
            shutil.rmtree(workdir)
        else:
            print(f"both runs are in {workdir}")
    if same and not fell:
        print("no kill fell, so nothing was shown; give more steps")
    return 0 if same and fell else 1


def _told(kill: Kill) -> str:
    """A kill in one line."""
    plan = kill.plan
    where = "before the first step" if kill.seen is None else f"after step {kill.seen}"
    if kill.unfinished is not None:
        where += f", while checkpoint {kill.unfinished.split('.')[0]} was being written"
    on = "starts again" if kill.newest is None else f"goes on after step {kill.newest}"
    status = "killed" if kill.status < 0 else f"exit status {kill.status}"
    return f"{plan.signal:<4} {where} ({status}); {on}"


def _compare(undisturbed: str, disturbed: str) -> bool:
    """Prints part by part whether two runs ended alike."""
    from experiments.end_state import differences

    found = differences(undisturbed, disturbed)
    for part, differing in found.items():
        listed = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        print(f"  {part}: " + (f"differs in {listed}" if differing else "bit-identical"))
    same = not any(found.values())
    print("bit-identical to the undisturbed run" if same else "NOT bit-identical to the undisturbed run")
    return same


def _unexpected(status: int, log: pathlib.Path) -> int:
    """Says how a process ended that should have ended otherwise."""
    print(f"a training process ended with status {status}; the end of its output:\n{log.read_text()[-3000:]}")
    return 1


@contextlib.contextmanager
def _folder(given: str | None) -> Iterator[tuple[str, pathlib.Path]]:
    """The folder of both runs, and one on this disk for their output; processes compile what is compiled once."""
    from jaxmoe.storage import as_path, is_remote

    workdir = given or tempfile.mkdtemp(prefix="jaxmoe-chaos-")
    path = as_path(workdir)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"--workdir={workdir}: not empty; both runs must begin at their beginning.")
    if not is_remote(workdir):
        workdir = os.path.abspath(workdir)
    with tempfile.TemporaryDirectory() as own:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(own, "compiled"))
        yield workdir, pathlib.Path(own)


if __name__ == "__main__":
    run_with_config(main)
