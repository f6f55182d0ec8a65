"""Command-line entry points: `python -m experiments.run`, `.report`, `.data`, `.benchmark`; configs in `configs/`."""
