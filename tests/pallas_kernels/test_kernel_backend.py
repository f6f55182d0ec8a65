"""The backend is chosen once per platform, says so, and can be asked for."""

import logging

import pytest

from pallas_kernels import backend as backend_module
from pallas_kernels import resolved_backend


@pytest.fixture(autouse=True)
def forget_choices():
    backend_module._backend_of_platform.cache_clear()
    yield
    backend_module._backend_of_platform.cache_clear()


@pytest.mark.parametrize("backend", backend_module.BACKENDS)
def test_a_named_backend_is_itself(backend):
    assert resolved_backend(backend) == backend


def test_auto_on_cpu_is_cpu_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backend_module.jax, "default_backend", lambda: "cpu")
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [resolved_backend(), resolved_backend("auto")] == ["cpu", "cpu"]
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_auto_on_accelerators_warns_once_of_the_dense_weight_gradient(platform, monkeypatch, caplog):
    monkeypatch.setattr(backend_module.jax, "default_backend", lambda: platform)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [resolved_backend(), resolved_backend()] == ["ragged_dot", "ragged_dot"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "weight gradient is a dense expansion" in record.getMessage()


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend='fast'; choose 'auto' or one of 'reference', 'cpu', 'ragged_dot'"):
        resolved_backend("fast")
