"""What a person sees while members train: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TextIO

_SECONDS_BETWEEN_LINES = 10.0
_LINES_PER_MEMBER = 10


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclasses.dataclass(frozen=True)
class Latest:
    """Where the member that trains stands: steps done, and the loss (nats per token) and speed of the last."""

    step: int
    loss: float | None = None
    tokens_per_second: float | None = None


class ProgressReporter:
    """Progress of a study and of the member that trains, with the time that is left.

    On a terminal two bars; elsewhere a line at most every ten seconds and about every tenth of a member. Use it as
    a context manager, so that the terminal is left as it was.

    Args:
      stream: where to write; None is stderr.
      terminal: bars or lines; None asks the stream.

    Attributes:
      latest: where the member stands; None before the first begins.
    """

    def __init__(self, stream: TextIO | None = None, *, terminal: bool | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._study = _Span("study", 0, 0)
        self._member: _Span | None = None
        self.latest: Latest | None = None
        self._last_line = 0.0
        self._next_fraction = 0.0
        self._bars = None
        if self._terminal:
            self._make_bars()

    def study(self, total_steps: int, done: int = 0) -> None:
        """Begins a study of `total_steps` over all members, of which `done` need not be trained any more."""
        self._study = _Span("study", total_steps, done)
        if self._bars:
            self._bars.reset(self._study_bar, total=total_steps, completed=done, detail="", left="")
            self._bars.update(self._study_bar, visible=total_steps > 0)

    def member(self, name: str, total: int, done: int = 0) -> None:
        """Begins a member; `done` of its `total` steps were trained in an earlier session."""
        self._member = _Span(name, total, done)
        self.latest = Latest(done)
        self._study.step += done
        self._next_fraction = 0.0
        if self._bars:
            self._bars.reset(self._member_bar, total=total, completed=done, description=name, detail="", left="")
            self._bars.update(self._member_bar, visible=True)
            self._bars.update(self._study_bar, completed=self._study.step)
        else:
            self._write(f"{name}: {total} steps" + (f", going on after step {done}" if done else ""))

    def advance(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """The member has done `step` steps."""
        member = self._member
        if member is None or step <= member.step:
            return
        self.latest = Latest(step, loss, tokens_per_second)
        now = time.monotonic()
        first = member.starts == 0
        for span in (self._study, member):
            span.advance(step - member.step, now - member.seen, first=first)
        member.seen = now
        details = [] if loss is None else [f"loss {loss:.4f}"]
        if tokens_per_second:
            details.append(f"{tokens_per_second:,.0f} tokens/s")
        if self._bars:
            left = [None if s is None else f"{duration(s)} left" for s in self._seconds_left()]
            self._bars.update(self._member_bar, completed=step, detail=", ".join(details), left=left[0] or "")
            self._bars.update(self._study_bar, completed=self._study.step, left=left[1] or "")
            return
        fraction = step / max(member.total, 1)
        if step >= member.total or fraction >= self._next_fraction or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._next_fraction = (int(fraction * _LINES_PER_MEMBER) + 1) / _LINES_PER_MEMBER
            self._write(self._line(details))

    def note(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self._bars:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text)

    def close(self) -> None:
        """Takes the bars away."""
        if self._bars:
            self._bars.stop()

    def __enter__(self) -> ProgressReporter:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _seconds_left(self) -> tuple[float | None, float | None]:
        """Of the member, at its own pace; of the study, at that of all members, with a start for each to come."""
        member, study = self._member, self._study
        own = member.pace * (member.total - member.step) if member.pace and member.step < member.total else None
        rest = study.total - study.step
        if not study.pace or rest <= 0:
            return own, None
        members_to_come = (rest - (member.total - member.step)) / member.total
        return own, study.pace * rest + study.start_seconds / study.starts * max(members_to_come, 0.0)

    def _line(self, details: list[str]) -> str:
        member = self._member
        own, rest = self._seconds_left()
        parts = [f"{member.name}: step {member.step}/{member.total}", *([", ".join(details)] if details else [])]
        if own is not None:
            parts.append(f"{duration(own)} left")
        if self._study.total > member.total:
            share = f"study {self._study.step / self._study.total:.0%}"
            parts.append(share if rest is None else f"{share}, {duration(rest)} left")
        return "; ".join(parts)

    def _write(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(text, file=self._stream, flush=True)

    def _make_bars(self) -> None:
        from rich import progress as rich_progress
        from rich.console import Console

        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[left]}"),
            rich_progress.TextColumn("{task.fields[detail]}"),
            console=Console(file=self._stream, force_terminal=True),
        )
        self._member_bar = self._bars.add_task("", total=None, detail="", left="", visible=False)
        self._study_bar = self._bars.add_task("study", total=None, detail="", left="", visible=False)


class _Span:
    """Steps of a member or a study, and how long they took in this session.

    Starting is timed apart: until a member's first step is seen it is mostly compiled, and tells nothing of the rest.
    """

    def __init__(self, name: str, total: int, done: int):
        self.name, self.total, self.step = name, total, done
        self.seen = time.monotonic()
        self.starts, self.start_seconds = 0, 0.0
        self._steps, self._seconds = 0, 0.0

    def advance(self, steps: int, seconds: float, *, first: bool) -> None:
        self.step += steps
        if first:
            self.starts += 1
            self.start_seconds += seconds
        else:
            self._steps += steps
            self._seconds += seconds

    @property
    def pace(self) -> float | None:
        """Seconds per step; None while nothing is known."""
        return self._seconds / self._steps if self._steps else None
