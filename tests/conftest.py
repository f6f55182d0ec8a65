"""Fixtures that every test folder shares."""

import os
import pathlib
from collections.abc import Callable

import hypothesis
import pytest

# The first example of a property compiles; no test depends on timing.
hypothesis.settings.register_profile("jaxmoe", deadline=None)
hypothesis.settings.load_profile("jaxmoe")

SHARED = pathlib.Path(os.environ.get("JAXMOE_SHARED", pathlib.Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], pathlib.Path]:
    """Path of a real data file; the test is skipped where the file is not at hand (set JAXMOE_SHARED)."""

    def find(name: str) -> pathlib.Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"real data file {name} is not at hand; set JAXMOE_SHARED to the folder that has data/{name}")
        return path

    return find
