"""`python -m experiments.benchmark collectives`, and the routed layer compiled for devices that are not here."""

import dataclasses
import functools
import re
import types

import pytest

from experiments.benchmarks import collectives
from experiments.benchmarks.collectives import Case, Collective
from jaxmoe.config import ConfigError, MeshConfig
from pallas_kernels import targets

pytestmark = pytest.mark.usefixtures("optimized")

TPU = Case("v5p", "v5p:2x2x1", MeshConfig(fsdp=2, expert=2), 4, 512, 128, 256, 8, 2)
GPU = Case("h100", "1x1x4", MeshConfig(fsdp=2, expert=2), 4, 512, 1024, 256, 8, 2)

PROGRAM = """
  %a = bf16[3072,2,512]{2,1,0:T(2,128)(2,1)} ragged-all-to-all(%x), replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/routed_mlp/send/ragged_all_to_all"}
  %b = f32[96,1,128]{2,1,0} ragged-all-to-all-start(%y), replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/routed_mlp/send/gates/r"}
  %c = s32[64]{0} all-reduce(%z), replica_groups=[2,4]<=[8], to_apply=%add
  %d = f32[256,64]{1,0} reduce-scatter(%w), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/whole"}
  %e = (f32[2]{0}, f32[2]{0}) all-to-all(%u, %v), replica_groups={{0,1}}, metadata={op_name="jit(f)/send/gates/all_to_all"}
  %f = bf16[8,16]{1,0} all-gather-done(%g)
  %h = f32[12]{0} all-gather(%i), replica_groups=mesh['axis_0'=32,'axis_1'=1,'axis_2'=2] {'axis_1','axis_2'}, dimensions={0}
"""  # noqa: E501


def test_collectives_are_read_from_a_program():
    found = collectives.collectives(PROGRAM, row=2048)
    assert found == [
        Collective("ragged-all-to-all", "rows", 3072 * 2048, 2048, 4),
        Collective("ragged-all-to-all", "gates", 96 * 512, 512, 4, together=32),
        Collective("all-reduce", "sizes", 256, 4, 4),
        Collective("reduce-scatter", "other", 256 * 64 * 4, 256, 2),
        Collective("all-to-all", "gates", 16, 4, 2),
        Collective("all-gather", "other", 48, 4, 2),
    ]
    assert [collective.sent(rows=100) for collective in found] == [
        100 * 2048 * 0.75,
        3 * (25 + 31) / 32 * 512,
        2 * 256 * 0.75,
        256 * 64 * 4,
        16 * 0.5,
        48 * 0.5,
    ]


def test_a_kernel_within_an_exchange_is_beside_it():
    program = """
      %s.1 = (bf16[8]{0}) ragged-all-to-all-start(%x)
      %k = bf16[8]{0} custom-call(%y), custom_call_target="tpu_custom_call"
      %d.1 = bf16[8]{0} ragged-all-to-all-done(%s.1)
      %s.2 = (bf16[8]{0}) ragged-all-to-all-start(%x)
      %d.2 = bf16[8]{0} ragged-all-to-all-done(%s.2)
      %k.2 = bf16[8]{0} custom-call(%y), custom_call_target="tpu_custom_call"
      %r = bf16[8]{0} ragged-all-to-all(%x)
    """
    assert collectives.beside_kernels(program) == (3, 1)


@functools.cache
def compiled(case: Case):
    try:
        return collectives.compiled(case, gradient=True)
    except targets.CompilerMissing as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("case", [TPU, GPU], ids=["v5p", "h100"])
def test_the_exchange_moves_what_it_must(case):
    """Four times the rows of other devices, their gates twice, and sizes; weights are gathered in bfloat16.

    Rows narrower than the 512 bytes of which XLA:TPU makes them multiples: two of them travel as one.
    """
    program = compiled(case).as_text()
    found = collectives.collectives(program, row=2 * case.width)
    parts = [collective.part for collective in found]
    assert parts.count("rows") == 4
    assert parts.count("gates") == 2
    sent = sum(collective.sent(case.rows) for collective in found if collective.part != "other")
    assert 1 <= sent / case.tokens / (2 * case.least) <= collectives.AIM
    gathered = [line for line in program.splitlines() if re.search(r"= .* all-gather(-start)?\(", line)]
    assert any("bf16" in line for line in gathered)
    for a, b in ((case.width, 2 * case.hidden), (case.hidden, case.width)):
        assert not any(f"f32[{case.experts // 2},{a},{b}]" in line for line in gathered)
    assert not re.search(r"= \S+ scatter\(", program)


@pytest.mark.slow
def test_products_of_a_device_are_those_of_its_rows():
    """A room of 1.5 times the mean, and tiles that are not full; not all experts' products of all rows."""
    executed = compiled(TPU).cost_analysis()["flops"]
    active = TPU.tokens * TPU.k * 3 * 3 * 2 * TPU.width * TPU.hidden
    tiles = TPU.experts // 2 * 256 * 3 * 3 * 2 * TPU.width * TPU.hidden
    assert active <= executed <= 1.15 * 1.5 * active + tiles


@pytest.mark.slow
def test_halves_travel_beside_products():
    exchanges, beside = collectives.beside_kernels(compiled(dataclasses.replace(TPU, overlap=True)).as_text())
    assert exchanges == 12
    assert beside >= 6


def test_the_result_is_described(monkeypatch):
    """Of a program with one exchange of rows and one of gates, among four devices: T·K = 1024 rows, T = 512."""
    program = types.SimpleNamespace(as_text=lambda: PROGRAM)
    monkeypatch.setattr(collectives, "compiled", lambda case, *, gradient: program)
    forward, both = collectives.rows_of(dataclasses.replace(TPU, width=1024))
    assert forward["sent_bytes_per_token"]["rows: ragged-all-to-all"] == 2 * 2048 * 0.75
    assert forward["exchanged_bytes_per_token"] == pytest.approx(
        2 * 2048 * 0.75 + 3 * (256 + 31) / 32 * 512 / 512 + (384 + 8) / 512, abs=0.1
    )
    assert forward["least_bytes_per_token"] == 2 * 2 * 2048 * 0.5
    assert both["ratio_to_least"] == pytest.approx(forward["ratio_to_least"] / 2, abs=1e-3)
    text = collectives.describe({"compiler": "XLA:TPU", "rows": [forward, both]})
    assert "v5p:2x2x1, 2 fsdp x 2 expert: T=512 D=1024 F=256 E=8 K=2 P=2 bfloat16, forward\n" in text
    assert "rows: ragged-all-to-all               3,072.0 sent     12,288.0 in buffers" in text
    assert "aim 1.25" in text


def test_without_a_compiler_or_devices_it_says_what_is_missing(monkeypatch):
    def missing(case, *, gradient):
        raise targets.CompilerMissing("the compiler for v5p is not at hand.")

    monkeypatch.setattr(collectives, "compiled", missing)
    monkeypatch.setattr(collectives.jax, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"v5p is not at hand\. Or set .*_device_count=8"):
        collectives.run()
