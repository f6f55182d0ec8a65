"""Tuning measures candidates and writes what the kernels then read."""

import contextvars
import json
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cases, tiles, tune
from pallas_kernels.execution import Target

SHAPE = cases.Shape(tokens=16, experts_per_token=2, experts=2, width=128, hidden=256)
TARGET = Target("tpu", chip="v5p", interpret=True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(path))
    yield path
    tiles._entries.cache_clear()


def test_the_fastest_tile_of_each_operation_and_class_is_written_and_taken(table, monkeypatch):
    """With a clock that says so: the tile of 128 columns, or the first with 256 rows."""

    def clock(function, arguments):
        (tile,) = tiles._tried.get().values()
        if tile.get("contracted") == 256:
            raise ValueError("Mosaic failed to compile TPU kernel: out of memory")
        return 1.0 if tile.get("columns") == 128 or tile.get("rows") == 256 else 2.0

    tiles.write(table, [])
    lines = []
    written = tune.tune(TARGET, [SHAPE], ["bfloat16"], table, timer=clock, report=lines.append)
    entries = json.loads(table.read_text())["entries"]
    assert written == len(entries)
    operations = {"dispatch", "combine", "grouped_matmul", "weight_gradient", "moe_up", "hidden_gradient"}
    assert {entry["operation"] for entry in entries} == operations
    assert any("is passed over: Mosaic failed to compile" in line for line in lines)
    for case in cases.kernel_cases(SHAPE, "bfloat16", TARGET):
        tile = case.tiling.choose("bfloat16", "v5p", **case.sizes)
        assert getattr(tile, "columns", 128) == 128
        assert getattr(tile, "contracted", 0) != 256 or case.kernel in ("down product", "up product's transpose")
    of_up = next(entry for entry in entries if entry["operation"] == "moe_up")
    assert (of_up["microseconds"], of_up["microseconds_by_rule"]) == (1e6, 2e6)


def test_a_candidate_runs_with_its_tile_and_gives_the_same(table):
    tiles.write(table, [])
    (case,) = [case for case in cases.kernel_cases(SHAPE, "float32", TARGET) if case.kernel == "up, nothing kept"]
    inputs = case.inputs()
    columns, outs = set(), []
    for tile in case.tiling.candidates("float32", "v5p", **case.sizes)[:2]:
        with tiles.trying("moe_up", tile):
            outs.append(jax.jit(lambda *arguments: case.function(*arguments))(*inputs)[0])
        columns.add(tuple(tile.items()))
    assert len(columns) == 2
    assert float(abs(outs[0] - outs[1]).max()) < 1e-4


def test_what_starting_a_program_takes_does_not_count(monkeypatch):
    """A clock on which a call takes a second and starting the program five: one second a call, traced once."""
    loops = [21] * 11 + [1] * 11
    clock = iter([seconds for turns in loops for seconds in (0.0, 5.0 + turns)])
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    traced = []

    def product(x):
        traced.append(x.shape)
        return x @ x

    assert tune.seconds_of(product, [jnp.ones((8, 8))]) == pytest.approx(1.0)
    assert traced == [(8, 8)]


def test_without_a_home_the_rule_decides_and_tune_asks_for_a_file(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in (tiles.ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert tiles.user_table() is None
    (case, *_) = cases.kernel_cases(SHAPE, "float32", TARGET)
    assert case.tiling.choose("float32", "v5p", **case.sizes) is not None
    monkeypatch.setattr(tune, "resolved_backend", lambda: "tpu")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "name one with --table=FILE" in capsys.readouterr().err


def test_on_cpu_it_says_that_there_is_nothing_to_tune(capsys):
    assert contextvars.Context().run(tune.main, []) == 2
    assert "nothing to tune on platform 'cpu'" in capsys.readouterr().err
