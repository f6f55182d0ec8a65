"""From a source's configuration to the source."""

from __future__ import annotations

import os

from jaxmoe.config import (
    KnowledgeSource,
    QuestionAnswerSource,
    ReasoningSource,
    SourceConfig,
    TextSource,
    TokensSource,
)
from jaxmoe.data.knowledge import knowledge_source
from jaxmoe.data.question_answer import question_answer_source
from jaxmoe.data.reasoning import reasoning_source
from jaxmoe.data.source import Source
from jaxmoe.data.text import text_source
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.data.tokens import tokens_source


def build_source(
    name: str,
    config: SourceConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    run_seed: int,
    cache_dir: str | os.PathLike | None = None,
    index: int = 0,
) -> Source:
    """Generates a task, or reads and tokenizes files.

    Args:
      name: of the source; together with the seed it decides what a task draws.
      config: its section of the configuration.
      tokenizer: of the mixture.
      sequence_length: S.
      run_seed: of the run; decides the order of rows, and the data of tasks that name no seed of their own.
      cache_dir: where tokenized text is kept; None: a temporary folder.
      index: the source's number in the mixture.

    Raises:
      ConfigError, DataError: a configuration that cannot be met, files that cannot be used.
    """
    common = {"sequence_length": sequence_length, "run_seed": run_seed, "index": index}
    if isinstance(config, KnowledgeSource):
        return knowledge_source(name, config, tokenizer, **common)
    if isinstance(config, ReasoningSource):
        return reasoning_source(name, config, tokenizer, **common)
    if isinstance(config, TextSource):
        return text_source(name, config, tokenizer, cache_dir=cache_dir, **common)
    if isinstance(config, TokensSource):
        return tokens_source(name, config, tokenizer, cache_dir=cache_dir, **common)
    if isinstance(config, QuestionAnswerSource):
        return question_answer_source(name, config, tokenizer, **common)
    raise TypeError(f"source {name!r} is a {type(config).__name__}.")
