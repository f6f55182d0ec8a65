"""Damage of a checkpoint: told apart from what else may fail while one is read, and agreed on by all processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
from collections.abc import Iterator
from typing import Literal

from jaxmoe.processes import alone, told_by_all
from jaxmoe.storage_faults import first_line
from jaxmoe.training.errors import CheckpointError

Finding = Literal["intact", "damaged", "senseless", "unreadable", "refused"]
"""What a process found of a checkpoint, better first: `damaged`, files are missing, cut or changed; `senseless`, no
sense could be made of one, which is damage if there are others that can be read; `unreadable`, just now or by this
machine; `refused`, it is of another model or of a later jaxmoe."""

_FINDINGS: tuple[Finding, ...] = ("intact", "damaged", "senseless", "unreadable", "refused")
_KEYS = itertools.count()


class DamageError(Exception):
    """What a checkpoint holds is not what was written."""


def finding(error: BaseException | None) -> Finding:
    """What an error, met while a checkpoint was read, says of it."""
    if error is None:
        return "intact"
    if isinstance(error, CheckpointError):
        return "refused"
    error = _told(error)
    if _is_damage(error):
        return "damaged"
    return "senseless" if _is_of_content(error) else "unreadable"


@contextlib.contextmanager
def in_agreement() -> Iterator[None]:
    """What one process finds wrong with a checkpoint is wrong with it for all: the worst is raised in every process.

    To be entered by all processes, in the same order. Within the block nothing may wait for another process.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not alone():
        said = json.dumps([finding(error), "" if error is None else first_line(error)])
        told = [json.loads(answer) for answer in told_by_all(f"checkpoint-found/{next(_KEYS)}", said)]
        process = max(range(len(told)), key=lambda process: _FINDINGS.index(told[process][0]))
        worst, why = told[process]
        if worst != finding(error):
            raise _as_found(worst, f"process {process}: {why}") from error
    if error is not None:
        raise error


def agreed_steps(steps: list[int]) -> list[int]:
    """The steps of the checkpoints that there are, as the first process sees them."""
    return json.loads(told_by_all(f"checkpoint-steps/{next(_KEYS)}", json.dumps(steps))[0])


def _as_found(worst: Finding, why: str) -> Exception:
    """An error of which `finding` says the same."""
    kinds = {"damaged": DamageError, "senseless": ValueError, "unreadable": OSError, "refused": CheckpointError}
    return kinds[worst](why)


def _told(error: BaseException) -> BaseException:
    """What Orbax wraps in a bare `Exception` while it reads an array: the error that says what happened."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_damage(error: BaseException) -> bool:
    """Whether an error says that files are missing, cut or changed, not that this machine could not read them."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    if isinstance(error, DamageError | KeyError | json.JSONDecodeError | UnicodeDecodeError):
        return True
    of_the_system = re.search(r"OS error (\d+)", str(error))  # TensorStore has errors of the system as text
    if of_the_system is not None and int(of_the_system[1]) != errno.ENOENT:
        return False
    return str(error).startswith(("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION"))


def _is_of_content(error: BaseException) -> bool:
    """Whether an error is one of making sense of a file."""
    if re.match(r"[A-Z_]+: ", str(error)):  # as TensorStore's errors begin
        return False
    return isinstance(error, ValueError | TypeError | AttributeError | LookupError)
