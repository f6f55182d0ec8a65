"""The Slurm of these tests."""

import importlib.util
import pathlib

import pytest

_SPEC = importlib.util.spec_from_file_location("slurm_cluster", pathlib.Path(__file__).with_name("cluster.py"))
cluster = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cluster)


@pytest.fixture(scope="session")
def slurm():
    """Path of the slurm.conf of a cluster of two nodes on this machine."""
    reason = cluster.missing()
    if reason:
        pytest.skip(reason)
    with cluster.slurm() as configuration:
        yield configuration
