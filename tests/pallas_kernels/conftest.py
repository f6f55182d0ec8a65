"""Kernels of another platform run in Pallas' interpreter in this folder."""

from collections.abc import Iterator

import pytest

from pallas_kernels import interpreted


@pytest.fixture(scope="module", autouse=True)
def kernels_are_interpreted() -> Iterator[None]:
    """A traced function keeps what it was traced for, so the whole module is inside."""
    with interpreted():
        yield
