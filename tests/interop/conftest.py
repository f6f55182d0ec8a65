"""Small random models of transformers, as folders and as torch modules."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

REASON = "needs torch and transformers (pip install jaxmoe[hf])"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, one expert": (
        "Mixtral", {"intermediate_size": 24, "num_local_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1},
    ),
    "mixtral, all experts": (
        "Mixtral", {"intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 3, "num_hidden_layers": 1},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "olmoe, normalized": (
        "Olmoe",
        {
            "intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
            "num_hidden_layers": 1,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
            "norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe, not normalized": (
        "Qwen3Moe",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
            "norm_topk_prob": False, "head_dim": 16, "decoder_sparse_step": 2, "num_hidden_layers": 6,
        },
    ),
    "deepseek": (
        "Deepseek",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 2,
            "num_experts_per_tok": 2, "routed_scaling_factor": 1.5,
        },
    ),
    "llama": ("Llama", {"intermediate_size": 48, "num_hidden_layers": 6}),
    "llama, tied": ("Llama", {"intermediate_size": 48, "tie_word_embeddings": True, "rope_theta": 1e5}),
}  # fmt: skip
"""By name: the class and its settings. Two layers are stacks of one, six are scanned."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of transformers.

    Attributes:
      folder: that it was saved to.
      model: in float32.
    """

    folder: pathlib.Path
    model: Any

    def logits(self, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """(B, S, V) float32."""
        import torch

        mask = None if attention_mask is None else torch.tensor(attention_mask)
        with torch.no_grad():
            return self.model(torch.tensor(tokens).long(), attention_mask=mask).logits.numpy()

    def greedy(self, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        """The likeliest continuation of each row."""
        import torch

        tokens = torch.tensor(prompt).long()
        if hasattr(self.model, "generate"):
            options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            return self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, prompt.shape[1] :]
        for _ in range(new_tokens):
            with torch.no_grad():
                tokens = torch.cat([tokens, self.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        return tokens[:, prompt.shape[1] :]


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Callable[[str], Reference]:
    """The model of a variant, made when it is first asked for."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            kind, settings = VARIANTS[name]
            settings = SIZES | settings
            torch.manual_seed(len(made))
            folder = tmp_path_factory.mktemp(re.sub("[^a-z0-9]+", "_", name))
            if kind == "Deepseek":
                model = deepseek(settings)
            else:
                config = getattr(transformers, f"{kind}Config")(**settings)
                model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # scales of norms, which start at one
                        parameter.uniform_(0.5, 1.5)
            save_deepseek(model, settings, folder) if kind == "Deepseek" else model.save_pretrained(folder)
            made[name] = Reference(folder, model)
        return made[name]

    return make


def deepseek(settings: dict[str, Any]):
    """DeepSeekMoE's architecture from transformers' own parts; it has no class of that name.

    DeepSeek-OCR 2's text model is it: multi-head attention, and DeepSeek-V2's routed layers with shared experts.
    """
    import torch
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as parts

    layers = settings["num_hidden_layers"]
    kinds = ["dense"] + ["sparse"] * (layers - 1)

    class Deepseek(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = parts.DeepseekOcr2TextConfig(**settings, mlp_layer_types=kinds)
            config._attn_implementation = "sdpa"
            self.model = parts.DeepseekOcr2TextModel(config)
            self.lm_head = torch.nn.Linear(settings["hidden_size"], settings["vocab_size"], bias=False)

        def forward(self, tokens, attention_mask=None):
            self.logits = self.lm_head(self.model(tokens, attention_mask=attention_mask).last_hidden_state)
            return self

    model = Deepseek().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, settings["initializer_range"])
    return model


def save_deepseek(model, settings: dict[str, Any], folder: pathlib.Path) -> None:
    """Names and config.json as deepseek-moe-16b-base has them."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                gate, up = both.chunk(2)
                tensors |= {prefix + "gate_proj.weight": gate.clone(), prefix + "up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **settings,
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
