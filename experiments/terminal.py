"""What a command says on the terminal while it works."""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging

OUR_PACKAGES = ("jaxmoe", "pallas_kernels")


class _CurrentStderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment, so that a progress bar that redirects it stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def log_to_terminal() -> None:
    """Shows what our packages log from INFO on, and what others log from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in OUR_PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
