"""Reading onto a mesh and writing from one: run by `test_huggingface_mesh.py` in a process with 8 devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ReasoningSource,
    RunConfig,
    TrainConfig,
)
from jaxmoe.interop.huggingface import import_run, load_pretrained, save_pretrained
from jaxmoe.models import Decoder
from jaxmoe.sharding import make_partitioning
from jaxmoe.training import Checkpoints, init_state
from jaxmoe.training.state import model_graph

TOKENS = np.random.default_rng(0).integers(0, 288, (8, 16)).astype(np.int32)
MODELS = {
    "mixtral": ModelConfig(
        vocab_size=288, width=32, num_layers=5, num_heads=4, num_kv_heads=2, init_std=0.2,
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_hidden=24),
    ),
    "deepseek": ModelConfig(
        vocab_size=288, width=32, num_layers=2, num_heads=4, init_std=0.2, first_dense_layers=1, dense_hidden=40,
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_hidden=24, shared_expert_hidden=48,
            score_order="softmax_then_topk", renormalize=False,
        ),
    ),
}  # fmt: skip
MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("expert", "fsdp"))
"""Its axes are in another order than ours."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each model, and the folder that it was written to."""
    made = {}
    for name, config in MODELS.items():
        model = nnx.jit(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))()
        folder = tmp_path_factory.mktemp(name)
        save_pretrained(model, folder, shard_bytes=100_000)
        made[name] = model, folder
    return made


def assert_spread(model: Decoder, spread: Decoder, parts: int):
    """Equal parameters, and no device has more than its part of the experts'."""
    found = dict(nnx.to_flat_state(nnx.state(spread)))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))
    experts = next(leaf[...] for path, leaf in found.items() if path[-2:] == ("mlp", "gate_up") and leaf.ndim == 4)
    assert {shard.data.size for shard in experts.addressable_shards} == {experts.size // parts}


def test_scanned_layers_are_spread(saved):
    model, folder = saved["mixtral"]
    assert_spread(model, load_pretrained(folder, mesh=MeshConfig(fsdp=8)).decoder, 8)


def test_a_mesh_gives_the_same_logits_and_the_same_files(saved, tmp_path):
    model, folder = saved["deepseek"]
    spread = load_pretrained(folder, mesh=MESH)
    assert_spread(model, spread.decoder, 8)
    logits = load_pretrained(folder)(TOKENS)
    np.testing.assert_allclose(spread(TOKENS), logits, atol=2e-5 * np.abs(logits).max())
    save_pretrained(spread, tmp_path, shard_bytes=100_000)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir())
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_run_on_a_mesh_starts_from_a_checkpoint(saved, tmp_path):
    """Parameters and the optimizer's moments are spread as training spreads them, and are there after the restart."""
    model, folder = saved["deepseek"]
    config = dataclasses.replace(MODELS["deepseek"], max_sequence_length=16)
    run = RunConfig(
        name="continued", model=config, mesh=MeshConfig(fsdp=2, expert=4),
        data=DataConfig(
            tokenizer="symbols",
            sources={"chains": ReasoningSource(problems=8, test_problems=8, operations=1)},
        ),
        train=TrainConfig(steps=1, batch_size=8, sequence_length=16),
    )  # fmt: skip
    import_run(folder, run, tmp_path, cache_dir=tmp_path / "cache")
    partitioning = make_partitioning(run.mesh)
    _, like = init_state(run, partitioning)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(like).state
    assert_spread(model, nnx.merge(model_graph(config), restored.params, restored.others), 8)
    for found, drawn in zip(jax.tree.leaves(restored.opt_state), jax.tree.leaves(like.opt_state), strict=True):
        assert found.sharding == drawn.sharding
        np.testing.assert_array_equal(found, drawn)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(like.key))


def test_a_mesh_with_other_axes_is_refused(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    with pytest.raises(ConfigError, match="mesh has the axes model; choose of data, fsdp"):
        load_pretrained(saved["mixtral"][1], mesh=mesh)
