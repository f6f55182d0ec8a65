"""Tiles come from the user's table, else from the packaged one, else by rule; and never break a shape."""

import itertools
import json
import logging
from typing import NamedTuple

import jax.numpy as jnp
import pytest

from pallas_kernels import cases, mosaic, tiles
from pallas_kernels.combine.mosaic_tpu import COMBINE
from pallas_kernels.dispatch.mosaic_tpu import DISPATCH
from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul.mosaic_tpu import PRODUCT, WEIGHT_GRADIENT
from pallas_kernels.moe_mlp.mosaic_tpu import HIDDEN_GRADIENT, UP


class Tile(NamedTuple):
    rows: int


def fitted(tile, width, itemsize, chip):
    if tile.rows * width * itemsize > 2048:
        raise tiles.Misfit("too large")
    return Tile(min(tile.rows, width))


TILING = tiles.Tiling("op", Tile, lambda width, itemsize, chip: Tile(1), fitted)


def entry(rows, width=100, **changes):
    base = {"operation": "op", "chip": "v5p", "dtype": "float32", "sizes": {"width": width}, "tile": {"rows": rows}}
    return base | changes


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A user's table that is looked at."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tiles.ENVIRONMENT_VARIABLE, str(path))
    yield path
    tiles._entries.cache_clear()
    tiles._log_once.cache_clear()


def choose(width=100, chip="v5p", dtype=jnp.float32):
    return TILING.choose(dtype, chip, width=width)


def test_an_entry_counts_for_its_class_chip_and_dtype_only(table):
    tiles.write(table, [entry(2)])
    assert [choose(width) for width in (64, 65, 128, 129)] == [Tile(1), Tile(2), Tile(2), Tile(1)]
    assert choose(chip="v6e") == choose(dtype=jnp.bfloat16) == Tile(1)


def test_the_users_table_comes_before_the_packaged_one(table, monkeypatch):
    packaged = table.with_name("packaged.json")
    monkeypatch.setattr(tiles, "PACKAGED", packaged)
    tiles.write(packaged, [entry(2), entry(2, width=10)])
    tiles.write(table, [entry(1, width=1000), entry(3, width=10)])
    assert [choose(width) for width in (100, 10)] == [Tile(2), Tile(3)]


def test_a_tile_larger_than_the_array_is_cut_and_one_that_does_not_fit_is_passed_over(table, caplog):
    tiles.write(table, [entry(7, width=4), entry(9)])
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        assert choose(3) == Tile(3)
        assert not caplog.records
        assert choose(100) == choose(100) == Tile(1)
    (record,) = caplog.records
    assert "the tile {'rows': 9} of op on v5p is passed over: too large" in record.getMessage()


def test_a_tile_of_other_names_is_passed_over(table, caplog):
    tiles.write(table, [entry(1, tile={"columns": 3})])
    assert choose() == Tile(1)
    assert "passed over" in caplog.text


def test_candidates_are_the_rules_tile_and_its_neighbours():
    assert TILING.candidates(jnp.float32, "v5p", width=100) == [{"rows": 1}, {"rows": 2}]


def test_writing_keeps_other_entries_and_replaces_its_own(table):
    tiles.write(table, [entry(2), entry(3, chip="v6e")])
    tiles.write(table, [entry(4)])
    assert [each["tile"]["rows"] for each in json.loads(table.read_text())["entries"]] == [4, 3]
    assert choose() == Tile(4)


def test_a_named_table_must_be_there_and_be_one(table):
    with pytest.raises(ValueError, match="PALLAS_KERNELS_TILES names .*, which is not there"):
        choose()
    for text in ("{", "[]", '{"entries": [{"operation": "op"}]}', json.dumps({"entries": [entry(-1)]})):
        table.write_text(text)
        with pytest.raises(ValueError, match="is no table of tiles .* is expected"):
            choose()


def test_the_default_place_is_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(tiles.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.user_table() == tmp_path / "pallas_kernels" / "tiles.json"
    assert choose() == Tile(1)


def test_the_packaged_table_is_one():
    assert tiles._read(tiles.PACKAGED) == []  # no chip has been measured yet


ALL_SIZES = [
    *itertools.product((1, 100, 4096), (128, 200, 1024, 8192), (128, 136, 1024, 4096), ("bfloat16", "float32"))
]


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_the_rules_tile_and_some_of_its_neighbours_fit(backend):
    """So that a table may name them."""
    shape = cases.Shape(512, 2, 4, 256, 512)
    for case in cases.kernel_cases(shape, jnp.bfloat16, Target(backend, chip="h100" if backend == "gpu" else "v5e")):
        if case.tiling is None:
            assert backend == "gpu"
            continue
        candidates = case.tiling.candidates(jnp.bfloat16, None, **case.sizes)
        assert len(candidates) > 1
        for candidate in candidates:
            tile = case.tiling.tile(**candidate)
            assert case.tiling.fitted(tile, itemsize=2, chip=None, **case.sizes) == tile


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p"])
def test_the_rules_have_a_tile_that_fits_for_every_shape(chip):
    """Of the fused kernels too, or none at all."""
    for rows, width, hidden, dtype in ALL_SIZES:
        if (chip, width, dtype) == ("v4", 8192, "float32"):
            continue  # the next test
        itemsize = jnp.dtype(dtype).itemsize
        calls = [
            (DISPATCH, dict(width=width)),
            (WEIGHT_GRADIENT, dict(rows_per_group=rows, contracted=width, out=hidden)),
            (HIDDEN_GRADIENT, dict(rows_per_group=rows, width=width, hidden=hidden)),
        ]
        calls += [(COMBINE, dict(experts_per_token=k, width=width)) for k in (1, 16)]
        calls += [(UP, dict(rows_per_group=rows, width=width, hidden=hidden, save_hidden=save)) for save in (0, 1)]
        for in_lanes in (0, 1):
            calls += [(PRODUCT, dict(rows_per_group=rows, contracted=hidden, out=width, in_lanes=in_lanes))]
        for tiling, sizes in calls:
            tile = tiling.rule(itemsize=itemsize, chip=chip, **sizes)
            if tile is None:
                assert tiling in (UP, HIDDEN_GRADIENT)
                assert hidden % 128 or 8192 in sizes.values() or (chip == "v4" and hidden == 4096)
            else:
                assert tiling.fitted(tile, itemsize=itemsize, chip=chip, **sizes) == tile


def test_rows_that_are_too_long_for_a_chip_say_what_would_work():
    message = "128 rows of 8192 numbers of 4 bytes are more than a core of v4 holds: .* 24 MiB of VMEM; at most 16 .*"
    with pytest.raises(tiles.Misfit, match=message + "Choose bfloat16, or backend='ragged_dot'"):
        DISPATCH.choose("float32", "v4", width=8192)
    with pytest.raises(tiles.Misfit, match="256 rows of 8192 numbers of 4 bytes are more than a core of v4 holds"):
        COMBINE.choose("float32", "v4", width=8192, experts_per_token=16)
    assert DISPATCH.choose("bfloat16", "v4", width=8192).rows == 128
    assert DISPATCH.choose("float32", "v5e", width=8192).rows == 128


def test_the_outputs_are_divided_among_the_cores_of_a_device():
    sizes = dict(rows_per_group=512, contracted=512, out=1024, in_lanes=0)
    assert PRODUCT.choose("bfloat16", "v5e", **sizes).out == 1024
    assert PRODUCT.choose("bfloat16", "v5p", **sizes).out == 512


def test_a_tile_beyond_the_memory_or_the_layout_is_a_misfit():
    sizes = dict(rows_per_group=512, contracted=4096, out=8192, in_lanes=1, itemsize=2, chip="v5p")
    for tile, message in (
        ((512, 4096, 8192), r"about \d+ MiB of VMEM; at most 64 are used"),
        ((512, 1024, 512), "out=512 is no multiple of 1024"),
        ((500, 1024, 1024), "rows=500 is no multiple of 16"),
    ):
        with pytest.raises(tiles.Misfit, match=message):
            PRODUCT.fitted(PRODUCT.tile(*tile), **sizes)
    assert mosaic.VMEM_LIMIT == 64 * 2**20
