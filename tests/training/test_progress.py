"""What a person sees."""

import io

import pytest

from jaxmoe.training.progress import ProgressReporter, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_away_from_a_terminal():
    """A line per tenth, however many steps; the last step always; the study's share beside the member's."""
    stream = io.StringIO()
    with ProgressReporter(stream) as progress:
        progress.study(400)
        progress.member("E2", 200)
        for step in range(1, 201):
            progress.advance(step, loss=2.0, tokens_per_second=1e4)
        progress.note("between")
        progress.member("E8", 200, done=150)
        progress.advance(200)
    written = stream.getvalue().splitlines()
    assert written[0] == "E2: 200 steps"
    member = [line for line in written if line.startswith("E2: step")]
    assert len(member) == 11  # the first step, then every tenth
    assert member[-1].startswith("E2: step 200/200; loss 2.0000, 10,000 tokens/s; study 50%")
    assert "between" in written
    assert "E8: 200 steps, going on after step 150" in written
    assert written[-1] == "E8: step 200/200; study 100%"


def test_time_left_leaves_out_earlier_sessions_and_compilation(monkeypatch):
    """50 of 100 steps came from a checkpoint; 30 s of start-up; then 2 s a step: 80 s for the 40 that are left."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = ProgressReporter(stream)
    progress.study(200)
    progress.member("E2", 100, done=50)
    now[0] = 30.0
    progress.advance(51)
    assert stream.getvalue().splitlines()[-1] == "E2: step 51/100; study 26%"
    now[0] = 48.0
    progress.advance(60)
    # The member that is to come: 100 steps of 2 s, and a start-up of 30 s.
    assert stream.getvalue().splitlines()[-1] == "E2: step 60/100; 1 min 20 s left; study 30%, 5 min 10 s left"


def test_bars_on_a_terminal():
    stream = io.StringIO()
    with ProgressReporter(stream, terminal=True) as progress:
        progress.study(20)
        progress.member("E2", 10)
        progress.advance(10, loss=1.25)
        progress.note("a note [with brackets]")
    text = stream.getvalue()
    for expected in ("E2", "10/10", "loss 1.2500", "study", "10/20", "a note [with brackets]"):
        assert expected in text


def test_silent_before_a_member_begins():
    stream = io.StringIO()
    ProgressReporter(stream).advance(1)
    assert stream.getvalue() == ""
