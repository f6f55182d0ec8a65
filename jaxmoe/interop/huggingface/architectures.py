"""The architectures that can be exchanged: their names of tensors, and what is theirs alone in config.json.

E experts, K experts per token, F expert hidden width, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.config import ConfigError, ModelConfig, MoEConfig

Kinds = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """What a layer's MLP tensors are called, below `model.layers.L.`; `{expert}` is the expert's number.

    Attributes:
      router: (E, D).
      expert: folder of one expert's matrices in published checkpoints; `gate`, `up`, `down` are in it.
      fused_router: as `router`, in checkpoints whose experts are fused.
      fused_gate_up, fused_down: (E, 2F, D), gate before up, and (E, D, F): all experts of a layer in one tensor.
      shared: folder of the shared expert's matrices.
    """

    router: str = "mlp.gate.weight"
    expert: str = "mlp.experts.{expert}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_router: str = "mlp.gate.weight"
    fused_gate_up: str = "mlp.experts.gate_up_proj"
    fused_down: str = "mlp.experts.down_proj"
    shared: str = "mlp.shared_experts"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model class of transformers.

    Attributes:
      model_type: in config.json.
      class_name: in its `architectures`.
      names: of the MLP tensors; all others are the same everywhere.
      norm_eps: what a config.json without rms_norm_eps means.
      own_head_dim: config.json may say head_dim; else it is width / H.
      settings: ModelConfig's own fields from config.json.
      keys: of config.json from a ModelConfig, but for those that all have.
      lacks: why a ModelConfig cannot be written as this architecture; None if it can.
    """

    model_type: str
    class_name: str
    names: TensorNames
    norm_eps: float
    own_head_dim: bool
    settings: Callable[[Settings], dict[str, Any]]
    keys: Callable[[ModelConfig], dict[str, Any]]
    lacks: Callable[[ModelConfig], str | None]


class Settings:
    """A config.json, asked key by key; mistakes name the key.

    Args:
      values: of config.json.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of the keys that is there and not null."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        """The same.

        Raises:
          ConfigError: there is none.
        """
        value = self.get(*names)
        if value is None:
            raise ConfigError(f"config.json has no {' or '.join(names)}.")
        return value

    def refuse_unless(self, name: str, *accepted: Any, why: str = "it is not implemented") -> None:
        """Raises ConfigError if a key has another value than null and those accepted."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            listed = ", ".join(map(repr, accepted)) or "nothing"
            raise ConfigError(f"config.json: {name}={value!r}; {listed} is accepted ({why}).")


# --------------------------------------------------------------------------- one architecture after the other


def _routed(settings: Settings, expert_hidden: int, renormalize: bool, **others: Any) -> MoEConfig:
    """The routed MLP: softmax over all experts, then top K; dividing by their sum is a softmax over the K kept."""
    return MoEConfig(
        num_experts=settings.need("num_local_experts", "num_experts", "n_routed_experts"),
        experts_per_token=settings.need("num_experts_per_tok"),
        expert_hidden=expert_hidden,
        score_order="topk_then_softmax" if renormalize else "softmax_then_topk",
        renormalize=renormalize,
        load_balance_coefficient=settings.get("router_aux_loss_coef", "aux_loss_alpha", default=0.0),
        load_balance_definition="switch_times_k",
        auxiliary_reduction="mean",
        router_z_coefficient=settings.get("router_z_loss_coef", default=0.0),
        **others,
    )


def _kinds(settings: Settings, is_routed: Callable[[int], bool]) -> dict[str, int]:
    """first_dense_layers and moe_every that give the layers of config.json."""
    layers = settings.need("num_hidden_layers")
    wanted = tuple("moe" if is_routed(layer) else "dense" for layer in range(layers))
    first = next((layer for layer, kind in enumerate(wanted) if kind == "moe"), layers)
    for every in range(1, layers + 1):
        for dense in range(max(0, first - every + 1), first + 1):
            if wanted == _layer_kinds(layers, dense, every):
                return {"first_dense_layers": dense, "moe_every": every}
    raise ConfigError(
        f"config.json: its routed layers are {[layer for layer, kind in enumerate(wanted) if kind == 'moe']} of "
        f"{layers}; some dense layers, then every n-th routed, is what can be read."
    )


def _layer_kinds(layers: int, first_dense: int, every: int) -> Kinds:
    positions = (layer - first_dense + 1 for layer in range(layers))
    return tuple("moe" if position > 0 and position % every == 0 else "dense" for position in positions)


def _dense_width(settings: Settings, kinds: Mapping[str, int]) -> int | None:
    """intermediate_size, where a layer is dense."""
    layers = settings.need("num_hidden_layers")
    has_dense = "dense" in _layer_kinds(layers, kinds["first_dense_layers"], kinds["moe_every"])
    return settings.need("intermediate_size") if has_dense else None


def _llama(settings: Settings) -> dict[str, Any]:
    settings.refuse_unless("mlp_bias", False)
    return {"dense_hidden": settings.need("intermediate_size")}


def _mixtral(settings: Settings) -> dict[str, Any]:
    return {"moe": _routed(settings, settings.need("intermediate_size"), renormalize=True)}


def _olmoe(settings: Settings) -> dict[str, Any]:
    settings.refuse_unless("clip_qkv")
    normalize = settings.get("norm_topk_prob", default=False)
    return {"moe": _routed(settings, settings.need("intermediate_size"), normalize), "qk_norm": "projection"}


def _qwen3_moe(settings: Settings) -> dict[str, Any]:
    every, dense = settings.get("decoder_sparse_step", default=1), settings.get("mlp_only_layers", default=[])
    kinds = _kinds(settings, lambda layer: layer not in dense and (layer + 1) % every == 0)
    normalize = settings.get("norm_topk_prob", default=False)
    moe = _routed(settings, settings.need("moe_intermediate_size"), normalize)
    return {"moe": moe, "qk_norm": "head", "dense_hidden": _dense_width(settings, kinds), **kinds}


def _deepseek(settings: Settings) -> dict[str, Any]:
    settings.refuse_unless("scoring_func", "softmax")
    settings.refuse_unless("topk_method", "greedy")
    settings.refuse_unless("n_group", 1)
    settings.refuse_unless("mlp_bias", False)
    for latent in ("kv_lora_rank", "q_lora_rank"):
        settings.refuse_unless(latent, why="multi-head latent attention is not implemented")
    first, every = settings.get("first_k_dense_replace", default=0), settings.get("moe_layer_freq", default=1)
    kinds = _kinds(settings, lambda layer: layer >= first and layer % every == 0)
    hidden = settings.need("moe_intermediate_size")
    scaling = float(settings.get("routed_scaling_factor", default=1.0))
    # As in DeepSeek's code: a single expert is not normalized, and what is normalized is not scaled.
    normalize = settings.get("norm_topk_prob", default=False) and settings.need("num_experts_per_tok") > 1
    if normalize and scaling != 1.0:
        raise ConfigError(
            f"config.json: routed_scaling_factor={scaling} with norm_topk_prob=true, which readers of this "
            "architecture take differently; one of them has to go."
        )
    moe = _routed(
        settings,
        hidden,
        normalize,
        routed_scaling=scaling,
        shared_expert_hidden=settings.get("n_shared_experts", default=0) * hidden,
    )
    return {"moe": moe, "dense_hidden": _dense_width(settings, kinds), **kinds}


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": config.moe.experts_per_token,
        "router_aux_loss_coef": config.moe.load_balance_coefficient,
    }


def _llama_keys(config: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": config.dense_hidden_size, "attention_bias": False, "mlp_bias": False}


def _mixtral_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.moe.expert_hidden,
        "num_local_experts": config.moe.num_experts,
        "sliding_window": None,
        **_expert_keys(config),
    }


def _olmoe_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.moe.expert_hidden,
        "num_experts": config.moe.num_experts,
        "norm_topk_prob": _normalizes(config),
        "clip_qkv": None,
        "attention_bias": False,
        **_expert_keys(config),
    }


def _qwen3_moe_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.dense_hidden_size,
        "moe_intermediate_size": config.moe.expert_hidden,
        # transformers 5 calls it num_local_experts and reads both; 4 reads num_experts.
        "num_experts": config.moe.num_experts,
        "num_local_experts": config.moe.num_experts,
        "norm_topk_prob": _normalizes(config),
        # One step and a list of exceptions can say any layers.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(config.layer_kinds) if kind == "dense"],
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        **_expert_keys(config),
    }


def _deepseek_keys(config: ModelConfig) -> dict[str, Any]:
    kinds = config.layer_kinds
    routed = [layer for layer, kind in enumerate(kinds) if kind == "moe"]
    return {
        "intermediate_size": config.dense_hidden_size,
        "moe_intermediate_size": config.moe.expert_hidden,
        "n_routed_experts": config.moe.num_experts,
        "n_shared_experts": config.moe.shared_expert_hidden // config.moe.expert_hidden or None,
        "num_experts_per_tok": config.moe.experts_per_token,
        "norm_topk_prob": _normalizes(config),
        "routed_scaling_factor": config.moe.routed_scaling,
        "scoring_func": "softmax",
        "aux_loss_alpha": config.moe.load_balance_coefficient,
        "first_k_dense_replace": routed[0],
        "moe_layer_freq": config.moe_every,
        "attention_bias": False,
        # transformers has no class for this model_type; the published code does it.
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK_CODE}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekForCausalLM",
        },
    }


_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base"


def _normalizes(config: ModelConfig) -> bool:
    """Whether the K kept probabilities are divided by their sum."""
    return config.moe.score_order == "topk_then_softmax" or config.moe.renormalize


def _first(*reasons: tuple[bool, str]) -> str | None:
    return next((reason for lacking, reason in reasons if lacking), None)


def _all_layers_alike(config: ModelConfig, kind: str) -> tuple[bool, str]:
    return set(config.layer_kinds) != {kind}, f"all its layers are {kind}"


def _no_shared(config: ModelConfig) -> tuple[bool, str]:
    moe = config.moe
    extended = moe is not None and (moe.shared_expert_hidden > 0 or moe.routed_scaling != 1.0)
    return extended, "it has no shared expert and no routed_scaling"


def _qk_norm(config: ModelConfig, kind: str) -> tuple[bool, str]:
    return config.qk_norm != kind, f"its qk_norm is {kind!r}"


def _head_dim(config: ModelConfig) -> tuple[bool, str]:
    return config.head_size * config.num_heads != config.width, "its head_dim is width / num_heads"


def _llama_lacks(config: ModelConfig) -> str | None:
    return _first(_all_layers_alike(config, "dense"), _qk_norm(config, "none"))


def _mixtral_lacks(config: ModelConfig) -> str | None:
    return _first(
        _all_layers_alike(config, "moe"), _qk_norm(config, "none"), _no_shared(config)
    ) or _first((not _normalizes(config), "its gates sum to one"))


def _olmoe_lacks(config: ModelConfig) -> str | None:
    return _first(
        _all_layers_alike(config, "moe"), _qk_norm(config, "projection"), _no_shared(config), _head_dim(config)
    )


def _qwen3_moe_lacks(config: ModelConfig) -> str | None:
    return _first(
        (config.num_moe_layers == 0, "it has routed layers"), _qk_norm(config, "head"), _no_shared(config)
    )


def _deepseek_lacks(config: ModelConfig) -> str | None:
    if config.num_moe_layers == 0:
        return "it has routed layers"
    moe, kinds = config.moe, config.layer_kinds
    normalizes = _normalizes(config)
    read_back = tuple(
        "moe" if layer >= kinds.index("moe") and layer % config.moe_every == 0 else "dense"
        for layer in range(config.num_layers)
    )
    return _first(
        _qk_norm(config, "none"),
        _head_dim(config),
        (read_back != kinds, "its routed layers are multiples of moe_every"),
        (moe.shared_expert_hidden % moe.expert_hidden > 0, "its shared_expert_hidden is a multiple of expert_hidden"),
        (normalizes and moe.routed_scaling != 1.0, "gates that sum to one are not scaled"),
        (normalizes and moe.experts_per_token == 1, "the gate of a single expert is its probability"),
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        Architecture(
            "llama", "LlamaForCausalLM", TensorNames(), 1e-6, True, _llama, _llama_keys, _llama_lacks
        ),
        Architecture(
            "mixtral", "MixtralForCausalLM",
            TensorNames(
                router="block_sparse_moe.gate.weight", expert="block_sparse_moe.experts.{expert}",
                gate="w1", up="w3", down="w2",
            ),
            1e-5, True, _mixtral, _mixtral_keys, _mixtral_lacks,
        ),
        Architecture(
            "olmoe", "OlmoeForCausalLM", TensorNames(), 1e-5, False, _olmoe, _olmoe_keys, _olmoe_lacks
        ),
        Architecture(
            "qwen3_moe", "Qwen3MoeForCausalLM", TensorNames(), 1e-6, True, _qwen3_moe, _qwen3_moe_keys,
            _qwen3_moe_lacks,
        ),
        Architecture(
            "deepseek", "DeepseekForCausalLM", TensorNames(), 1e-6, False, _deepseek, _deepseek_keys, _deepseek_lacks
        ),
    )
}  # fmt: skip
"""By the model_type of their config.json."""
