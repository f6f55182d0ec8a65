"""Compares mathematical answers, in a process of its own: one JSON object a line in, one line out.

Run by `jaxmoe.post_training.verification`; it imports math-verify and nothing of jaxmoe. A response is a model's, and
what sympy makes of it may take any time or memory. math-verify stops after some seconds by SIGALRM, which needs a main
thread; the limits of this process, which can write no file, end what that does not stop, and another one is started.
"""

import json
import logging
import os
import resource
import sys

SECONDS = 3
"""For parsing and for comparing, each; the limit of the study's reward."""

MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Answers until there are no more questions."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # nothing that a library prints is taken for an answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import parse, verify

    logging.disable()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            true = parse(question["true"], parsing_timeout=SECONDS)
            given = parse(question["given"], parsing_timeout=SECONDS)
            equal = bool(verify(true, given, timeout_seconds=SECONDS))
        except Exception:  # whatever a model's text does to the parser, it is no right answer
            equal = False
        print("1" if equal else "0", file=answers, flush=True)


if __name__ == "__main__":
    main()
