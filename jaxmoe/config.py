"""Configuration: frozen dataclasses that validate themselves.

Everything a run depends on is one `RunConfig`; a mistake in it is an error when it is built, in the words of
whoever wrote it. Axis letters as everywhere: E experts, K experts per token, D width, F expert hidden width,
H heads, V vocabulary, S sequence, B batch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

DType = Literal["float32", "bfloat16"]
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, its value and what is accepted."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{name}={value}; it must be positive.")


def _require_non_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= 0, f"{name}={value}; it must not be negative.")


# ------------------------------------------------------------------------------------------------- model


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
      router_dtype: precision of the router's weights as used, logits and softmax. The paper's is bfloat16.
      load_balance_coefficient: weight of the balance loss; 0 switches it off.
      load_balance_definition: `switch` is $E\\sum_e f_e P_e$ with f the share of the T·K assignments, 1 when
        balanced; `switch_times_k` lets f sum to K (K when balanced), as Hugging Face does per layer.
      router_z_coefficient: weight of mean(logsumexp(logits)^2) (ST-MoE); 0 switches it off.
      auxiliary_reduction: `sum` adds the auxiliary losses of all MoE layers (the paper's Megatron-Core),
        `mean` averages them.
      capacity_factor: None is dropless. A number c gives each expert room for ceil(c·T·K/E) rows; what does
        not fit, later tokens first, is dropped and counted.
      backend: of `pallas_kernels`; `auto` picks by platform, once, and says which.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int = 128
    score_order: Literal["topk_then_softmax", "softmax_then_topk"] = "topk_then_softmax"
    renormalize: bool = True
    router_dtype: DType = "float32"
    load_balance_coefficient: float = 1e-2
    load_balance_definition: Literal["switch", "switch_times_k"] = "switch"
    router_z_coefficient: float = 1e-3
    auxiliary_reduction: Literal["sum", "mean"] = "sum"
    capacity_factor: float | None = None
    backend: str = "auto"

    def __post_init__(self):
        _require_non_negative(self, "num_experts", "load_balance_coefficient", "router_z_coefficient")
        if self.num_experts == 0:
            return
        _require_positive(self, "expert_hidden")
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} but the layer has {self.num_experts} experts; "
            f"choose experts_per_token in 1..{self.num_experts}.",
        )
        if self.capacity_factor is not None:
            _require(
                self.capacity_factor > 0,
                f"capacity_factor={self.capacity_factor}; it must be positive, or None for dropless routing.",
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
      dense_hidden: hidden width of dense layers; None means K·F, so that they are active-matched.
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
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        _require_positive(
            self, "vocab_size", "width", "num_layers", "num_heads", "moe_every", "max_sequence_length",
            "rope_theta", "norm_eps", "init_std",
        )
        _require_non_negative(self, "first_dense_layers")
        _require(
            self.first_dense_layers <= self.num_layers,
            f"first_dense_layers={self.first_dense_layers} but the model has num_layers={self.num_layers}.",
        )
        if self.head_dim is None:
            _require(
                self.width % self.num_heads == 0,
                f"width={self.width} is not divisible by num_heads={self.num_heads}; give head_dim or change one.",
            )
        else:
            _require_positive(self, "head_dim")
        _require(self.head_size % 2 == 0, f"head_dim={self.head_size} is odd; rotary embedding needs it even.")
        _require(
            self.kv_heads > 0 and self.num_heads % self.kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}.",
        )
        if "dense" in self.layer_kinds:
            _require(
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
        return 0 if self.moe is None else self.moe.experts_per_token * self.moe.expert_hidden

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


# -------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeSource:
    """Synthetic biographies: a name, then attribute values drawn uniformly. Only memory can predict them.

    Attributes:
      weight: share of the batch's rows; relative to the other sources' weights. 0: evaluated, not trained on.
      entities: biographies in the training split.
      attributes: values per biography.
      name_length: symbols in a name, or its words in English; names are distinct.
      symbols: size of the alphabet that names and values are drawn from; one value holds log2(symbols) bits. Not
        used in English.
      style: `symbols` writes one symbol per name part and value, `sentences` writes English.
      test_entities: biographies in the test split (never trained on: chance level).
      seed: None takes the run's seed.
    """

    kind: Literal["knowledge"] = "knowledge"
    weight: float = 1.0
    entities: int = 4000
    attributes: int = 13
    name_length: int = 2
    symbols: int = 256
    style: Literal["symbols", "sentences"] = "symbols"
    test_entities: int = 512
    seed: int | None = None

    def __post_init__(self):
        _require_non_negative(self, "weight")
        _require_positive(self, "entities", "attributes", "name_length", "test_entities")
        _require(2 <= self.symbols <= 256, f"symbols={self.symbols}; choose 2..256.")
        names = self.symbols**self.name_length
        needed = self.entities + self.test_entities
        _require(
            self.style == "sentences" or needed <= names,
            f"entities + test_entities = {needed}, but {self.symbols} symbols give only {names} names of "
            f"length {self.name_length}; raise name_length.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningSource:
    """Chained arithmetic mod `modulus`, left to right, with every partial result written out.

    Attributes:
      weight: as in `KnowledgeSource`.
      problems: size of the finite training split.
      operations: steps per problem.
      modulus: numbers are 0..modulus-1.
      operators: drawn from these characters.
      corruption: probability that a written step result of the training split is replaced by a random number;
        the error propagates. The test split is always clean.
      test_problems: size of the test split; disjoint from training by construction.
      prompt_weight: loss weight of the problem statement, against 1 for the solution.
      seed: None takes the run's seed.
    """

    kind: Literal["reasoning"] = "reasoning"
    weight: float = 1.0
    problems: int = 3000
    operations: int = 3
    modulus: int = 10
    operators: str = "+-*"
    corruption: float = 0.0
    test_problems: int = 1024
    prompt_weight: float = 0.1
    seed: int | None = None

    def __post_init__(self):
        _require_non_negative(self, "weight", "prompt_weight")
        _require_positive(self, "problems", "operations", "test_problems")
        _require(2 <= self.modulus <= 100, f"modulus={self.modulus}; choose 2..100.")
        _require(0 <= self.corruption <= 1, f"corruption={self.corruption}; it is a probability, 0..1.")
        _require(
            bool(self.operators) and set(self.operators) <= set("+-*")
            and len(set(self.operators)) == len(self.operators),
            f"operators={self.operators!r}; choose distinct characters of '+-*'.",
        )
        distinct = self.modulus ** (self.operations + 1) * len(self.operators) ** self.operations
        needed = self.problems + self.test_problems
        _require(
            needed <= distinct // 2,
            f"problems + test_problems = {needed}, but only {distinct} distinct problems exist and at most half "
            "may be used; raise operations or modulus.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Documents from files, packed into rows.

    Attributes:
      weight: as in `KnowledgeSource`.
      paths: files or glob patterns, local or gs://; .txt, .jsonl, .jsonl.gz, .array_record.
      text_key: the field of a JSON line that holds the text.
      test_paths: files of the test split; empty: `test_fraction` of the documents is held out.
      test_fraction: share of documents held out, chosen by a hash of the text, so equal documents stay together.
      on_error: what a broken record does: `raise` (file and line named), or `skip` (counted and reported).
    """

    kind: Literal["text"] = "text"
    weight: float = 1.0
    paths: tuple[str, ...] = ()
    text_key: str = "text"
    test_paths: tuple[str, ...] = ()
    test_fraction: float = 0.01
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self):
        _require_non_negative(self, "weight")
        _require(bool(self.paths), "paths is empty; name at least one file of the text source.")
        _require(0 <= self.test_fraction < 1, f"test_fraction={self.test_fraction}; choose 0 <= test_fraction < 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswerSource:
    """Question and answer files, for training and for task loss and accuracy.

    Attributes:
      weight: as in `KnowledgeSource`.
      train_paths, test_paths: .jsonl, .jsonl.gz or .json files or patterns, local or gs://. Either may be empty;
        train_paths only if weight is 0.
      schema: `gsm8k` reads question and answer (worked solution ending in "#### result"); `prompt_answer`
        reads prompt and answer.
      prompt_template: how the question becomes a prompt (`gsm8k` only).
      answer_separator: put between prompt and answer. The paper's task-loss files have none.
      prompt_weight: loss weight of the prompt, against 1 for the answer.
      packed: pack several examples into a row; False: one example a row, padded.
      answer_format: how accuracy reads an answer: `final_number` (after "####", else the last number) or
        `exact` (whitespace-normalized string).
      on_error: as in `TextSource`.
    """

    kind: Literal["question_answer"] = "question_answer"
    weight: float = 1.0
    train_paths: tuple[str, ...] = ()
    test_paths: tuple[str, ...] = ()
    schema: Literal["gsm8k", "prompt_answer"] = "gsm8k"
    prompt_template: str = "Question: {question}\nAnswer:"
    answer_separator: str = " "
    prompt_weight: float = 1.0
    packed: bool = True
    answer_format: Literal["final_number", "exact"] = "final_number"
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self):
        _require_non_negative(self, "weight", "prompt_weight")
        _require(
            bool(self.train_paths) or self.weight == 0,
            f"train_paths is empty but weight={self.weight}; name training files or set weight=0.",
        )
        _require(bool(self.train_paths or self.test_paths), "train_paths and test_paths are both empty.")
        _require(
            self.schema != "gsm8k" or "{question}" in self.prompt_template,
            f"prompt_template={self.prompt_template!r} has no {{question}}.",
        )


SourceConfig = KnowledgeSource | ReasoningSource | TextSource | QuestionAnswerSource
SOURCE_KINDS: dict[str, type] = {
    "knowledge": KnowledgeSource,
    "reasoning": ReasoningSource,
    "text": TextSource,
    "question_answer": QuestionAnswerSource,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of named, weighted sources, and the tokenizer they share.

    Attributes:
      tokenizer: `bytes`, `symbols` (one token per character that the synthetic tasks can write), or a path:
        `*.json` (Hugging Face tokenizers) or `*.model` (sentencepiece).
      sources: by name; a row of a batch belongs to one source, in proportion to the weights.
      cache_dir: where tokenized text is kept; None: inside the study's folder.
    """

    tokenizer: str = "bytes"
    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    cache_dir: str | None = None

    def __post_init__(self):
        _require(bool(self.sources), "data.sources is empty; name at least one source.")
        weights = {name: source.weight for name, source in self.sources.items()}
        _require(
            sum(weights.values()) > 0,
            f"every weight of the mixture is zero ({', '.join(weights)}); give at least one source weight > 0.",
        )


# ------------------------------------------------------------------------------------------------- train


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what batches, with which optimizer. Defaults are the paper's where it states one.

    Attributes:
      steps: optimizer steps.
      batch_size: B, sequences per step over all devices.
      sequence_length: S, tokens predicted per row.
      gradient_accumulation: micro-batches per step; numbers do not depend on it.
      learning_rate: peak of AdamW's.
      schedule: `warmup_cosine`, `warmup_stable_decay` (linear decay over the last `decay_fraction`), or
        `constant` (after warm-up).
      warmup_steps: linear from 0.
      final_learning_rate_fraction: where the decay ends, relative to the peak.
      decay_fraction: share of the steps that `warmup_stable_decay` decays over.
      beta1, beta2, epsilon, weight_decay: AdamW; decay is decoupled, times the learning rate, on matrices only.
      clip_norm: of the global gradient; None does not clip.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints; None: ten per run. The last step is always saved.
      keep_checkpoints: how many of the newest stay.
      max_nonfinite_steps: this many skipped steps in a row stop the run.
    """

    steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    learning_rate: float = 4e-4
    schedule: Literal["warmup_cosine", "warmup_stable_decay", "constant"] = "warmup_cosine"
    warmup_steps: int = 0
    final_learning_rate_fraction: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    log_every: int = 10
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 20

    def __post_init__(self):
        _require_positive(
            self, "steps", "batch_size", "sequence_length", "gradient_accumulation", "learning_rate", "log_every",
            "keep_checkpoints", "max_nonfinite_steps", "epsilon",
        )
        _require_non_negative(self, "warmup_steps", "final_learning_rate_fraction", "weight_decay")
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            f"batch_size={self.batch_size} is not divisible by gradient_accumulation={self.gradient_accumulation}.",
        )
        _require(
            self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps} is more than steps={self.steps}.",
        )
        _require(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction}; choose 0 < decay_fraction <= 1.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}={value}; choose 0 <= {name} < 1.")
        if self.checkpoint_every is not None:
            _require_positive(self, "checkpoint_every")
        if self.clip_norm is not None:
            _require_positive(self, "clip_norm")

    @property
    def tokens(self) -> int:
        """Token positions of the whole run, padding included: steps · B · S."""
        return self.steps * self.batch_size * self.sequence_length

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints with the default resolved."""
        return self.checkpoint_every or max(1, math.ceil(self.steps / 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while and after training. Evaluation is always dropless.

    Attributes:
      points: how many times, evenly spaced, the last step included.
      examples: at most this many per split and task.
      batch_size: rows per evaluation batch.
      validation_rows: at most this many rows per source and split for the validation loss.
      generate: also score question/answer sources by generating answers.
      max_new_tokens: longest generated answer.
    """

    points: int = 5
    examples: int = 512
    batch_size: int = 128
    validation_rows: int = 512
    generate: bool = True
    max_new_tokens: int = 256

    def __post_init__(self):
        _require_positive(self, "points", "examples", "batch_size", "validation_rows", "max_new_tokens")

    def steps_of(self, total: int) -> tuple[int, ...]:
        """The steps after which to evaluate a run of `total` steps."""
        points = min(self.points, total)
        return tuple(sorted({round(total * (i + 1) / points) for i in range(points)}))


# --------------------------------------------------------------------------------------------------- run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, complete.

    Attributes:
      name: of the member; its folder in the study's.
      seed: of initialization, data and order.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def __post_init__(self):
        _require_non_negative(self, "seed")
        _require(
            self.train.sequence_length <= self.model.max_sequence_length,
            f"train.sequence_length={self.train.sequence_length} exceeds "
            f"model.max_sequence_length={self.model.max_sequence_length}.",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; `from_dict` of it gives an equal configuration."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def config_hash(config: Any) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds a configuration dataclass from nested plain values, strictly.

    Args:
      kind: the dataclass, `RunConfig` or one of its sections.
      values: by field name; nested sections are mappings.
      path: where `values` stands, for messages.

    Raises:
      ConfigError: an unknown key (with the nearest known one), a missing key, a value of another type, or a
        value the dataclass refuses; the message starts with the dotted path.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key!s}.{nearest(str(key), fields)}")
    built = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in built:
            raise ConfigError(f"{prefix}{name} is missing.")
    try:
        return kind(**built)
    except ConfigError as error:
        if path and not getattr(error, "located", False):
            error = ConfigError(f"{path}: {error}")
        error.located = True
        raise error from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `hint`, or a ConfigError that names `path`."""
    origin = typing.get_origin(hint)
    if hint == SourceConfig:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in SOURCE_KINDS:
            raise ConfigError(f"{path}.kind={kind!r}.{nearest(str(kind), SOURCE_KINDS)}")
        return from_dict(SOURCE_KINDS[kind], value, path)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(inner, value, path)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(f"{path}={value!r}; choose one of {', '.join(map(repr, options))}.")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            keys = ", ".join(field.name for field in dataclasses.fields(hint))
            raise ConfigError(f"{path}={value!r}; a section with {keys} is needed.")
        return from_dict(hint, value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}; a list of strings is needed.")
        return tuple(_convert(typing.get_args(hint)[0], item, path) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}; a section of named entries is needed.")
        item = typing.get_args(hint)[1]
        return {str(key): _convert(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}={value!r} is not finite.")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{path}={value!r} is a {type(value).__name__}; {getattr(hint, '__name__', hint)} is needed.")
