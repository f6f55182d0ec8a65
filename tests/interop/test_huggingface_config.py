"""config.json as a ModelConfig and back, and what is refused. Nothing is loaded."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import ConfigError, ModelConfig, MoEConfig
from jaxmoe.interop.huggingface import ARCHITECTURES, model_config_from
from jaxmoe.interop.huggingface.config_json import config_values, fitting_architecture
from jaxmoe.interop.huggingface.layout import parts_of
from jaxmoe.models import Decoder, preset

# As the published checkpoints have them, without what concerns neither shapes nor numbers.
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 102400,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.02, "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
}  # fmt: skip
PUBLISHED = {
    "mixtral-8x7b": MIXTRAL, "olmoe-1b-7b": OLMOE, "qwen3-30b-a3b": QWEN3, "deepseek-moe-16b": DEEPSEEK,
    "smollm2-135m": LLAMA,
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_checkpoints_are_the_presets_of_their_names(name):
    assert model_config_from(PUBLISHED[name]) == preset(name)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_what_is_written_is_read_back_with_the_rest_of_the_original(name):
    original, config = PUBLISHED[name], preset(name)
    written = config_values(config, fitting_architecture(config), "bfloat16", original)
    assert json.loads(json.dumps(written)) == written
    assert model_config_from(written) == config
    changed = {key for key in original if written[key] != original[key]}
    assert changed <= {"torch_dtype"} | ({"norm_topk_prob"} if name == "deepseek-moe-16b" else set())


def test_both_generations_of_keys_say_the_same():
    """transformers 4 has rope_theta, torch_dtype, num_experts; 5 writes rope_parameters, dtype, num_local_experts."""
    new = dict(QWEN3, rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, dtype="bfloat16")
    new["num_local_experts"] = new.pop("num_experts")
    del new["rope_theta"], new["rope_scaling"]
    assert model_config_from(new) == model_config_from(QWEN3)
    written = config_values(preset("qwen3-30b-a3b"), ARCHITECTURES["qwen3_moe"], "bfloat16")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["num_experts"] == written["num_local_experts"] == 128
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("original", "changes", "message"),
    [
        (MIXTRAL, {"model_type": "gpt2"}, "model_type='gpt2' is not an architecture that can be exchanged"),
        (MIXTRAL, {"model_type": "mixtrel"}, "Did you mean 'mixtral'"),
        (MIXTRAL, {"model_type": None}, "config.json has no model_type"),
        (MIXTRAL, {"num_local_experts": None}, "no num_local_experts or num_experts"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window=4096, shorter than 32768"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'; 'silu' is accepted"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*only plain rotary"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn.*only plain rotary"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config.*dequantize"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (QWEN3, {"mlp_only_layers": [0, 7]}, "its routed layers are"),
        (DEEPSEEK, {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        (DEEPSEEK, {"kv_lora_rank": 512}, "multi-head latent attention"),
        (DEEPSEEK, {"norm_topk_prob": True, "routed_scaling_factor": 2.0}, "routed_scaling_factor=2.0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_key(original, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config_from(original | changes)


@pytest.mark.parametrize(
    ("settings", "dense", "every"),
    [
        ({"mlp_only_layers": [0, 1]}, 2, 1),
        ({"decoder_sparse_step": 2}, 0, 2),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, 3, 3),
        ({"mlp_only_layers": list(range(9))}, 9, 1),
    ],
)
def test_which_layers_are_routed(settings, dense, every):
    config = model_config_from(QWEN3 | {"num_hidden_layers": 9} | settings)
    step, exceptions = settings.get("decoder_sparse_step", 1), settings.get("mlp_only_layers", [])
    expected = tuple("moe" if (i + 1) % step == 0 and i not in exceptions else "dense" for i in range(9))
    assert config.layer_kinds == expected
    if "moe" in expected:
        assert dataclasses.replace(config, first_dense_layers=dense, moe_every=every).layer_kinds == expected


SMALL = {"vocab_size": 20, "width": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "dense_hidden": 12}


@st.composite
def configs(draw) -> ModelConfig:
    """Models of any of the architectures."""
    kind = draw(st.sampled_from(list(ARCHITECTURES)))
    normalize = draw(st.booleans())
    qk_norm = {"olmoe": "projection", "qwen3_moe": "head"}.get(kind, "none")
    tied, layers = draw(st.booleans()), draw(st.integers(1, 6))
    settings = SMALL | {"num_layers": layers, "qk_norm": qk_norm, "tie_embeddings": tied}
    if kind == "llama":
        return ModelConfig(**settings)
    shared = 16 if kind == "deepseek" and draw(st.booleans()) else 0
    normalize = normalize or kind == "mixtral"
    moe = MoEConfig(
        num_experts=3, experts_per_token=2, expert_hidden=8, shared_expert_hidden=shared,
        score_order="topk_then_softmax" if normalize else "softmax_then_topk", renormalize=normalize,
    )  # fmt: skip
    dense = draw(st.integers(0, settings["num_layers"] - 1)) if kind in ("qwen3_moe", "deepseek") else 0
    return ModelConfig(**settings, moe=moe, first_dense_layers=dense)


def shapes(config: ModelConfig):
    """Of the decoder's parameters."""
    return jax.tree.map(lambda leaf: leaf.shape, nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))))


@given(config=configs(), fused=st.booleans())
def test_parts_hold_every_number_of_every_parameter_once(config, fused):
    """And the configuration comes back as the same function."""
    architecture = fitting_architecture(config)
    parts = parts_of(config, architecture, fused_experts=fused)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    filled = {path: np.zeros(leaf.shape, np.int32) for path, leaf in nnx.to_flat_state(state)}
    for part in parts:
        box = tuple(slice(first, first + size) for first, size in part.box)
        filled[part.parameter][box] += 1
        assert int(np.prod(part.shape)) == int(np.prod(part.view)) == filled[part.parameter][box].size
        halves = [part.block(0, 1), part.block(1, part.view[0])]
        assert sum(int(np.prod([size for _, size in half])) for half in halves) == filled[part.parameter][box].size
    assert all((count == 1).all() for count in filled.values())
    assert len({part.tensor for part in parts}) == len(parts)
    again = model_config_from(config_values(config, architecture, "float32"))
    assert shapes(again) == shapes(config)
    assert again.layer_kinds == config.layer_kinds
    if config.num_moe_layers:
        assert again.moe.renormalize == config.moe.renormalize


def test_a_model_that_transformers_has_no_class_for_is_refused_with_the_reasons():
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8, shared_expert_hidden=8)
    config = ModelConfig(**SMALL, moe=moe, qk_norm="head")
    with pytest.raises(ConfigError, match="qwen3_moe: it has no shared expert.*deepseek: its qk_norm is 'none'"):
        fitting_architecture(config)
