"""What a program that a model wrote can compute with: numbers and lists, operators and a few functions, all limited."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

MOST_BITS = 4_096
LONGEST_LIST = 10_000
MOST_DIGITS = 100
"""Limits of bits of an integer, elements of a list, and digits to round to."""


class ProgramError(Exception):
    """A program that is not evaluated: it is broken, asks for something unknown, or passes a limit."""


def number(value: Any) -> Any:
    """A value of arithmetic within its limits."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ProgramError(f"an integer of {value.bit_length()} bits")
    if isinstance(value, complex):
        raise ProgramError("a complex number")
    return value


def _require_numbers(*values: Any) -> None:
    for value in values:
        if not isinstance(value, int | float):
            raise ProgramError(f"arithmetic on a {type(value).__name__}")


def _power(base: Any, exponent: Any) -> Any:
    _require_numbers(base, exponent)
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and base.bit_length() * exponent > MOST_BITS:
        raise ProgramError(f"a power with exponent {exponent}")
    return base**exponent


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        _require_numbers(left, right)
        return function(left, right)

    return apply


BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: _arithmetic(operator.add),
    ast.Sub: _arithmetic(operator.sub),
    ast.Mult: _arithmetic(operator.mul),
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
    ast.Pow: _power,
}
UNARY: Mapping[type, Callable[[Any], Any]] = {
    ast.USub: lambda value: BINARY[ast.Sub](0, value),
    ast.UAdd: lambda value: BINARY[ast.Add](0, value),
    ast.Not: operator.not_,
}
COMPARE: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


def listed(values: Any) -> list[Any]:
    """A list within its limit."""
    if not isinstance(values, list | range):
        raise ProgramError(f"a {type(values).__name__} where a list is needed")
    if len(values) > LONGEST_LIST:
        raise ProgramError(f"a list of {len(values)} elements")
    return list(values)


def _range(*bounds: Any) -> list[int]:
    return listed(range(*bounds))


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        _require_numbers(*values)
        return function(*values)

    return apply


def _round(value: Any, digits: Any = None) -> Any:
    _require_numbers(value, 0 if digits is None else digits)
    if digits is not None and abs(digits) > MOST_DIGITS:
        raise ProgramError(f"rounding to {digits} digits")
    return round(value, digits)


def _least_or_most(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        values = listed(values[0]) if len(values) == 1 else values
        _require_numbers(*values)
        return function(values)

    return apply


def _sum(values: Any) -> Any:
    total = 0
    for value in listed(values):
        total = number(BINARY[ast.Add](total, value))
    return total


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": _of_numbers(abs), "round": _round, "int": _of_numbers(int), "float": _of_numbers(float),
    "min": _least_or_most(min), "max": _least_or_most(max), "sum": _sum, "range": _range,
    "len": lambda values: len(listed(values)), "print": lambda *values: None,
}  # fmt: skip
MATH: Mapping[str, Any] = {
    "pi": math.pi, "e": math.e,
    **{name: _of_numbers(getattr(math, name)) for name in (
        "sqrt", "ceil", "floor", "trunc", "fabs", "log", "log2", "log10", "exp", "sin", "cos", "tan", "gcd",
    )},
}  # fmt: skip
