"""When one of several processes ends before its time, so do the others: soon, and with a status that says what to do.

A process that fails says so through JAX's coordination service before it ends, and the others end as failed with it.
One that is lost, since it was killed or its host is gone, says nothing: then the others may go on once all are started
again. They learn of it by an error in what they compute together, or by JAX's runtime, which ends them by SIGABRT.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from jaxmoe.config import ConfigError
from jaxmoe.exit_status import FAILED, RESUMABLE
from jaxmoe.processes import alone, is_first, said_for_all, say_for_all

_KEY = "failed"
_POLL_SECONDS = 1.0
# As Gloo, NCCL, the sockets below them and JAX's coordination service say it.
_LOST = re.compile(r"gloo|nccl|by peer|connection (?:refused|closed)|broken pipe|coordination service", re.IGNORECASE)


def lost_another(error: BaseException | None) -> bool:
    """Whether an error says that another process of the run does not answer any more."""
    return isinstance(error, jax.errors.JaxRuntimeError) and not alone() and _LOST.search(str(error)) is not None


@contextlib.contextmanager
def ending_together(*expected: type[Exception]) -> Iterator[None]:
    """Within the block, what ends one process of a run ends all; alone, errors are let through.

    An error ends this process at once, without a shutdown, for which it would have to wait for the others: with status
    `FAILED` after it told the others, which end so, too, or with `RESUMABLE` if it says that another process is lost.
    A ConfigError is one of all processes, and is let through.

    Args:
      expected: errors of which a line is said, instead of where they arose.
    """
    if alone():
        yield
        return
    over = threading.Event()
    threading.Thread(target=_listen, args=(over,), name="failures", daemon=True).start()
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        over.set()
        lost = lost_another(error)
        if lost:
            print(f"another process is lost ({error}); start all of them again to go on.", file=sys.stderr, flush=True)
        elif isinstance(error, expected):
            print(f"failed: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if not lost:
            say_for_all(_KEY, f"process {jax.process_index()} failed: {type(error).__name__}: {error}")
            time.sleep(2 * _POLL_SECONDS)  # they look once in that time, and the first process answers them
        os._exit(RESUMABLE if lost else FAILED)
    finally:
        over.set()


def _listen(over: threading.Event) -> None:
    """Ends this process when another one says that it failed."""
    while not over.wait(_POLL_SECONDS):
        told = said_for_all(_KEY)
        if told is not None and not over.is_set():
            sys.stderr.write(f"{told}\nThis process ends with it.\n")
            sys.stderr.flush()
            if is_first():  # JAX's runtime aborts the others where it ends before them
                time.sleep(3 * _POLL_SECONDS)
            os._exit(FAILED)
