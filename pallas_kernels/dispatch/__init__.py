"""Tokens to rows grouped by expert: `api.dispatch`."""
