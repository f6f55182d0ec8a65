"""One module a benchmark; each has `run() -> dict` and `describe(dict) -> str`."""
