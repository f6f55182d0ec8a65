"""What a model is: `ModelConfig`, and `MoEConfig` for its routed MLPs.

E experts, K experts per token, F expert hidden width, D width, H heads, L layers, V vocabulary, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmoe.config.errors import require, require_declared, require_non_negative, require_positive

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The routed MLP of one layer. Defaults are those of arXiv 2508.18672, with the router in float32.

    Attributes:
      num_experts: E. 0 makes every layer dense.
      experts_per_token: K.
      expert_hidden: F, the hidden width of one expert.
      score_order: `topk_then_softmax` takes the K largest logits and a softmax over those (Mixtral);
        `softmax_then_topk` takes the K largest of a softmax over all E.
      renormalize: divide the K kept probabilities by their sum (only with `softmax_then_topk`; with
        `topk_then_softmax` they sum to one already).
      routed_scaling: what the gates are multiplied by (DeepSeek-V2's routed_scaling_factor).
      shared_expert_hidden: hidden width of an expert that sees every token beside the K routed ones, its output added
        to theirs (DeepSeekMoE); several shared experts are one of their summed width. 0: none.
      router_dtype: precision of the router's weights as used, logits and softmax. The paper's is bfloat16.
      load_balance_coefficient: weight of the balance loss; 0 switches it off.
      load_balance_definition: `switch` is $E\\sum_e f_e P_e$ with f the share of the T·K assignments, 1 when
        balanced; `switch_times_k` lets f sum to K (K when balanced), as Hugging Face does per layer.
      router_z_coefficient: weight of mean(logsumexp(logits)^2) (ST-MoE); 0 switches it off.
      auxiliary_reduction: `sum` adds the auxiliary losses of all MoE layers (the paper's Megatron-Core),
        `mean` averages them.
      capacity_factor: None is dropless. A number c gives each expert room for ceil(c·T·K/E) rows, T the tokens
        of the batch, padding included; what does not fit, later tokens first, is dropped and counted.
      expert_buffer_factor: where experts are divided among P devices, a device has room for this many times the
        T·K rows that come to it on average, T the tokens of one device. What finds no room, rows of later devices
        first, is not computed and counted as `overflow_fraction`. None is room for all that could come,
        P·T·min(K, E/P) rows, and is exact.
      strict_buffer: a training step in which a row found no room is not applied, and ends the run with an error.
      expert_overlap: a device takes its tokens in two halves, so that one half can travel while the other is computed.
        On TPU the training step tells the compiler to let it. The buffer, too, is one for each half.
      backend: of `pallas_kernels`; `auto` picks by platform, once, and says which.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int = 128
    score_order: Literal["topk_then_softmax", "softmax_then_topk"] = "topk_then_softmax"
    renormalize: bool = True
    routed_scaling: float = 1.0
    shared_expert_hidden: int = 0
    router_dtype: DType = "float32"
    load_balance_coefficient: float = 1e-2
    load_balance_definition: Literal["switch", "switch_times_k"] = "switch"
    router_z_coefficient: float = 1e-3
    auxiliary_reduction: Literal["sum", "mean"] = "sum"
    capacity_factor: float | None = None
    expert_buffer_factor: float | None = None
    strict_buffer: bool = False
    expert_overlap: bool = False
    backend: Literal["auto", "reference", "cpu", "cpu_native", "tpu", "gpu", "ragged_dot"] = "auto"

    def __post_init__(self):
        require_declared(self)
        require_non_negative(self, "num_experts", "load_balance_coefficient", "router_z_coefficient")
        if self.num_experts == 0:
            return
        require_positive(self, "expert_hidden", "routed_scaling")
        require_non_negative(self, "shared_expert_hidden")
        require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} but the layer has {self.num_experts} experts; "
            f"choose experts_per_token in 1..{self.num_experts}.",
        )
        if self.capacity_factor is not None:
            require(
                self.capacity_factor > 0,
                f"capacity_factor={self.capacity_factor}; it must be positive, or None for dropless routing.",
            )
        if self.expert_buffer_factor is not None:
            require(
                self.expert_buffer_factor > 0,
                f"expert_buffer_factor={self.expert_buffer_factor}; it must be positive, or None for room for all rows "
                "that could come.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer whose MLPs are dense or routed.

    Attributes:
      vocab_size: V, rows of the embedding; at least the tokenizer's.
      width: D.
      num_layers: L.
      num_heads: H query heads.
      num_kv_heads: key and value heads; None means num_heads (multi-head attention), fewer is grouped-query.
      head_dim: width of one head; None means width / num_heads.
      dense_hidden: hidden width of dense layers; None means K·F and the shared expert's, so that they are
        active-matched.
      moe: the routed MLP; None (or num_experts = 0) makes every layer dense.
      first_dense_layers: this many leading layers are dense.
      moe_every: of the rest, every n-th layer is MoE (the n-th, 2n-th, ...), the others dense.
      tie_embeddings: the output head is the transposed embedding.
      rope_theta: base of the rotary frequencies, over the full head, half-split form.
      norm_eps: epsilon of every RMSNorm.
      qk_norm: `none`, `head` (RMSNorm over each head's dims) or `projection` (over all heads together).
      document_mask: tokens attend within their own document of a packed row only, and positions restart;
        False is the paper's plain causal attention over the row.
      init_std: standard deviation of the normal initialization.
      residual_init: `scaled` divides it by sqrt(2L) for attention outputs and expert down-projections
        (Megatron's default, the paper's), `same` does not.
      max_sequence_length: longest sequence that may be trained or generated.
      compute_dtype: of activations and matmuls; parameters are always float32.
      attention: how sequences attend without a cache. `xla`: blocks of plain XLA; `splash`: JAX's TPU kernel;
        `cudnn`, `triton`: cuDNN and Pallas' kernel on GPU; `auto` picks by platform and shape, and says which.
      remat: what the backward pass recomputes: `none`, `full` (each layer) or `dots` (all but matmuls).
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dense_hidden: int | None = None
    moe: MoEConfig | None = None
    first_dense_layers: int = 0
    moe_every: int = 1
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "projection"] = "none"
    document_mask: bool = False
    init_std: float = 0.02
    residual_init: Literal["scaled", "same"] = "scaled"
    max_sequence_length: int = 4096
    compute_dtype: DType = "float32"
    attention: Literal["auto", "xla", "splash", "cudnn", "triton"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        require_declared(self)
        require_positive(
            self, "vocab_size", "width", "num_layers", "num_heads", "moe_every", "max_sequence_length",
            "rope_theta", "norm_eps", "init_std",
        )
        require_non_negative(self, "first_dense_layers")
        require(
            self.first_dense_layers <= self.num_layers,
            f"first_dense_layers={self.first_dense_layers} but the model has num_layers={self.num_layers}.",
        )
        if self.head_dim is None:
            require(
                self.width % self.num_heads == 0,
                f"width={self.width} is not divisible by num_heads={self.num_heads}; give head_dim or change one.",
            )
        else:
            require_positive(self, "head_dim")
        require(self.head_size % 2 == 0, f"head_dim={self.head_size} is odd; rotary embedding needs it even.")
        require(
            self.kv_heads > 0 and self.num_heads % self.kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}.",
        )
        if "dense" in self.layer_kinds:
            require(
                self.dense_hidden_size > 0,
                f"dense_hidden={self.dense_hidden} but {self.layer_kinds.count('dense')} layers are dense; "
                "give dense_hidden a positive width.",
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head with the default resolved."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def dense_hidden_size(self) -> int:
        """Hidden width of the dense layers with the default resolved; 0 when nothing gives one."""
        if self.dense_hidden is not None:
            return self.dense_hidden
        if self.moe is None:
            return 0
        return self.moe.experts_per_token * self.moe.expert_hidden + self.moe.shared_expert_hidden

    @property
    def layer_kinds(self) -> tuple[Literal["dense", "moe"], ...]:
        """What each layer's MLP is, first layer first."""
        routed = self.moe is not None and self.moe.num_experts > 0

        def kind(layer: int) -> Literal["dense", "moe"]:
            position = layer - self.first_dense_layers + 1
            return "moe" if routed and position > 0 and position % self.moe_every == 0 else "dense"

        return tuple(kind(layer) for layer in range(self.num_layers))

    @property
    def num_moe_layers(self) -> int:
        """How many layers route."""
        return self.layer_kinds.count("moe")
