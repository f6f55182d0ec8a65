"""Rows back to tokens, weighted by the gate: `api.combine`."""
