"""Parameters, FLOPs and bytes of a model, exact, from its configuration alone.

D width, L layers, H query heads, E experts, K experts per token, F hidden width, V
vocabulary, S sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jaxmoe.config import ModelConfig, TrainConfig

COMPONENTS = ("embedding", "head", "attention", "router", "experts", "shared_experts", "dense_mlp", "norms")
LOSS_CHUNK_LOGITS = 2**22
"""Logits that the loss holds at a time, at most (16 MiB of float32), unless one position of the batch has more."""
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
        (scores and their sum over values, for all S keys of a row: PaLM's convention, not what runs, which skips
        most of the masked half), `router`, `experts`, `shared_experts`, `dense_mlp`, `head`.
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
        "shared_experts": routed * 3 * width * moe.shared_expert_hidden if moe else 0,
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
            "shared_experts": 2 * count.components["shared_experts"],
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
    (B · S / gradient_accumulation) the values that the backward pass reads, in compute_dtype:

    * `remat="none"`: of every layer two residual states, two normalized states, rotated queries and keys, values,
      the attention's output and its H float32 logsumexps (the weights are recomputed); of a dense MLP 3F, of a
      routed one 3E router values in float32, the 2F hidden values of K experts and 3 per hidden unit of a shared
      one;
    * `remat="full"`: the D inputs of every layer, plus one layer as under `none` while it is recomputed;
    * `remat="dots"`: of every layer its input and the results of projections, router and dense MLP (the experts'
      are recomputed), plus one layer as under `none`;
    * and 2D for the final norm.

    Beside these, float32 and three times each (value, exponential, gradient): the logits of one chunk of the loss,
    and, with `attention="xla"`, one layer's scores of one block of queries. A flash kernel (`splash`, `cudnn`,
    `triton`) holds no scores outside the chip; `triton` keeps a key and a value for every query head. `auto`, which
    the device settles, is counted as `xla`, which holds most. What XLA holds differs; for float32 on CPU the tests
    see it within a factor of 1.6.
    """
    count = parameter_count(config).total
    compute = _BYTES[config.compute_dtype]
    rows = train.batch_size // train.gradient_accumulation
    tokens = rows * train.sequence_length
    width, query, key = config.width, config.num_heads * config.head_size, config.kv_heads * config.head_size
    saved_key = query if config.attention == "triton" else key
    routed = config.moe if config.num_moe_layers else None

    def whole(kind: str) -> float:
        attention = 2 * (query + saved_key) + 4 * config.num_heads / compute
        if kind == "dense":
            return 4 * width + attention + 3 * config.dense_hidden_size
        experts = 2 * routed.experts_per_token * routed.expert_hidden + 3 * routed.shared_expert_hidden
        return 4 * width + attention + 12 * routed.num_experts / compute + experts

    def kept(kind: str) -> float:
        if config.remat == "none":
            return whole(kind)
        if config.remat == "full":
            return width
        if kind == "dense":
            mlp = 2 * config.dense_hidden_size
        else:
            mlp = 4 * routed.num_experts / compute + 2 * routed.shared_expert_hidden
        return 2 * width + query + 2 * key + mlp

    layers = sum(kept(kind) for kind in config.layer_kinds)
    if config.remat != "none":
        layers += max(whole(kind) for kind in config.layer_kinds)
    logits = min(tokens * config.vocab_size, max(LOSS_CHUNK_LOGITS, rows * config.vocab_size))
    scores = 0
    if config.attention in ("auto", "xla"):
        scores = tokens * config.num_heads * attention_block(train.sequence_length)
    activations = tokens * compute * (layers + 2 * width) + 12 * (logits + scores)
    return MemoryBytes(weights=4 * count, gradients=4 * count, optimizer=8 * count, activations=round(activations))


def attention_block(sequence_length: int) -> int:
    """Queries of a row whose scores training holds at a time (`jaxmoe.layers.causal_attention.query_blocks`)."""
    return min(sequence_length, max(128, math.ceil(sequence_length / 8)))


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


def readable_bytes(count: int) -> str:
    """A size for people: three digits and a decimal unit ("1.28 GB")."""
    value: float = count
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def member_name(config: ModelConfig) -> str:
    """Name after the study's rule, `d512-E8-k2-320M-A170M`; `d512-dense-170M` without routed layers.

    The active parameters in the name leave out the router: with it, three of the published names would be others
    (d1024-E256-k2 is called A470M, and has 476.6M active parameters of which 4.2M are the router's).
    """
    count = parameter_count(config)
    if config.num_moe_layers == 0:
        return f"d{config.width}-dense-{rounded_count(count.total)}"
    moe = config.moe
    return (
        f"d{config.width}-E{moe.num_experts}-k{moe.experts_per_token}"
        f"-{rounded_count(count.total)}-A{rounded_count(count.active - count.active_components['router'])}"
    )
