"""Parameters, FLOPs and bytes of a model, exact, from its configuration alone.

D width, L layers, H query heads, E experts, K experts per token, F hidden width, V
vocabulary, S sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxmoe.config import ModelConfig, TrainConfig

COMPONENTS = ("embedding", "head", "attention", "router", "experts", "dense_mlp", "norms")
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
      components: all of each component, by the names in `COMPONENTS`; a tied head has none of its own.
      active_components: those that one token uses: K of the E experts, the router whole, everything else.
    """

    components: Mapping[str, int]
    active_components: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.components.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(self.active_components.values())

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the head."""
        return self.total - self.components["embedding"] - self.components["head"]

    @property
    def non_embedding_active(self) -> int:
        """Those that one token uses, but the embedding and the head."""
        return self.active - self.components["embedding"] - self.components["head"]


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations for one token, a multiply-add counted as two.

    Attributes:
      approximate: of training, 6 · active parameters (Kaplan et al. 2020, embeddings included).
      components: of the forward pass' matrix products: `projections` (queries, keys, values, output), `attention`
        (scores and their sum over values, all S keys of a row, as it is computed without a kernel that skips
        the masked half; PaLM's convention), `router`, `experts`, `dense_mlp`, `head`.
    """

    approximate: int
    components: Mapping[str, int]

    @property
    def forward(self) -> int:
        """All matrix products of the forward pass."""
        return sum(self.components.values())

    @property
    def training(self) -> int:
        """Forward and backward: each product has two gradients of its own size. Recomputation is not counted."""
        return 3 * self.forward


@dataclasses.dataclass(frozen=True)
class MemoryBytes:
    """Bytes that training holds on one device.

    Attributes:
      weights, gradients: float32.
      optimizer: the two float32 moments of Adam.
      activations: an estimate of what the backward pass of one micro-batch keeps, see `memory_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of `config`, total and active, per component."""
    width, head = config.width, config.head_size
    query, key = config.num_heads * head, config.kv_heads * head
    qk_scales = {"none": 0, "head": 2 * head, "projection": query + key}[config.qk_norm]
    routed = config.num_moe_layers
    moe = config.moe if routed else None
    components = {
        "embedding": config.vocab_size * width,
        "head": 0 if config.tie_embeddings else config.vocab_size * width,
        "attention": config.num_layers * (width * (query + 2 * key) + query * width),
        "router": routed * width * moe.num_experts if moe else 0,
        "experts": routed * moe.num_experts * 3 * width * moe.expert_hidden if moe else 0,
        "dense_mlp": (config.num_layers - routed) * 3 * width * config.dense_hidden_size,
        "norms": config.num_layers * (2 * width + qk_scales) + width,
    }
    active = dict(components)
    if moe:
        active["experts"] = components["experts"] // moe.num_experts * moe.experts_per_token
    return ParameterCount(components=components, active_components=active)


def flops_per_token(config: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """Counts the matrix products that one token of a row of `sequence_length` tokens needs."""
    width, heads = config.width, config.num_heads * config.head_size
    count = parameter_count(config)
    return FlopsPerToken(
        approximate=6 * count.active,
        components={
            "projections": 2 * count.components["attention"],
            "attention": 4 * config.num_layers * heads * sequence_length,
            "router": 2 * count.components["router"],
            "experts": 2 * count.active_components["experts"],
            "dense_mlp": 2 * count.components["dense_mlp"],
            "head": 2 * width * config.vocab_size,
        },
    )


def training_flops(config: ModelConfig, train: TrainConfig) -> int:
    """Exact model FLOPs of a whole run: training FLOPs per token · tokens, padding included."""
    return flops_per_token(config, train.sequence_length).training * train.tokens


def approximate_training_flops(config: ModelConfig, tokens: int) -> int:
    """6 · active parameters · tokens."""
    return 6 * parameter_count(config).active * tokens


def memory_bytes(config: ModelConfig, train: TrainConfig) -> MemoryBytes:
    """Bytes of training on one device.

    Weights, gradients and optimizer are exact. Activations are an estimate: for every token of a micro-batch
    (B · S / gradient_accumulation) the values that the backward pass reads, with c bytes of compute_dtype:

    * `remat="full"`: the D inputs of every layer, plus one layer as under `none` while it is recomputed;
    * `remat="dots"`: of every layer its input and the results of projections and dense MLP (and of the routed
      MLP as under `none`), plus one layer as under `none`;
    * `remat="none"`: of every layer two residual states, two normalized states, queries, keys and values,
      rotated queries and keys, H · S attention weights, the attention's sum; of a dense MLP 3F, of a routed one
      2E router values in float32 and K · (2D + 3F);
    * and for every token 2D for the final norm, and 2V float32 for logits and their gradient.
    """
    count = parameter_count(config).total
    compute = _BYTES[config.compute_dtype]
    tokens = train.batch_size * train.sequence_length // train.gradient_accumulation
    width, query, key = config.width, config.num_heads * config.head_size, config.kv_heads * config.head_size

    def mlp(kind: str) -> float:
        if kind == "dense":
            return 3 * config.dense_hidden_size
        moe = config.moe
        return moe.experts_per_token * (2 * width + 3 * moe.expert_hidden) + 8 * moe.num_experts / compute

    def whole(kind: str) -> float:
        attention = (query + 2 * key) + (query + key) + config.num_heads * train.sequence_length + query
        return 4 * width + attention + mlp(kind)

    def kept(kind: str) -> float:
        if config.remat == "none":
            return whole(kind)
        return width if config.remat == "full" else 2 * width + query + 2 * key + mlp(kind)

    layers = sum(kept(kind) for kind in config.layer_kinds)
    if config.remat != "none":
        layers += max(whole(kind) for kind in config.layer_kinds)
    activations = tokens * (compute * (layers + 2 * width) + 8 * config.vocab_size)
    return MemoryBytes(weights=4 * count, gradients=4 * count, optimizer=8 * count, activations=round(activations))


def tokens_per_parameter(tokens: int, config: ModelConfig) -> float:
    """Training tokens over total parameters."""
    return tokens / parameter_count(config).total


def sparsity(config: ModelConfig) -> float:
    """1 - K/E of the routed layers; 0 for a dense model."""
    if config.num_moe_layers == 0:
        return 0.0
    return 1.0 - config.moe.experts_per_token / config.moe.num_experts


def rounded_count(parameters: int) -> str:
    """A count as the study's names write it: from 1B one decimal, below to the nearest 10M ("1.9B", "320M").

    Below 100M, where the study has no models, to two or three digits ("23M", "1.7M", "119K").
    """
    if parameters >= 995_000_000:
        return f"{parameters / 1e9:.1f}B"
    if parameters >= 99_500_000:
        return f"{round(parameters / 1e7) * 10}M"
    if parameters >= 9_950_000:
        return f"{round(parameters / 1e6)}M"
    return f"{parameters / 1e6:.1f}M" if parameters >= 999_500 else f"{round(parameters / 1e3)}K"


def member_name(config: ModelConfig) -> str:
    """Name after the study's rule, `d512-E8-k2-320M-A170M`; `d512-dense-170M` without routed layers."""
    count = parameter_count(config)
    if config.num_moe_layers == 0:
        return f"d{config.width}-dense-{rounded_count(count.total)}"
    moe = config.moe
    return (
        f"d{config.width}-E{moe.num_experts}-k{moe.experts_per_token}"
        f"-{rounded_count(count.total)}-A{rounded_count(count.active)}"
    )
