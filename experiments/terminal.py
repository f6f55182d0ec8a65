"""What a command says on the terminal while it works."""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging

OUR_PACKAGES = ("jaxmoe", "pallas_kernels")
_LONGEST = 300


class _CurrentStderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment, so that a progress bar that redirects it stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _OneLine(logging.Filter):
    """Cuts errors that Orbax's threads log, with their tracebacks, to a line: they are raised too, and told by us."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and "/orbax/" in record.pathname:
            record.msg, record.args, record.exc_info = record.getMessage().partition("\n")[0][:_LONGEST], (), None
        return True


def log_to_terminal() -> None:
    """Shows what our packages log from INFO on, and what others log from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_handler = absl_logging.get_absl_handler()
    if not any(isinstance(one, _OneLine) for one in absl_handler.filters):
        absl_handler.addFilter(_OneLine())
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in OUR_PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
