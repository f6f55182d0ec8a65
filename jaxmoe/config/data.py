"""What a run is trained and evaluated on: sources of five kinds, and their mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxmoe.config.errors import require, require_declared, require_non_negative, require_positive


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
        require_declared(self)
        require_non_negative(self, "weight")
        require_positive(self, "entities", "attributes", "name_length", "test_entities")
        require(2 <= self.symbols <= 256, f"symbols={self.symbols}; choose 2..256.")
        names = self.symbols**self.name_length
        needed = self.entities + self.test_entities
        require(
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
        require_declared(self)
        require_non_negative(self, "weight", "prompt_weight")
        require_positive(self, "problems", "operations", "test_problems")
        require(2 <= self.modulus <= 100, f"modulus={self.modulus}; choose 2..100.")
        require(0 <= self.corruption <= 1, f"corruption={self.corruption}; it is a probability, 0..1.")
        require(
            bool(self.operators) and set(self.operators) <= set("+-*")
            and len(set(self.operators)) == len(self.operators),
            f"operators={self.operators!r}; choose distinct characters of '+-*'.",
        )
        distinct = self.modulus ** (self.operations + 1) * len(self.operators) ** self.operations
        needed = self.problems + self.test_problems
        require(
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
        require_declared(self)
        require_non_negative(self, "weight")
        require(bool(self.paths), "paths is empty; name at least one file of the text source.")
        require(0 <= self.test_fraction < 1, f"test_fraction={self.test_fraction}; choose 0 <= test_fraction < 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensSource:
    """Documents that `experiments.data tokenize` made tokens of, read from their shards as they are needed.

    Attributes:
      weight: as in `KnowledgeSource`.
      paths: ArrayRecord shards or patterns, local or gs://.
      test_paths: shards of the test split; empty: `test_fraction` of the documents is held out.
      test_fraction: as in `TextSource`.
      allow_repeat: train on tokens more than once where the run needs more than there are; False refuses.
    """

    kind: Literal["tokens"] = "tokens"
    weight: float = 1.0
    paths: tuple[str, ...] = ()
    test_paths: tuple[str, ...] = ()
    test_fraction: float = 0.01
    allow_repeat: bool = False

    def __post_init__(self):
        require_declared(self)
        require_non_negative(self, "weight")
        require(bool(self.paths), "paths is empty; name at least one shard of the tokens source.")
        require(0 <= self.test_fraction < 1, f"test_fraction={self.test_fraction}; choose 0 <= test_fraction < 1.")


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
        require_declared(self)
        require_non_negative(self, "weight", "prompt_weight")
        require(
            bool(self.train_paths) or self.weight == 0,
            f"train_paths is empty but weight={self.weight}; name training files or set weight=0.",
        )
        require(bool(self.train_paths or self.test_paths), "train_paths and test_paths are both empty.")
        require(
            self.schema != "gsm8k" or "{question}" in self.prompt_template,
            f"prompt_template={self.prompt_template!r} has no {{question}}.",
        )


SourceConfig = KnowledgeSource | ReasoningSource | TextSource | TokensSource | QuestionAnswerSource
SOURCE_KINDS: dict[str, type] = {
    "knowledge": KnowledgeSource,
    "reasoning": ReasoningSource,
    "text": TextSource,
    "tokens": TokensSource,
    "question_answer": QuestionAnswerSource,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of named, weighted sources, and the tokenizer they share.

    Attributes:
      tokenizer: `bytes`, `symbols` (one token per character that the synthetic tasks can write), or a path:
        `*.json` (Hugging Face tokenizers) or `*.model` (sentencepiece).
      sources: by name (any but `all`, which stands for the mixture in records); a row of a batch belongs to one
        source, in proportion to the weights.
      root: folder, local or gs://, that relative paths of sources and tokenizer start from. They are joined when the
        configuration is built, which then has no root of its own; None: the folder the command runs in.
      cache_dir: where tokenized text is kept; None: inside the study's folder.
    """

    tokenizer: str = "bytes"
    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    root: str | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        require(bool(self.sources), "data.sources is empty; name at least one source.")
        if self.root is not None:
            require(bool(self.root), "data.root is empty; name a folder, or leave it out.")
            for field, value in _joined(self).items():
                object.__setattr__(self, field, value)
        require(
            "all" not in self.sources,
            "data.sources has a source named 'all', which stands for the mixture in records; choose another name.",
        )
        weights = {name: source.weight for name, source in self.sources.items()}
        require(
            sum(weights.values()) > 0,
            f"every weight of the mixture is zero ({', '.join(weights)}); give at least one source weight > 0.",
        )


_PATHS = ("paths", "train_paths", "test_paths")


def _joined(data: DataConfig) -> dict[str, object]:
    """The fields of `data` with every relative path after its root, and no root left."""

    def join(path: str) -> str:
        return path if path.startswith(("/", "~")) or "://" in path else f"{data.root.rstrip('/')}/{path}"

    sources = {
        name: dataclasses.replace(
            source, **{key: tuple(map(join, getattr(source, key))) for key in _PATHS if hasattr(source, key)}
        )
        for name, source in data.sources.items()
    }
    is_file = data.tokenizer.endswith((".json", ".model"))
    return {"sources": sources, "tokenizer": join(data.tokenizer) if is_file else data.tokenizer, "root": None}
