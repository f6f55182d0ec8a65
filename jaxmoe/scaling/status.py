"""How far the members of a study are, read from their run directories alone: from any machine, without JAX.

A member that trains writes `status.json` every `HEARTBEAT_SECONDS` (`jaxmoe.scaling.heartbeat`); one that is done has
`DONE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from jaxmoe.config import ConfigError, config_hash
from jaxmoe.exclusive import check_unused
from jaxmoe.run_files import DONE_FILE, STATUS_FILE
from jaxmoe.scaling.study import Member
from jaxmoe.storage import as_path, read_json

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
"""After this long without a heartbeat a job counts as gone."""

State = Literal["waiting", "running", "preempted", "failed", "done"]


@dataclasses.dataclass(frozen=True)
class MemberStatus:
    """Where a member stands.

    Attributes:
      name: of the member.
      state: `waiting` if it was never started, `running`, `preempted` if a signal stopped it and it can go on, also
        where it was killed before it had saved, `failed`, or `done`.
      step: steps done at the last heartbeat; `steps`: those of its configuration.
      loss: of that step, nats per token; None where that is not known.
      tokens_per_second: at the last heartbeat, without padding.
      starts: how often it was started.
      error: the last one; None for a member that is done.
      heartbeat: when it was last heard of, seconds since 1970.
    """

    name: str
    state: State
    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    starts: int = 0
    error: str | None = None
    heartbeat: float | None = None


def member_status(workdir: epath.PathLike, member: Member, *, now: float | None = None) -> MemberStatus:
    """Reads where a member of a study stands.

    Args:
      workdir: of the study, local or gs://.
      member: of the study.
      now: seconds since 1970; None asks the clock.
    """
    directory = as_path(workdir) / member.name
    steps = member.config.train.steps
    written = read_status(directory)
    shared = {
        "tokens_per_second": written.get("tokens_per_second"),
        "starts": written.get("starts", 0),
        "heartbeat": written.get("heartbeat"),
    }
    done = read_done(directory)
    if done is not None and done["config_hash"] == config_hash(member.config):
        return MemberStatus(member.name, "done", done["step"], steps, done["loss"], **shared)
    if not written:
        return MemberStatus(member.name, "waiting", 0, steps)
    state, error = written["state"], written.get("error")
    if state == "running" and not _alive(directory, written, time.time() if now is None else now):
        process = f"process {written['process']} on {written['host']}"
        if written.get("stopping"):
            state = "preempted"
            error = (
                f"{process} was told to stop ({written['stopping']}) and killed before it had saved; it goes on from "
                "its last checkpoint."
            )
        else:
            state = "failed"
            error = f"{process} ended without a word: killed, out of memory, or its machine is gone."
    if state == "done":  # of another configuration
        state = "waiting"
    return MemberStatus(member.name, state, written.get("step") or 0, steps, written.get("loss"), error=error, **shared)


def is_done(directory: epath.Path, member: Member) -> bool:
    """Whether a member was trained to its end with this very configuration."""
    done = read_done(directory)
    return done is not None and done["config_hash"] == config_hash(member.config)


def read_done(directory: epath.Path) -> dict[str, Any] | None:
    """A member's DONE; None, with a warning if it is there but broken, where there is none."""
    path = directory / DONE_FILE
    if not path.exists():
        return None
    try:
        done = read_json(path)
        missing = [key for key in ("config_hash", "step", "loss") if key not in done]
        if not missing:
            return done
        reason = f"it has no {', '.join(missing)}"
    except (ValueError, TypeError) as error:
        reason = str(error)
    logger.warning("%s cannot be used (%s); the member counts as not done, and gets a new one", path, reason)
    return None


def read_status(directory: epath.Path) -> dict[str, Any]:
    """What `status.json` of a run directory says; empty where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        written = read_json(directory / STATUS_FILE)
        if isinstance(written, dict) and {"state", "host", "process", "heartbeat"} <= set(written):
            return written
    return {}


def in_use(directory: epath.PathLike) -> bool:
    """Whether a process holds the run directory's lock; False where there are no locks."""
    try:
        check_unused(directory)
    except ConfigError:
        return True
    return False


def _alive(directory: epath.Path, written: Mapping[str, Any], now: float) -> bool:
    """Whether the process that wrote a `running` is still there."""
    if in_use(directory):
        return True
    if now - written["heartbeat"] > SILENCE_SECONDS:
        return False
    if written["host"] != socket.gethostname():
        return True
    try:
        os.kill(written["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
