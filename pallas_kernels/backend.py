"""Which implementation runs: named explicitly, or chosen once by platform."""

import functools
import logging

import jax

BACKENDS = ("reference", "cpu", "ragged_dot")
"""`reference`: the definitions, dense over E; `cpu`: windows and blocks; `ragged_dot`: `jax.lax.ragged_dot`."""

_logger = logging.getLogger(__name__)


def resolved_backend(backend: str = "auto") -> str:
    """The backend that a call with this argument runs.

    Args:
      backend: one of `BACKENDS`, or `auto`: `cpu` where `jax.default_backend()` is the CPU, else `ragged_dot`.
        The choice is made and logged once per platform.

    Raises:
      ValueError: an unknown name.
    """
    if backend == "auto":
        return _backend_of_platform(jax.default_backend())
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}.")
    return backend


@functools.cache
def _backend_of_platform(platform: str) -> str:
    if platform == "cpu":
        _logger.info("backend 'auto' is 'cpu' on platform %r", platform)
        return "cpu"
    _logger.warning(
        "backend 'auto' is 'ragged_dot' on platform %r: its weight gradient is a dense expansion over all experts "
        "(E times the work), until the Pallas kernels of this platform are in",
        platform,
    )
    return "ragged_dot"
