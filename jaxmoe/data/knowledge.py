"""The knowledge task: synthetic biographies that nothing but memory can predict.

In symbols a biography is `K`, a name and attribute values, one character each:

    prompt  Kŧǖ            (name_length letters)
    answer  ńĕƞƅŤǽęǆƲĹļźƏ  (attributes letters)

Values are uniform over the alphabet and independent, so one biography holds attributes · log2(symbols) bits. The
entities of the test split are others; on them no model does better than chance. Each example marks where its values
stand, so that recall counts values and not the words or bytes around them.
"""

from __future__ import annotations

import numpy as np

from jaxmoe.config import KnowledgeSource
from jaxmoe.data.seeding import distinct_rows, generator
from jaxmoe.data.sentences import FACTS, write_biographies
from jaxmoe.data.source import Example, Source
from jaxmoe.data.tasks import task_source, texts_of
from jaxmoe.data.tokenizers import SYMBOLS, Tokenizer, require_any_text


def knowledge_source(
    name: str, config: KnowledgeSource, tokenizer: Tokenizer, *, sequence_length: int, run_seed: int, index: int = 0
) -> Source:
    """Biographies as padded rows; prompt and answer both weigh 1.

    Raises:
      ConfigError: a row too short for a biography; sentences with the symbols tokenizer; more attributes than
        English has facts for here.
    """
    if config.style == "sentences":
        require_any_text(tokenizer, name)
    examples = biographies(config, *((run_seed, name) if config.seed is None else (config.seed, "")))
    splits = {"train": examples[: config.entities], "test": examples[config.entities :]}
    return task_source(
        name, config, splits, tokenizer,
        sequence_length=sequence_length, run_seed=run_seed, index=index, prompt_weight=1.0,
    )


def biographies(config: KnowledgeSource, seed: int, name: str = "") -> list[Example]:
    """All biographies: `config.entities` of training, then `config.test_entities` of test, names all distinct."""
    count = config.entities + config.test_entities
    random = generator(seed, name, "knowledge")
    if config.style == "sentences":
        return write_biographies(random, count, config.attributes, config.name_length)
    alphabet = np.array(list(SYMBOLS[: config.symbols]))
    names = alphabet[distinct_rows(random, (config.symbols,) * config.name_length, count)]
    values = alphabet[random.integers(0, config.symbols, size=(count, config.attributes))]
    written = zip(texts_of(names), texts_of(values), strict=True)
    places = tuple((place, place + 1) for place in range(config.attributes))
    return [Example("K" + entity, answer, values=places) for entity, answer in written]


def recall_by_chance(config: KnowledgeSource) -> float:
    """Share of values that uniform guessing recalls: the mean over attributes of 1 / number of values."""
    if config.style == "symbols":
        return 1 / config.symbols
    return float(np.mean([1 / len(values) for _, values in FACTS[: config.attributes]]))
