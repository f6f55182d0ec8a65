"""Folders that are not what they should be, and folders in an object store."""

import json

import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ConfigError, ModelConfig, MoEConfig
from jaxmoe.interop.huggingface import load_pretrained, read_model_config, save_pretrained
from jaxmoe.interop.safetensors_files import TensorFiles, TensorToWrite, write_tensors
from jaxmoe.models import Decoder

CONFIG = ModelConfig(
    vocab_size=20, width=8, num_layers=1, num_heads=2, init_std=0.5,
    moe=MoEConfig(num_experts=2, experts_per_token=2, expert_hidden=4),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path)
    return tmp_path


def rewritten(folder, change) -> None:
    """The folder's tensors after `change` of a dictionary of them."""
    with TensorFiles(folder) as files:
        tensors = {
            name: files.read(name, 1, 0, 1).reshape(tensor.shape) for name, tensor in files.tensors.items()
        }
    change(tensors)
    write_tensors(
        folder,
        [TensorToWrite(name, array.shape, lambda array=array: iter([array])) for name, array in tensors.items()],
        "F32",
    )


def test_a_missing_tensor_and_those_left_over_are_named(folder):
    def change(tensors):
        tensors["model.layers.0.mlp.gate_proj.weight"] = tensors.pop("model.layers.0.self_attn.k_proj.weight")

    rewritten(folder, change)
    with pytest.raises(ConfigError) as caught:
        load_pretrained(folder)
    assert str(caught.value) == (
        f"{folder} is not the model that its config.json says; 1 tensors are missing: "
        "model.layers.0.self_attn.k_proj.weight; 1 tensors belong to no parameter: model.layers.0.mlp.gate_proj.weight."
    )


def test_a_long_list_of_names_is_cut(folder):
    rewritten(folder, lambda tensors: tensors.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(25)}))
    with pytest.raises(ConfigError, match=r"25 tensors belong to no parameter: extra.0, .*extra.19 and 5 more\."):
        load_pretrained(folder)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder, model):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(folder, lambda tensors: tensors.update({name: np.zeros(2, np.float32)}))
    loaded = load_pretrained(folder).decoder
    np.testing.assert_array_equal(loaded.output[...], model.output[...])


def test_a_tensor_of_another_shape_is_named(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 21}))
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight is \[20, 8\]; config.json makes it \[21, 8\]"):
        load_pretrained(folder)


def test_a_checkpoint_of_another_architecture_is_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="3 tensors are missing: model.layers.0.mlp.gate_proj.weight"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="model_type='mamba' is not an architecture that can be exchanged"):
        load_pretrained(folder)


def test_a_folder_without_a_config_and_an_unknown_dtype_are_refused(folder):
    with pytest.raises(ConfigError, match="dtype='float16'; choose one of 'float32', 'bfloat16'"):
        load_pretrained(folder, dtype="float16")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="has no config.json; give the folder of a checkpoint of transformers"):
        read_model_config(folder)


def test_a_checkpoint_replaces_one_of_several_files(folder, model):
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model-of-mine.safetensors").write_bytes(b"")
    save_pretrained(model, folder, shard_bytes=1000)
    assert not (folder / "model.safetensors").exists()
    save_pretrained(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model-of-mine.safetensors", "model.safetensors"
    ]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == before


def test_checkpoints_in_an_object_store(model, bucket):
    save_pretrained(model, f"{bucket}/exported", shard_bytes=1000)
    loaded = load_pretrained(f"{bucket}/exported")
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(loaded.decoder)), strict=True
    ):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))
