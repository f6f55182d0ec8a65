"""Programs that a model wrote: arithmetic is evaluated, everything else is refused, and nothing hangs or grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.post_training import programs

TINYGSM = '''
The answer:
def simple_math_problem() -> int:
    """
    Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
    """
    clips_april = 48
    clips_may = clips_april / 2
    total = clips_april + clips_may
    result = total
    return result

That is all.'''


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (TINYGSM, "72"),
        ("text\n<llm-code>\na = 3\nb = a * 2.5\nb\n</llm-code>\nmore", "7.5"),
        ("<llm-code>\nx = 0\nfor i in range(1, 5):\n    if i % 2 == 0:\n        continue\n    x += i\nx", "4"),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)", None),  # no simple_math_problem
        ("def simple_math_problem():\n    import math\n    return math.ceil(sum([1, 2.2]) / max(1, 2))", "2"),
        ("def simple_math_problem():\n    n = 0\n    while True:\n        n += 1\n        if n == 9:\n"
         "            break\n    return n", "9"),
        ("def simple_math_problem():\n    return 1\ndef simple_math_problem():\n    return 2", "2"),
        ("def simple_math_problem():\n    return 'text'", None),
        ("def simple_math_problem():\n    return 1 / 0", None),
        ("def simple_math_problem(:", None),
    ],
)  # fmt: skip
def test_the_answer_of_a_response(response, answer):
    assert programs.has_program(response)
    assert programs.answer_of(response) == answer


@pytest.mark.parametrize("text", ["We define x = 3, so 72.", "definitely 5", "so def ends"])
def test_prose_is_no_program(text):
    assert not programs.has_program(text)


@pytest.mark.parametrize(
    "hostile",
    [
        "while True: pass",
        "for i in range(10**9): pass",
        "10**10**10",
        "2**(10**9)",
        "x = 3\nfor i in range(10000):\n x = x * x\nx",
        "round(12345, -10**9)",
        "'a' * 10**9",
        "[1] * 10**9",
        "a = [1]\nb = [1]\nfor i in range(60):\n a = [a, a]\n b = [b, b]\na == b",
        "def f(n):\n return f(n + 1)\nf(0)",
        "-" * 3900 + "1",
        "[" * 3900,
        "9" * 3999,
        "1" * 100_000,
        "import os\nos.system('true')",
        "import os",
        "from os import system",
        "__import__('os')",
        "open('file')",
        "eval('1')",
        "exec('1')",
        "().__class__.__bases__[0].__subclasses__()",
        "(1).real",
        "'{0.__class__}'.format(1)",
        "f'{1}'",
        "(lambda: 1)()",
        "[x for x in range(9)]",
        "import math\nmath.factorial(10**6)",
        "math.__class__",
        "print.__self__",
        "globals()",
        "class A: pass",
        "try:\n 1/0\nexcept Exception:\n pass",
        "with 1: pass",
        "def f(*a): return 1\nf(1)",
        "(-8) ** 0.5",
        "unknown",
        "1 << 10**9",
    ],
)  # fmt: skip
def test_a_hostile_program_is_refused(hostile):
    with pytest.raises(programs.ProgramError):
        programs.run(hostile)


def operations(operand):
    return st.builds("({}{}{})".format, operand, st.sampled_from(["+", "-", "*", "//", "%", "<", "=="]), operand)


@given(st.recursive(st.integers(-9, 9).map(str), operations, max_leaves=12))
def test_arithmetic_is_pythons(expression):
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(programs.ProgramError, match="ZeroDivisionError"):
            programs.run(expression)
        return
    assert programs.run(expression) == expected


@given(st.text("()[]{}:=+-*/.,'\" \n0123456789abcdefghimnoprtuw_", max_size=200))
def test_no_text_does_anything_but_give_a_value_or_an_error(text):
    programs.answer_of(f"\ndef {text}")
    programs.answer_of(f"<llm-code>{text}")
