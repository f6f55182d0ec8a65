"""Biographies in English: invented names, facts drawn from lists.

    prompt  Pegere Pefovu.
    answer   Born in 1949. Born in April. Grew up in Athens. Works as a nurse. Studied physics. ...

Names are made of syllables, so that no pre-trained model knows them; values are real words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmoe.config import ConfigError
from jaxmoe.data.seeding import distinct_rows
from jaxmoe.data.source import Example

_SYLLABLES = np.array([consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"])
_SYLLABLES_PER_WORD = 3

_CITIES = (
    "Lisbon Oslo Kyoto Cairo Lima Accra Boston Dublin Geneva Hanoi Istanbul Jakarta Krakow Lagos Madrid Nairobi Osaka "
    "Prague Quito Riga Seoul Tunis Utrecht Vienna Warsaw Xian York Zagreb Athens Berlin Chicago Dakar"
)
_WRITTEN = {
    "Born in the year {}.": " ".join(map(str, range(1900, 2000))),
    "Born in {}.": "January February March April May June July August September October November December",
    "Grew up in {}.": _CITIES,
    "Works as a {}.": (
        "baker builder carpenter chemist clerk dancer dentist doctor driver farmer fisher gardener geologist jeweller "
        "judge lawyer librarian mason miner nurse painter pilot plumber poet printer sailor singer surgeon tailor "
        "teacher translator weaver"
    ),
    "Studied {}.": (
        "algebra anatomy astronomy botany chemistry economics geography geology grammar history law linguistics logic "
        "medicine music physics"
    ),
    "Lives in {}.": _CITIES,
    "Plays the {}.": (
        "accordion banjo bassoon cello clarinet drums flute guitar harp horn lute oboe organ piano trumpet violin"
    ),
    "Speaks {}.": (
        "Arabic Bengali Czech Danish Dutch Finnish French German Greek Hindi Italian Korean Latin Polish Swahili Thai"
    ),
    "Collects {}.": "bells books boats clocks coins dolls fossils hats keys kites maps masks pots shells stamps toys",
    "Enjoys {}.": (
        "polo boxing chess climbing cricket cycling fencing golf hockey judo rowing rugby sailing skating skiing yoga"
    ),
    "Owns a {}.": "canary cat cow dog donkey duck ferret goat goose hamster horse parrot pony rabbit sheep turtle",
    "Likes {}.": (
        "almonds apples bread carrots cheese cherries figs grapes honey lentils mangoes olives oranges pears plums rice"
    ),
    "Wears {}.": "black blue brown crimson gold green grey indigo ivory orange pink purple red silver white yellow",
    "Married in {}.": _CITIES,
    "Fears {}.": "bees cats crowds dark dogs fire frogs ghosts heights mice noise rain snakes spiders thunder water",
    "Moved to {}.": _CITIES,
}

FACTS: tuple[tuple[str, tuple[str, ...]], ...] = tuple((fact, tuple(words.split())) for fact, words in _WRITTEN.items())
"""The facts a biography can state, in this order: how each is written, and its values."""


def write_biographies(random: np.random.Generator, count: int, attributes: int, words: int) -> list[Example]:
    """Biographies with distinct names.

    Args:
      random: consumed.
      count: how many.
      attributes: the first so many of `FACTS`.
      words: of a name.

    Raises:
      ConfigError: more facts than there are, or more biographies than names of so many words.
    """
    if attributes > len(FACTS):
        raise ConfigError(
            f"attributes={attributes}, but a biography in sentences has at most {len(FACTS)} facts; choose attributes "
            f"in 1..{len(FACTS)}, or style='symbols'."
        )
    names = len(_SYLLABLES) ** (_SYLLABLES_PER_WORD * words)
    if count > names:
        raise ConfigError(
            f"entities + test_entities = {count}, but there are only {names} names of {words} words; raise name_length."
        )
    syllables = distinct_rows(random, (len(_SYLLABLES),) * (_SYLLABLES_PER_WORD * words), count)
    spelled = _SYLLABLES[syllables].reshape(count, words, _SYLLABLES_PER_WORD).tolist()
    entities = [" ".join("".join(word).capitalize() for word in name) for name in spelled]
    drawn = [
        [values[i] for i in random.integers(0, len(values), size=count).tolist()] for _, values in FACTS[:attributes]
    ]
    facts = [fact for fact, _ in FACTS[:attributes]]
    return [_biography(entity, facts, values) for entity, *values in zip(entities, *drawn, strict=True)]


def _biography(entity: str, facts: Sequence[str], values: Sequence[str]) -> Example:
    """One biography; each value is marked together with the space before it, which most tokenizers join to it."""
    answer, places = "", []
    for fact, value in zip(facts, values, strict=True):
        start = len(answer) + 1 + fact.index("{}")
        answer += " " + fact.format(value)
        places.append((start - 1, start + len(value)))
    return Example(f"{entity}.", answer, values=tuple(places))
