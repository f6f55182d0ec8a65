"""The knowledge task: distinct names, uniform values, chance on the test split."""

import collections

import numpy as np
import pytest

from jaxmoe.config import ConfigError, KnowledgeSource
from jaxmoe.data import build_source, load_tokenizer
from jaxmoe.data.knowledge import biographies, recall_by_chance
from jaxmoe.data.sentences import FACTS
from jaxmoe.data.tokenizers import SYMBOLS

RECIPE = KnowledgeSource()


@pytest.fixture(scope="module")
def recipe():
    return build_source("facts", RECIPE, load_tokenizer("symbols"), sequence_length=16, run_seed=0)


def test_a_biography_of_the_recipe_fills_a_row_of_16(recipe):
    batch = recipe.rows(np.arange(128))
    assert (batch["segment_ids"] == 1).all()
    assert (batch["loss_weights"] == 1).all()
    assert recipe.rows_per_epoch == 4000
    assert recipe.tokens_per_epoch == 64_000


def test_rows_are_the_examples(recipe):
    tokenizer = load_tokenizer("symbols")
    rows = recipe.rows(np.arange(4000))
    written = {tokenizer.decode([ids[0], *targets]) for ids, targets in zip(rows["inputs"], rows["targets"])}
    assert written == {example.prompt + example.answer for example in recipe.examples("train")}


def test_train_and_test_share_no_name(recipe):
    train = {example.prompt for example in recipe.examples("train")}
    test = {example.prompt for example in recipe.examples("test")}
    assert (len(train), len(test)) == (4000, 512)
    assert not train & test
    assert all(len(prompt) == 3 and prompt[0] == "K" for prompt in train | test)


def test_values_are_uniform(recipe):
    answers = [example.answer for example in recipe.examples("train")]
    assert {len(answer) for answer in answers} == {13}
    counts = np.array(list(collections.Counter("".join(answers)).values()))
    expected = 4000 * 13 / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 256
    assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)


def test_names_can_use_up_the_alphabet():
    config = KnowledgeSource(entities=12, test_entities=4, symbols=4, name_length=2, attributes=1)
    prompts = [example.prompt for example in biographies(config, seed=0)]
    assert sorted(prompts) == sorted("K" + a + b for a in SYMBOLS[:4] for b in SYMBOLS[:4])


def test_the_run_seed_and_the_name_decide_unless_a_seed_is_given():
    def first(seed=None, **kwargs):
        source = build_source(
            tokenizer=load_tokenizer("symbols"), sequence_length=16, config=KnowledgeSource(seed=seed), **kwargs
        )
        return source.examples("train", 1)[0]

    a = first(name="a", run_seed=0)
    assert a == first(name="a", run_seed=0)
    assert a != first(name="b", run_seed=0)
    assert a != first(name="a", run_seed=1)
    assert first(7, name="a", run_seed=0) == first(7, name="b", run_seed=1)


def test_sentences_are_english_with_a_value_from_each_list():
    config = KnowledgeSource(style="sentences", attributes=len(FACTS), entities=50, test_entities=10)
    for example in biographies(config, seed=0):
        assert len(example.prompt.split()) == 2
        assert example.prompt.endswith(".")
        rest = example.answer
        for fact, values in FACTS:
            written = next(f" {fact.format(value)}" for value in values if rest.startswith(f" {fact.format(value)}"))
            rest = rest.removeprefix(written)
        assert rest == ""


def test_values_are_marked_in_sentences_and_in_symbols():
    config = KnowledgeSource(style="sentences", attributes=len(FACTS), entities=20, test_entities=10)
    for example in biographies(config, seed=0):
        marked = [example.answer[start:end] for start, end in example.values]
        assert all(value[0] == " " and value[1:] in values for value, (_, values) in zip(marked, FACTS, strict=True))
    for example in biographies(KnowledgeSource(entities=5, test_entities=5), seed=0):
        assert [example.answer[start:end] for start, end in example.values] == list(example.answer)


def test_recall_by_chance_is_one_over_the_number_of_values():
    assert recall_by_chance(RECIPE) == 1 / 256
    config = KnowledgeSource(style="sentences", attributes=3)
    assert recall_by_chance(config) == pytest.approx((1 / 100 + 1 / 12 + 1 / 32) / 3)


def test_sentences_have_distinct_names():
    config = KnowledgeSource(style="sentences", entities=5000, test_entities=500)
    assert len({example.prompt for example in biographies(config, seed=0)}) == 5500


def test_facts_have_distinct_values():
    for fact, values in FACTS:
        assert len(set(values)) == len(values) >= 12, fact


def test_more_attributes_than_english_facts_is_an_error():
    with pytest.raises(ConfigError, match=f"attributes=99.*choose attributes in 1..{len(FACTS)}"):
        biographies(KnowledgeSource(style="sentences", attributes=99), seed=0)


def test_sentences_do_not_fit_symbols():
    with pytest.raises(ConfigError, match="source 'facts'; use 'bytes'"):
        build_source(
            "facts", KnowledgeSource(style="sentences"), load_tokenizer("symbols"), sequence_length=512, run_seed=0
        )


def test_a_row_too_short_says_what_is_needed():
    with pytest.raises(ConfigError, match="has 17 tokens.*sequence_length=16 or more is needed"):
        build_source("facts", RECIPE, load_tokenizer("symbols"), sequence_length=15, run_seed=0)
