"""Reading onto a mesh of two processes: run by `test_huggingface_mesh.py` in two processes with 2 devices each."""

import os
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from jaxmoe.config import MeshConfig
from jaxmoe.interop.huggingface import load_pretrained
from jaxmoe.processes import connect

connect()
FOLDER = pathlib.Path(os.environ["JAXMOE_TEST_CHECKPOINT"])


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4), MeshConfig(fsdp=2, expert=2)], ids=["fsdp", "fsdp_expert"])
def test_each_process_reads_its_part(mesh):
    """Equal to what one process reads onto a device of its own, and no device has more than its quarter."""
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    spread = dict(nnx.to_flat_state(nnx.state(load_pretrained(FOLDER, mesh=mesh).decoder)))
    alone = nnx.to_flat_state(nnx.state(load_pretrained(FOLDER).decoder))
    for path, leaf in alone:
        whole = multihost_utils.process_allgather(spread[path][...], tiled=True)
        np.testing.assert_array_equal(whole, leaf[...], err_msg=str(path))
    experts = next(leaf[...] for path, leaf in spread.items() if path[-2:] == ("mlp", "gate_up") and leaf.ndim == 4)
    assert {shard.data.size for shard in experts.addressable_shards} == {experts.size // 4}
    assert not experts.is_fully_addressable
