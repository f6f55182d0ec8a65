"""Experiment files. Each docstring gives the command, what it shows, the expected result and the time it takes."""
