"""Checkpoints and meshes of 8 devices in a process of its own, and of two processes with 2 devices each."""

import pathlib

from flax import nnx

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.interop.huggingface import save_pretrained
from jaxmoe.models import Decoder


def test_checkpoints_on_eight_devices(run_on_devices):
    """Everything in `huggingface_on_eight_devices.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("huggingface_on_eight_devices.py"))


def test_two_processes_read_a_checkpoint_of_several_files(run_on_devices, tmp_path, monkeypatch):
    """Everything in `huggingface_in_two_processes.py`."""
    config = ModelConfig(
        vocab_size=288, width=32, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.2,
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_hidden=24),
    )  # fmt: skip
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    save_pretrained(model, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setenv("JAXMOE_TEST_CHECKPOINT", str(tmp_path))
    file = pathlib.Path(__file__).with_name("huggingface_in_two_processes.py")
    run_on_devices(file, devices=2, processes=2)
