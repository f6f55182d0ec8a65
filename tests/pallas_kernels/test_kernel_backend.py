"""The backend is chosen once per platform, says so, and can be asked for."""

import contextvars
import logging
import types

import jax.numpy as jnp
import pytest

from pallas_kernels import backend as backend_module
from pallas_kernels import compiler_options, compiling_for, execution, grouped_matmul, resolved_backend


@pytest.fixture(autouse=True)
def forget_choices():
    backend_module._backend_of_platform.cache_clear()
    yield
    backend_module._backend_of_platform.cache_clear()


@pytest.mark.parametrize("backend", backend_module.BACKENDS)
def test_a_named_backend_is_itself(backend):
    assert resolved_backend(backend) == backend


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_auto_is_the_platforms_own_and_logged_once(platform, monkeypatch, caplog):
    monkeypatch.setattr(execution.jax, "default_backend", lambda: platform)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [resolved_backend(), resolved_backend("auto")] == [platform, platform]
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("platform", ["rocm", "gpu of compute capability 7.0"])
def test_auto_elsewhere_warns_once_of_the_dense_weight_gradient(platform, monkeypatch, caplog):
    monkeypatch.setattr(execution.jax, "default_backend", lambda: platform)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [resolved_backend(), resolved_backend()] == ["ragged_dot", "ragged_dot"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "weight gradient is a dense expansion" in record.getMessage()


@pytest.mark.parametrize(
    ("version", "capability", "platform"),
    [
        ("cuda 12090", "9.0", "gpu"),
        ("cuda 12090", "8.0", "gpu"),
        ("cuda 12090", "7.5", "gpu of compute capability 7.5"),
        ("rocm 60300", "gfx942", "rocm"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_another_platform(version, capability, platform, monkeypatch):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(execution.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(execution.jax, "devices", lambda: [device])
    assert execution.platform() == platform


@pytest.mark.parametrize(
    ("kind", "platform"),
    [("TPU v5p", "tpu"), ("TPU v4", "tpu"), ("TPU v4 lite", "TPU v4 lite"), ("TPU v3", "TPU v3")],
)
def test_a_tpu_without_kernels_is_another_platform(kind, platform, monkeypatch):
    monkeypatch.setattr(execution.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(execution.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert execution.platform() == platform
    if platform != "tpu":
        assert resolved_backend() == "ragged_dot"
        with pytest.raises(ValueError, match=f"backend='tpu' runs on TPU v4, .* but the platform is '{kind}'"):
            contextvars.Context().run(execution.target_of, "tpu")


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="choose 'auto' or one of 'reference', 'cpu', 'cpu_native', 'tpu', 'gpu', 'ragged_dot'"
    ):
        resolved_backend("fast")


def test_a_backend_on_another_platform_is_refused_with_what_would_work():
    rows, weights, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4])

    def outside_the_interpreter():
        with pytest.raises(ValueError, match="runs on TPU v4, .* but the platform is 'cpu'; choose backend='auto'"):
            grouped_matmul(rows, weights, sizes, backend="tpu")

    contextvars.Context().run(outside_the_interpreter)


def test_auto_is_resolved_for_the_chip_that_is_compiled_for():
    with compiling_for("v5p"):
        assert resolved_backend() == "tpu"
    with compiling_for("h100"):
        assert resolved_backend() == "gpu"


def test_a_program_needs_options_on_tpu_alone():
    assert compiler_options() == {}
    with compiling_for("v4"):
        assert compiler_options() == {"xla_tpu_scoped_vmem_limit_kib": "16384"}
    with compiling_for("b200"):
        assert compiler_options() == {}


def test_an_unknown_chip_is_refused_with_the_known_ones():
    known = "v4, v5e, v5p, v6e, tpu7x, h100, b200"
    with pytest.raises(ValueError, match=f"chip='v9'; choose one of {known}"), compiling_for("v9"):
        pass
