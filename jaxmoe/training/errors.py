"""What stops a training run, in words that say how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from etils import epath

from jaxmoe.storage_faults import is_no_space


class TrainingError(RuntimeError):
    """Training cannot go on; what is in the run directory stays good."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read."""


class NonFiniteLossError(TrainingError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class BufferOverflowError(TrainingError):
    """Rows found no room in a receive buffer of expert parallelism, and the run was not to bear it."""


class LossSpikeError(TrainingError):
    """The loss of a step stands out from those before it, and the configuration asks to stop there."""


class EvaluationStopped(Exception):
    """A run was asked to stop during an evaluation; it saves, and evaluates that step anew when it goes on."""


class NoSpaceLeftError(CheckpointError):
    """The disk of the run directory is full."""


def no_space_left(path: epath.PathLike, last_step: int | None) -> NoSpaceLeftError:
    """The error for a full disk: what was lost (nothing but time), and what to do."""
    last = "there is no checkpoint yet" if last_step is None else f"last good checkpoint: step {last_step}"
    return NoSpaceLeftError(f"no space left at {path}; {last}; free space and run again.")


@contextlib.contextmanager
def explain_no_space(path: epath.PathLike, last_step: Callable[[], int | None]) -> Iterator[None]:
    """Turns the many forms in which a full disk shows itself into `NoSpaceLeftError`.

    Args:
      path: the folder that is being written to.
      last_step: called then; the step of the newest checkpoint, None if there is none.
    """
    try:
        yield
    except NoSpaceLeftError:
        raise
    except Exception as error:
        if is_no_space(error):
            raise no_space_left(path, last_step()) from error
        raise
