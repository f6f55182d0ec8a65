"""A config.json of transformers as a `ModelConfig`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import ConfigError, ModelConfig, nearest
from jaxmoe.interop.huggingface.architectures import ARCHITECTURES, Architecture, Settings

_UNROTATED = "only plain rotary embedding (rope_type 'default', over the whole head) is implemented"


def architecture_named(model_type: str) -> Architecture:
    """The architecture of a model_type.

    Raises:
      ConfigError: there is none; the message has the nearest, or all.
    """
    if model_type not in ARCHITECTURES:
        advice = nearest(str(model_type), ARCHITECTURES)
        raise ConfigError(f"model_type={model_type!r} is not an architecture that can be exchanged.{advice}")
    return ARCHITECTURES[model_type]


def model_config_from(values: Mapping[str, Any], *, compute_dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of a config.json, written by transformers 4 or 5.

    The auxiliary losses get the coefficients of config.json, per layer and averaged, where transformers pools the
    layers first; training them differs by that.

    Args:
      values: of config.json.
      compute_dtype: of the model.

    Raises:
      ConfigError: another architecture, a key that is missing, or a value that is not implemented.
    """
    settings = Settings(values)
    architecture = architecture_named(settings.need("model_type"))
    settings.refuse_unless("hidden_act", "silu")
    settings.refuse_unless("attention_bias", False, why="attention has no bias here")
    settings.refuse_unless("quantization_config", why="dequantize the checkpoint first")
    longest = settings.need("max_position_embeddings")
    window = settings.get("sliding_window")
    if window is not None and window < longest and settings.get("use_sliding_window", default=True):
        raise ConfigError(f"config.json: sliding_window={window}, shorter than {longest}; it is not implemented.")
    settings.refuse_unless("layer_types", ["full_attention"] * settings.need("num_hidden_layers"))
    heads, width = settings.need("num_attention_heads"), settings.need("hidden_size")
    head_dim = settings.get("head_dim") if architecture.own_head_dim else None
    return ModelConfig(
        vocab_size=settings.need("vocab_size"),
        width=width,
        num_layers=settings.need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=None if settings.get("num_key_value_heads") == heads else settings.get("num_key_value_heads"),
        head_dim=None if head_dim is not None and head_dim * heads == width else head_dim,
        tie_embeddings=settings.get("tie_word_embeddings", default=False),
        rope_theta=_rope_theta(settings),
        norm_eps=settings.get("rms_norm_eps", default=architecture.norm_eps),
        init_std=settings.get("initializer_range", default=0.02),
        max_sequence_length=longest,
        compute_dtype=compute_dtype,
        **architecture.settings(settings),
    )


def _rope_theta(settings: Settings) -> float:
    """The base, from rope_parameters (transformers 5) or rope_theta (4); rescaled frequencies are refused."""
    parameters = settings.get("rope_parameters", default={})
    scaling = settings.get("rope_scaling", default={})
    for rope in (parameters, scaling):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"config.json: rotary embedding {dict(rope)!r}; {_UNROTATED}.")
    settings.refuse_unless("partial_rotary_factor", 1.0, why=_UNROTATED)
    theta = parameters.get("rope_theta", settings.get("rope_theta"))
    return float(10_000.0 if theta is None else theta)


def fitting_architecture(config: ModelConfig, wanted: str | None = None) -> Architecture:
    """The architecture that a model can be written as.

    Args:
      config: of the model.
      wanted: its model_type; None takes the first that fits.

    Raises:
      ConfigError: none fits, or not the one wanted; the message says what differs.
    """
    names = list(ARCHITECTURES) if wanted is None else [architecture_named(wanted).model_type]
    reasons = {}
    for name in names:
        reason = ARCHITECTURES[name].lacks(config)
        if reason is None:
            return ARCHITECTURES[name]
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(f"the model cannot be written for transformers: {listed}.")


def config_values(
    config: ModelConfig, architecture: Architecture, dtype: str, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read.

    Args:
      config: of the model.
      architecture: that fits it.
      dtype: of the tensors.
      original: config.json that the model was read from: keys that say nothing of the numbers (token ids and the
        like) stay as they were there.
    """
    kept = {} if original is None or original.get("model_type") != architecture.model_type else dict(original)
    keys = architecture.keys(config)
    if "auto_map" in kept:
        keys.pop("auto_map", None)
    return kept | {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        **({"head_dim": config.head_size} if architecture.own_head_dim else {}),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        # Each of the two is what one generation of transformers reads, and the other ignores.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "dtype": dtype,
        "torch_dtype": dtype,
        **keys,
    }
