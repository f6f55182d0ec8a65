"""Whether mathematical answers are equal, by math-verify in worker processes that may hang or be killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import queue
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence

from jaxmoe.config import ConfigError
from jaxmoe.post_training.math_worker import SECONDS

logger = logging.getLogger(__name__)

_WORKER = pathlib.Path(__file__).with_name("math_worker.py")
_STARTING_SECONDS = 120.0
_ANSWER_SECONDS = 4.0 * SECONDS
"""Two texts are parsed, and the results compared, each within `SECONDS`: after more the worker hangs."""

_MOST_WORKERS = 8


def require_math_verify() -> None:
    """Checks that the package is there.

    Raises:
      ConfigError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "grpo.reward compares answers by math-verify, which is not installed: `pip install 'jaxmoe[post]'`. "
            "'final_number' and 'exact' need nothing."
        )


class MathVerifier:
    """A pool of workers; a context manager. What a worker does not answer in time is not equal.

    Args:
      workers: processes; None: one for each processor, eight at most.
    """

    def __init__(self, workers: int | None = None):
        require_math_verify()
        count = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="math-verify")

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (true answer, response), whether what math-verify reads in the second equals the first."""
        return list(self._threads.map(lambda pair: self._ask(*pair), pairs))

    def close(self) -> None:
        """Ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _ask(self, true: str, given: str) -> bool:
        with self._worker() as worker:
            return worker.ask({"true": true, "given": given})

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started when it is first asked, and again after it was ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def ask(self, question: dict[str, str]) -> bool:
        """Whether the answers are equal; no answer in time, or none at all, is no."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            logger.warning("the process of math-verify had ended; the response counts as wrong")
            self.end()
            return False
        answer = self._line(_ANSWER_SECONDS)
        if answer not in (b"0\n", b"1\n"):  # it hangs, or it ended
            logger.warning("math-verify gave no answer in %.0f s: the response counts as wrong", _ANSWER_SECONDS)
            self.end()
        return answer == b"1\n"

    def end(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # Apart from this program's environment: neither its folder nor PYTHONPATH is looked into.
        self._process = subprocess.Popen(
            [sys.executable, "-I", os.fspath(_WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if self._line(_STARTING_SECONDS) != b"ready\n":
            self.end()
            raise RuntimeError("math-verify could not be started in a process of its own.")

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the process; None if there is none in time."""
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if readable else None
