"""Compiles the kernels of backend `cpu_native` for the processor at hand.

    python -m pallas_kernels.build_native [--compiler=clang++]

Needs a C++17 compiler (g++ 12 is known to do) and takes about 10 seconds. The library goes to
`~/.cache/pallas_kernels`, or the folder that `PALLAS_KERNELS_NATIVE` names. Nothing needs it, and nothing uses it
unless `backend="cpu_native"` is asked for.
"""

import argparse
import sys

from pallas_kernels import native


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", help="a C++17 compiler; without it $CXX, g++ or clang++")
    try:
        print(native.build(parser.parse_args().compiler))
    except (FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
