"""Against transformers: logits, greedy generation, and what is read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ConfigError
from jaxmoe.interop.huggingface import load_pretrained, model_config_from, save_pretrained
from jaxmoe.models import generate

from .conftest import VARIANTS

TOKENS = np.random.default_rng(0).integers(0, 96, (3, 40)).astype(np.int32)
MASK = np.ones_like(TOKENS)
MASK[1, 25:] = 0
MASK[2, :12] = 0
ARCHITECTURES = ["mixtral", "olmoe", "qwen3_moe", "deepseek", "llama, tied"]


@pytest.fixture(scope="module")
def imported(reference):
    """The model of a variant in jaxmoe, read once."""
    read = {}

    def load(name: str):
        if name not in read:
            read[name] = load_pretrained(reference(name).folder)
        return read[name]

    return load


def assert_close(logits, expected, where=np.s_[:]):
    """Within 2e-5 of the largest logit, at the positions given."""
    assert logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits) - expected)[where].max()
    assert difference <= 2e-5 * np.abs(expected[where]).max(), difference


@pytest.mark.parametrize("name", list(VARIANTS))
def test_logits_with_padding_on_either_side(reference, imported, name):
    logits = imported(name)(TOKENS, MASK)
    assert_close(logits, reference(name).logits(TOKENS, MASK), MASK.astype(bool))


def test_logits_without_a_mask_are_those_with_a_full_one(reference, imported):
    model = imported("mixtral")
    logits = model(jnp.asarray(TOKENS))
    assert logits.shape == (3, 40, 96)
    assert_close(logits, reference("mixtral").logits(TOKENS))
    assert_close(logits[:1], np.asarray(model(TOKENS, MASK)[:1]))


def test_logits_of_a_sequence_past_2048(reference, imported):
    tokens = np.random.default_rng(1).integers(0, 96, (1, 2200)).astype(np.int32)
    assert_close(imported("qwen3_moe")(tokens), reference("qwen3_moe").logits(tokens))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_generation_agrees_over_64_tokens(reference, imported, name):
    prompt = TOKENS[:2, :9]
    tokens = jax.jit(generate, static_argnames="max_new_tokens")(
        imported(name).decoder, prompt, np.array([9, 9]), max_new_tokens=64
    )
    np.testing.assert_array_equal(tokens, reference(name).greedy(prompt, 64))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_round_trip_is_bit_exact(reference, imported, name, tmp_path):
    """Every tensor under its name, in its shape and dtype, and what config.json said."""
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = reference(name).folder
    save_pretrained(imported(name), tmp_path)
    before, after = (safetensors.load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert sorted(before) == sorted(after)
    for tensor, numbers in before.items():
        np.testing.assert_array_equal(numbers.view(np.int32), after[tensor].view(np.int32), err_msg=tensor)
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    free = ("decoder_sparse_step", "mlp_only_layers")  # two ways to say the same layers
    said = {key: value for key, value in old.items() if value is not None and key not in free}
    assert {key: new[key] for key in said} == said
    assert model_config_from(new) == model_config_from(old)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe, not normalized", "llama, tied"])
def test_transformers_loads_what_is_written(reference, imported, name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_pretrained(imported(name), tmp_path)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again, original = model.state_dict(), reference(name).model.state_dict()
    assert sorted(again) == sorted(original)
    assert all(torch.equal(again[key], original[key]) for key in original)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_array_equal(logits, reference(name).logits(TOKENS))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_and_several_files_read_the_same(reference, imported, name, tmp_path):
    """The layout that transformers 5 has in memory, and, of published checkpoints, files with an index."""
    model = reference(name).model
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    expected = nnx.to_flat_state(nnx.state(imported(name)))
    for folder in ("fused", "sharded"):
        found = nnx.to_flat_state(nnx.state(load_pretrained(tmp_path / folder)))
        for (path, one), (_, other) in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))
    save_pretrained(imported(name), tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    again = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert all((again[key] == tensor).all() for key, tensor in model.state_dict().items())


def test_bfloat16_is_kept_or_widened_without_loss(reference, imported, tmp_path):
    torch = pytest.importorskip("torch")
    model = type(reference("olmoe").model).from_pretrained(reference("olmoe").folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    wide, narrow = load_pretrained(tmp_path / "bfloat16"), load_pretrained(tmp_path / "bfloat16", dtype="bfloat16")
    for (_, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(wide)), nnx.to_flat_state(nnx.state(narrow)), strict=True
    ):
        assert (one[...].dtype, other[...].dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(one[...], other[...].astype(jnp.float32))
    assert narrow.config.compute_dtype == "bfloat16"
    logits = narrow(TOKENS)
    assert logits.dtype == jnp.float32
    assert np.corrcoef(np.ravel(logits), np.ravel(reference("olmoe").logits(TOKENS)))[0, 1] > 0.99
    save_pretrained(narrow, tmp_path / "again")
    save_pretrained(wide, tmp_path / "rounded", dtype="bfloat16")
    content = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert content == (tmp_path / "rounded" / "model.safetensors").read_bytes()
    again = type(model).from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_tokenizer_files_travel_along(reference, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in reference("mixtral, one expert").folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "notes.txt").write_text("mine")
    save_pretrained(load_pretrained(source), tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "copy" / "notes.txt").exists()


def test_a_model_of_our_own_is_written_and_read_by_transformers(tmp_path):
    """Without a folder that it came from: the first architecture that fits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxmoe.config import ModelConfig, MoEConfig
    from jaxmoe.models import Decoder

    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=24)
    config = ModelConfig(vocab_size=64, width=32, num_layers=1, num_heads=4, moe=moe, init_std=0.2)
    model = Decoder(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS % 64).long()).logits.numpy()
    assert_close(nnx.jit(lambda model, tokens: model(tokens).logits)(model, TOKENS % 64), expected)
    with pytest.raises(ConfigError, match="olmoe: its qk_norm is 'projection'"):
        save_pretrained(model, tmp_path, architecture="olmoe")
