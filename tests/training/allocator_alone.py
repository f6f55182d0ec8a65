"""Freed memory stays with the process while the block lasts, and only then."""

import ctypes
import resource

import pytest

from jaxmoe.training.allocator import give_back_freed_memory, reuse_freed_memory

SIZE = 48 << 20
HUGE_PAGES = SIZE // (2 << 20)


@pytest.fixture
def plain_environment(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


def faults_of_a_buffer() -> int:
    """Page faults of allocating 48 MB, writing to all of it and freeing it."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = library.malloc(SIZE)
    library.memset(buffer, 1, SIZE)
    library.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_buffer_is_faulted_in_once(plain_environment):
    with reuse_freed_memory() as in_effect:
        if not in_effect:
            pytest.skip("the C library is not glibc")
        faults_of_a_buffer()
        assert min(faults_of_a_buffer() for _ in range(3)) < HUGE_PAGES // 4
    assert min(faults_of_a_buffer() for _ in range(3)) > HUGE_PAGES // 2


def test_an_allocator_that_the_user_configured_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    with reuse_freed_memory() as in_effect:
        assert not in_effect


def test_an_inner_block_does_not_end_an_outer_one(plain_environment):
    with reuse_freed_memory() as in_effect:
        if not in_effect:
            pytest.skip("the C library is not glibc")
        with reuse_freed_memory():
            faults_of_a_buffer()
        assert min(faults_of_a_buffer() for _ in range(3)) < HUGE_PAGES // 4
    assert min(faults_of_a_buffer() for _ in range(3)) > HUGE_PAGES // 2


def test_large_buffers_are_given_back_inside_and_kept_again_after(plain_environment):
    with reuse_freed_memory() as in_effect:
        if not in_effect:
            pytest.skip("the C library is not glibc")
        with give_back_freed_memory():
            assert min(faults_of_a_buffer() for _ in range(3)) > HUGE_PAGES // 2
        faults_of_a_buffer()
        assert min(faults_of_a_buffer() for _ in range(3)) < HUGE_PAGES // 4
