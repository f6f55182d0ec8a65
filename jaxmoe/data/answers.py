"""What of an answer is compared when it is marked right or wrong."""

from __future__ import annotations

import decimal
import re
from typing import Literal

AnswerFormat = Literal["final_number", "exact"]

_NUMBER = r"(?<!\d)(?:-?\$?|\$-)(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})", re.ASCII)
_ANY = re.compile(_NUMBER, re.ASCII)


def extract_answer(text: str, answer_format: AnswerFormat) -> str | None:
    """The part of `text` that decides, in a form that can be compared with `==`.

    Args:
      text: a gold or generated answer.
      answer_format: `final_number` is the number after the first "####", else the last number; commas, `$` and
        trailing zeros of a fraction do not count ("1,050.00" is "1050"). `exact` is the text with runs of white space
        made one space.

    Returns:
      None where there is no number, or no text.
    """
    if answer_format == "exact":
        return " ".join(text.split()) or None
    marked = _MARKED.search(text)
    if marked:
        return _plain(marked.group(1))
    numbers = _ANY.findall(text)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> str:
    value = decimal.Decimal(number.replace(",", "").replace("$", ""))
    whole, _, fraction = format(value, "f").partition(".")
    fraction = fraction.rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return "0" if plain == "-0" else plain
