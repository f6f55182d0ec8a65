"""The API page names what exists, no section of it is empty, and the tests that the fault matrix names are there."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "api.md").read_text()
ENTRIES = re.findall(r"^::: ([\w.]+)\n((?:    .*\n?)*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "options"), ENTRIES)
def test_every_entry_of_the_api_page_exists(name, options):
    module = importlib.import_module(name)
    listed = re.search(r"members: \[(.*)\]", options)
    members = listed[1].split(", ") if listed else getattr(module, "__all__", ())
    for member in members:
        public = getattr(module, member)
        if inspect.isclass(public) or inspect.isfunction(public):
            assert public.__doc__, f"{name}.{member} has no docstring"


def test_packages_say_what_is_public():
    """The page is made without running the code, and shows what `__all__` lists literally."""
    for name in ("layers", "models", "config", "data", "training", "evaluation", "post_training"):
        source = (pathlib.Path(__file__).parents[1] / "jaxmoe" / name / "__init__.py").read_text()
        assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
        (names,) = [ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "__all__"]
        assert names
        assert f"::: jaxmoe.{name}\n" in PAGE


MATRIX = (pathlib.Path(__file__).parents[1] / "docs" / "reliability.md").read_text()


def test_the_fault_matrix_names_tests_that_exist():
    named = re.findall(r"`((?:\w+/)?\w+\.py)(?:::(\w+))?`", MATRIX)
    assert len(named) >= 20
    for file, function in named:
        tests = (pathlib.Path(__file__).parent / file).read_text()
        assert not function or f"def {function}(" in tests, f"{file}::{function}"
