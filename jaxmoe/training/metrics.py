"""What training writes down as it goes: metrics.jsonl, throughput.jsonl and TensorBoard files."""

from __future__ import annotations

import json
import logging
import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxmoe.run_files import METRICS_FILE, THROUGHPUT_FILE
from jaxmoe.storage import is_remote, write_text
from jaxmoe.storage_faults import first_line, is_storage_fault
from jaxmoe.training.appending import AppendedFile
from jaxmoe.training.tensorboard import EventFile

logger = logging.getLogger(__name__)

TENSORBOARD_DIRECTORY = "tensorboard"

_ORDER = (
    "loss", "reward", "equal_groups", "response_tokens_mean", "response_tokens_max", "truncated_fraction", "kl",
    "clip_fraction", "entropy", "load_balance", "router_z", "total_loss", "grad_norm", "param_norm", "learning_rate",
    "dropped_fraction", "overflow_fraction", "load_max_over_mean", "load_cv",
)  # fmt: skip
_COUNTS = ("dead_experts", "tokens", "prompts_left_out", "skipped", "spikes")


def plain_number(value: Any) -> float | int | None:
    """A scalar as JSON writes it: the shortest decimal that gives the same float32 back; None if it is not finite."""
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        return int(array)
    if not math.isfinite(array):
        return None
    return float(str(np.float32(array)))


def metrics_line(step: int, metrics: Mapping[str, Any], source_names: Sequence[str]) -> dict[str, float | int | None]:
    """One line of metrics.jsonl: a function of the step's numbers alone, with its keys in a fixed order.

    Args:
      step: the number of the update, counted from 1.
      metrics: of the train step, fetched; in the steps of `log_every` with the `param_norm` after it.
      source_names: of the mixture, in its order; their losses become `loss/NAME`.

    Returns:
      `step`, the scalars, and the loss or reward of every source, None where the batch has none of it or where a
      number is not finite.
    """
    line: dict[str, float | int | None] = {"step": step}
    line.update((name, plain_number(metrics[name])) for name in _ORDER if name in metrics)
    for of_source, name in (("source_loss", "loss"), ("source_reward", "reward")):
        if of_source in metrics:
            values = zip(source_names, np.asarray(metrics[of_source]), strict=True)
            line.update((f"{name}/{source}", plain_number(value)) for source, value in values)
    line.update((name, int(np.asarray(metrics[name]))) for name in _COUNTS if name in metrics)
    return line


class JsonLines:
    """A file of one JSON object per line, each with its `step`, in rising order.

    A local file is appended to line by line. Object stores cannot append, so elsewhere the lines are held and the
    file is written anew at `flush`. On a disk that is full, or a store that does not answer, lines are held until it
    is mended. Several threads may use it.

    Args:
      path: of the file; its folder must exist.
      keep_until: of a file that is there already, lines up to this step stay and later ones are cut, as is
        whatever a kill left unfinished.

    Attributes:
      remote: whether the file is in an object store.
    """

    def __init__(self, path: epath.PathLike, keep_until: float):
        self._path = epath.Path(path)
        kept, whole = _read_lines(self._path, keep_until)
        if not whole:
            write_text(self._path, "".join(kept))
        self.remote = is_remote(self._path)
        self._file = None if self.remote else AppendedFile(self._path)
        self._lines, self._in_store = (kept, len(kept)) if self.remote else ([], 0)
        self._flushing = threading.Lock()

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line; a reader may see it from now on, and after `flush` it survives."""
        text = json.dumps(line, allow_nan=False) + "\n"
        if self._file is None:
            self._lines.append(text)
        else:
            self._file.append(text.encode())

    def flush(self) -> None:
        """Returns when every line is in storage.

        Raises:
          OSError: or what the store's client raises; nothing is lost, and a later call tries again.
        """
        if self._file is not None:
            self._file.flush()
            return
        with self._flushing:  # so that no older content replaces a newer
            self._rewrite()

    def close(self) -> None:
        """Writes what is held if storage takes it, and closes; a second time does nothing.

        What it does not take is lost. No checkpoint is of those steps, since the log is flushed before one is written,
        so that they come again when the run goes on.
        """
        if self._file is not None:
            self._file.close()
        elif self._flushing.acquire(blocking=False):  # else another thread is at it, and storage does not answer
            try:
                self._rewrite()
            except Exception as error:
                if not is_storage_fault(error):
                    raise
                logger.warning("the last lines of %s could not be written (%s)", self._path, first_line(error))
            finally:
                self._flushing.release()

    def _rewrite(self) -> None:
        count = len(self._lines)
        if count > self._in_store:
            write_text(self._path, "".join(self._lines[:count]), patience=0.0)
            self._in_store = count


def _read_lines(path: epath.Path, keep_until: float) -> tuple[list[str], bool]:
    """The lines up to a step, and whether they are all that the file holds."""
    if not path.exists():
        return [], True
    kept: list[str] = []
    content = path.read_bytes().decode(errors="replace")
    for line in content.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return kept, False
        if not line.endswith("\n") or step > keep_until:
            return kept, False
        kept.append(line)
    return kept, True


class Throughput:
    """Speed between two lines of the log, from the times at which steps were seen to be ready.

    Args:
      flops_per_token: of training, the exact count of `jaxmoe.accounting`.
      positions: B·S of a step, padding included.
    """

    def __init__(self, flops_per_token: float, positions: int):
        self._flops_per_token, self._positions = flops_per_token, positions
        self._previous: float | None = None
        self._seconds: list[float] = []
        self._tokens = 0

    def pause(self) -> None:
        """The next interval is not a step's: compilation, evaluation or a checkpoint comes between."""
        self._previous = None

    def observe(self, now: float, tokens: int) -> None:
        """A step with this many tokens, padding not counted, is ready at `now`, in seconds."""
        if self._previous is not None:
            self._seconds.append(now - self._previous)
            self._tokens += tokens
        self._previous = now

    @property
    def tokens_per_second(self) -> float | None:
        """Without padding, since the last line; None before the first interval."""
        return self._tokens / sum(self._seconds) if sum(self._seconds) > 0 else None

    def line(self, step: int) -> dict[str, float | int] | None:
        """A line of throughput.jsonl, and a new beginning; None if nothing was timed since the last.

        `tokens_per_second` and `model_flops_per_second` count tokens without padding, `positions_per_second` counts
        padding too; `step_seconds` is the median.
        """
        if self.tokens_per_second is None:
            return None
        line = {
            "step": step,
            "step_seconds": statistics.median(self._seconds),
            "tokens_per_second": self.tokens_per_second,
            "positions_per_second": self._positions * len(self._seconds) / sum(self._seconds),
            "model_flops_per_second": self._flops_per_token * self.tokens_per_second,
        }
        self._seconds, self._tokens = [], 0
        return {name: value if name == "step" else float(f"{value:.6g}") for name, value in line.items()}


class MetricsLog:
    """All of a run directory's logs.

    Args:
      directory: of the run.
      after: the step of the checkpoint that training goes on from; what was logged after it is cut, since those
        steps come again.
      source_names: of the mixture.
    """

    def __init__(self, directory: epath.PathLike, after: int, source_names: Sequence[str]):
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._source_names = tuple(source_names)
        self._metrics = JsonLines(directory / METRICS_FILE, after)
        self._throughput = JsonLines(directory / THROUGHPUT_FILE, after)
        self._tensorboard = _event_file(directory / TENSORBOARD_DIRECTORY, after)

    def write(self, step: int, metrics: Mapping[str, Any], throughput: Mapping[str, Any] | None) -> None:
        """Writes the lines of a step: its fetched metrics, and the speed if there is one."""
        line = metrics_line(step, metrics, self._source_names)
        self._metrics.write(line)
        if throughput is not None:
            self._throughput.write(throughput)
        if self._tensorboard is not None:
            parts = {"training": line, "throughput": throughput or {}}
            scalars = {f"{part}/{name}": value for part, own in parts.items() for name, value in own.items()
                       if name != "step" and value is not None}  # fmt: skip
            self._tensorboard.write(step, scalars)

    def flush(self) -> None:
        """Returns when everything written is in storage; another thread may call this while lines are written.

        Raises:
          OSError: or what an object store's client raises; nothing is lost, and a later call tries again.
        """
        self._metrics.flush()
        self._throughput.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Writes what is held if storage takes it, and closes all of them."""
        self._metrics.close()
        self._throughput.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoLog:
    """What `MetricsLog` is in the other processes of a run: nothing."""

    def write(self, step: int, metrics: Mapping[str, Any], throughput: Mapping[str, Any] | None) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Writes nothing."""


def _event_file(directory: epath.Path, after: int) -> EventFile | None:
    """TensorBoard's file; None, and a line in the log that says why, where there can be none."""
    if is_remote(directory):
        logger.info("no TensorBoard files: %s is not a local folder", directory)
        return None
    try:
        return EventFile(directory, after + 1)
    except ImportError:
        logger.info("no TensorBoard files: tensorboardX is not installed")
        return None
