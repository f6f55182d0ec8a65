"""Loss spikes: found against the losses before them, warned of, skipped or stopped at, the same after a resume."""

import json
import logging
import signal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import ConfigError, TrainConfig
from jaxmoe.data import Mixture
from jaxmoe.training import LossSpikeError, train
from jaxmoe.training.spikes import SpikeHistory, find_spike

SPIKE = 15
"""0-based global step whose batch has targets that no model expects."""

TRAIN = TrainConfig(steps=1, batch_size=1, sequence_length=1, spike_action="skip", spike_window=4, spike_factor=3.0)
LOOK = jax.jit(lambda history, loss: find_spike(history, loss, TRAIN))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([1.0, 1.25, 2.0, 9.0, np.nan, np.inf]) | st.floats(0, 10, width=32), max_size=15))
def test_a_spike_is_above_the_median_by_so_many_deviations(losses):
    """Against the definition on the last four finite losses, kept in a list."""
    history, before, spikes = SpikeHistory.empty(TRAIN), [], 0
    for loss in losses:
        history, leave_out, metrics = LOOK(history, np.float32(loss))
        window = np.array(before[-4:], np.float32)
        median = np.median(window) if len(window) == 4 else np.inf
        limit = median + 3 * np.median(np.abs(window - median)) if len(window) == 4 else np.inf
        expected = bool(np.isfinite(loss) and loss > limit)
        assert float(metrics["spike_limit"]) == pytest.approx(float(limit))
        if abs(loss - limit) > 1e-5 or not np.isfinite(loss):
            assert bool(metrics["spike"]) == bool(leave_out) == expected
        spikes += bool(metrics["spike"])
        assert int(metrics["spikes"]) == spikes
        before += [loss] * bool(np.isfinite(loss))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spike_window": 1}, "spike_window=1; choose 2 <= spike_window <= 10000"),
        ({"spike_factor": 0.0}, "spike_factor=0.0; it must be positive"),
    ],
)
def test_settings_without_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(steps=1, batch_size=1, sequence_length=1, **values)


@pytest.fixture
def spiky(tiny_run, replace_train, monkeypatch):
    """A run whose batch of global step `SPIKE` is unlike the others; with an action."""
    original = Mixture.batches

    def batches(self, first_step, count):
        made = original(self, first_step, count)
        if first_step <= SPIKE < first_step + count:
            unlike = made[SPIKE - first_step]
            unlike["targets"] = (unlike["targets"] + 100) % 270
        return made

    monkeypatch.setattr(Mixture, "batches", batches)
    return lambda action: replace_train(
        tiny_run, log_every=1, spike_action=action, spike_window=6, spike_factor=8.0
    )


def log_of(directory) -> dict[int, dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


def test_a_warning_changes_no_number(spiky, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        assert train(spiky("warn"), tmp_path / "warn").status == "done"
    train(spiky("off"), tmp_path / "off")
    assert caplog.text.count("step 16 is a loss spike: loss ") == caplog.text.count("is a loss spike") == 1
    assert "on the batch of global step 15 is above" in caplog.text
    warned, silent = log_of(tmp_path / "warn"), log_of(tmp_path / "off")
    assert [line.pop("spikes") for line in warned.values()] == [0] * 15 + [1] * 9
    assert warned == silent
    assert [line["skipped"] for line in silent.values()] == [0] * 24


def test_a_skipped_spike_is_skipped_again_after_a_resume(spiky, tmp_path):
    """Stopped between the losses and the spike: what it is compared with comes from the checkpoint."""
    run = spiky("skip")
    train(run, tmp_path / "undisturbed")
    first = train(run, tmp_path / "stopped", on_evaluate=lambda _: signal.raise_signal(signal.SIGTERM))
    assert (first.status, first.step) == ("resumable", 8)
    assert train(run, tmp_path / "stopped").status == "done"
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "stopped")]
    assert logs[0] == logs[1]
    log = log_of(tmp_path / "stopped")
    assert [line["skipped"] for line in log.values()] == [line["spikes"] for line in log.values()]
    assert log[16]["param_norm"] == log[15]["param_norm"]
    assert log[17]["param_norm"] != log[16]["param_norm"]


def test_a_run_stops_at_a_spike_and_goes_on_past_it_when_told_to(spiky, tmp_path):
    said = "step 16 is a loss spike .* batch of global step 15 .* good checkpoint is of step 12 .*spike_action=skip"
    for _ in range(2):  # run again, it stops at the same place
        with pytest.raises(LossSpikeError, match=said):
            train(spiky("stop"), tmp_path)
    assert max(log_of(tmp_path)) == 16
    assert train(spiky("skip"), tmp_path, resume="force").status == "done"
    assert log_of(tmp_path)[24]["skipped"] == 1
