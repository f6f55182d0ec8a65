"""Kernels of another platform run in Pallas' interpreter in this folder, and the compiled ones are built for it."""

import os
import pathlib
import shutil
from collections.abc import Iterator

import jax.numpy as jnp
import pytest

from pallas_kernels import interpreted, native


@pytest.fixture(scope="module", autouse=True)
def kernels_are_interpreted() -> Iterator[None]:
    """A traced function keeps what it was traced for, so the whole module is inside."""
    with interpreted():
        yield


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The library of `cpu_native`, built into a folder of the tests."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("cpu_native needs a C++ compiler to be built")
    os.environ[native.DIRECTORY_VARIABLE] = str(tmp_path_factory.mktemp("native"))
    return native.build()


@pytest.fixture(autouse=True)
def native_where_it_is_asked_for(request: pytest.FixtureRequest) -> None:
    """Tests of all backends build `cpu_native` first, and pass over its other dtypes, which it refuses."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "cpu_native":
        return
    if jnp.dtype(parameters.params.get("dtype", "float32")) != jnp.float32:
        pytest.skip("cpu_native is float32 alone")
    request.getfixturevalue("native_library")
