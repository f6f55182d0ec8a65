"""Programs that a model wrote: what they compute, found without running them as Python.

A program is read as a syntax tree and evaluated by this module, which knows what `jaxmoe.post_training.arithmetic` has
and nothing else: no imports but `math`, no attributes but those of `math`, no names but its own and a few functions,
and a limit on everything that can grow. So there is nothing to escape from, and the answer depends on the text alone,
not on a clock. Programs that need more, such as sympy, have no answer.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from jaxmoe.post_training.arithmetic import BINARY, COMPARE, FUNCTIONS, MATH, UNARY, ProgramError, listed, number

LONGEST_PROGRAM = 4_000
"""Characters; what is nested deeper than a parser can bear does not fit."""

MOST_STEPS = 20_000
DEEPEST = 150
"""Limits of one program: nodes evaluated and elements of lists looked at, and calls and expressions nested."""

_FUNCTION = re.compile(r"(?:^|\n)(?=def\s)")
_BLOCK = re.compile(r"<llm-code>(.*?)(?:</llm-code>|$)", re.DOTALL)


def has_program(text: str) -> bool:
    """Whether a response answers by a program."""
    return "<llm-code>" in text or bool(_FUNCTION.search(text))


def answer_of(text: str) -> str | None:
    """What the program in a response computes, as text; None if it computes nothing.

    As in the study's reward (arXiv 2508.18672, repository): the first `<llm-code>` block is run and its last line is
    the answer, as in OpenMathInstruct-1; else the last function definition that begins a line is the program, and
    `simple_math_problem()` the answer, as in TinyGSM.
    """
    block = _BLOCK.search(text)
    try:
        if block is not None:
            value = run(block[1])
        else:
            *_, last = _FUNCTION.split(text)
            value = run(_whole_function(last), call="simple_math_problem")
    except ProgramError:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return repr(int(value)) if value == int(value) else repr(value)


def _whole_function(text: str) -> str:
    """A definition without the text that may follow it: its first line, and those that are indented or empty."""
    first, *rest = text.split("\n")
    body = []
    for line in rest:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return "\n".join([first, *body])


def run(source: str, *, call: str | None = None) -> Any:
    """Evaluates a program.

    Args:
      source: Python as far as this module knows it.
      call: a function of the program, without arguments, whose value is the result; None: that of the last line.

    Raises:
      ProgramError: it cannot be evaluated, or passes a limit.
    """
    if len(source) > LONGEST_PROGRAM:
        raise ProgramError(f"{len(source)} characters; {LONGEST_PROGRAM} are read.")
    try:
        tree = ast.parse(source.strip("\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"not a program: {type(error).__name__}") from error
    try:
        return _Evaluation().program(tree, call)
    except (ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        raise ProgramError(f"{type(error).__name__}: {error}") from error


class _Returned(Exception):
    def __init__(self, value: Any):
        self.value = value


class _Broken(Exception):
    """`break`."""


class _Continued(Exception):
    """`continue`."""


class _Evaluation:
    """One program."""

    def __init__(self):
        self._steps, self._depth = 0, 0
        self._functions: dict[str, ast.FunctionDef] = {}
        self._names: dict[str, Any] = {}

    def program(self, tree: ast.Module, call: str | None) -> Any:
        """What the program computes: the value of the function `call`, or of its last expression."""
        value = None
        for statement in tree.body:
            value = self._evaluate(statement.value) if isinstance(statement, ast.Expr) else self._execute(statement)
        if call is None:
            last = tree.body[-1] if tree.body else None
            if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
                return self._names[last.targets[0].id]
            return value
        if call not in self._functions:
            raise ProgramError(f"no function {call}")
        return self._call(self._functions[call], [])

    def _count(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise ProgramError(f"more than {MOST_STEPS} steps")

    def _call(self, function: ast.FunctionDef, values: Sequence[Any]) -> Any:
        arguments = function.args
        plain = not (arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs)
        if not plain or arguments.defaults or len(arguments.args) != len(values):
            raise ProgramError(f"the arguments of {function.name}")
        outer = self._names
        self._names = dict(zip((argument.arg for argument in arguments.args), values, strict=True))
        self._depth += 1
        try:
            if self._depth > DEEPEST:
                raise ProgramError(f"nested deeper than {DEEPEST}")
            self._block(function.body)
        except _Returned as returned:
            return returned.value
        finally:
            self._names = outer
            self._depth -= 1
        return None

    def _block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._execute(statement)

    def _execute(self, statement: ast.stmt) -> None:
        self._count()
        match statement:
            case ast.Expr(value=value):
                self._evaluate(value)
            case ast.Assign(targets=[target], value=value):
                self._assign(target, self._evaluate(value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._evaluate(value))
            case ast.AugAssign(target=ast.Name(id=name), op=operation, value=value):
                self._names[name] = self._binary(operation, self._named(name), self._evaluate(value))
            case ast.Return(value=value):
                raise _Returned(None if value is None else self._evaluate(value))
            case ast.If(test=test, body=body, orelse=otherwise):
                self._block(body if self._evaluate(test) else otherwise)
            case ast.While(test=test, body=body, orelse=[]):
                while self._evaluate(test):
                    if not self._once(body):
                        break
            case ast.For(target=target, iter=values, body=body, orelse=[]):
                for value in self._counted(self._evaluate(values)):
                    self._assign(target, value)
                    if not self._once(body):
                        break
            case ast.FunctionDef(name=name, decorator_list=[]):
                self._functions[name] = statement
            case ast.Import(names=[ast.alias(name="math", asname=None)]) | ast.Pass():
                pass
            case ast.Break():
                raise _Broken
            case ast.Continue():
                raise _Continued
            case _:
                raise ProgramError(f"a statement {type(statement).__name__}")

    def _once(self, body: Sequence[ast.stmt]) -> bool:
        """The body of a loop, once; whether the loop goes on."""
        self._count()
        try:
            self._block(body)
        except _Broken:
            return False
        except _Continued:
            pass
        return True

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self._names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = listed(value)
                if len(values) != len(targets):
                    raise ProgramError("another number of values than names")
                for each, one in zip(targets, values, strict=True):
                    self._assign(each, one)
            case _:
                raise ProgramError(f"an assignment to {type(target).__name__}")

    def _named(self, name: str) -> Any:
        if name not in self._names:
            raise ProgramError(f"no name {name}")
        return self._names[name]

    def _binary(self, operation: ast.operator, left: Any, right: Any) -> Any:
        if type(operation) not in BINARY:
            raise ProgramError(f"an operator {type(operation).__name__}")
        return number(BINARY[type(operation)](left, right))

    def _evaluate(self, expression: ast.expr) -> Any:
        self._count()
        self._depth += 1
        try:
            if self._depth > DEEPEST:
                raise ProgramError(f"nested deeper than {DEEPEST}")
            return self._value(expression)
        finally:
            self._depth -= 1

    def _value(self, expression: ast.expr) -> Any:
        match expression:
            case ast.Constant(value=int() | float() | str() | None as value):
                return number(value)
            case ast.Name(id=name):
                return self._named(name)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._evaluate(element) for element in elements]
            case ast.BinOp(left=left, op=operation, right=right):
                return self._binary(operation, self._evaluate(left), self._evaluate(right))
            case ast.UnaryOp(op=operation, operand=operand) if type(operation) in UNARY:
                return UNARY[type(operation)](self._evaluate(operand))
            case ast.BoolOp(op=operation, values=values):
                stops = isinstance(operation, ast.Or)
                for each in values:
                    value = self._evaluate(each)
                    if bool(value) is stops:
                        break
                return value
            case ast.Compare(left=left, ops=operations, comparators=others):
                return self._compare(left, operations, others)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                return self._evaluate(body if self._evaluate(test) else otherwise)
            case ast.Subscript(value=values, slice=index):
                place = self._evaluate(index)
                if not isinstance(place, int):
                    raise ProgramError("an index that is no integer")
                return self._counted(self._evaluate(values))[place]
            case ast.Attribute(value=ast.Name(id="math"), attr=name) if name in ("pi", "e"):
                return MATH[name]
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self._called(function, arguments)
            case _:
                raise ProgramError(f"an expression {type(expression).__name__}")

    def _compare(self, left: ast.expr, operations: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> bool:
        value = self._evaluate(left)
        for operation, other in zip(operations, others, strict=True):
            following = self._evaluate(other)
            if type(operation) not in COMPARE or isinstance(value, list) or isinstance(following, list):
                raise ProgramError(f"a comparison {type(operation).__name__}")  # of nested lists it may never end
            if not COMPARE[type(operation)](value, following):
                return False
            value = following
        return True

    def _called(self, function: ast.expr, arguments: Sequence[ast.expr]) -> Any:
        values = [self._evaluate(argument) for argument in arguments]
        match function:
            case ast.Name(id=name) if name in self._functions:
                return self._call(self._functions[name], values)
            case ast.Name(id=name) if name in FUNCTIONS:
                known = FUNCTIONS[name]
            case ast.Attribute(value=ast.Name(id="math"), attr=name) if callable(MATH.get(name)):
                known = MATH[name]
            case _:
                raise ProgramError("a call of something unknown")
        for value in values:
            if isinstance(value, list):
                self._counted(value)
        value = known(*values)
        return self._counted(value) if isinstance(value, list) else number(value)

    def _counted(self, values: Any) -> list[Any]:
        """A list whose elements are about to be looked at."""
        if not isinstance(values, list):
            raise ProgramError(f"a {type(values).__name__} where a list is needed")
        self._count(len(values))
        return values
