"""The members of a study as a table for people, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from jaxmoe.scaling.status import MemberStatus

_STYLES = {"running": "cyan", "preempted": "yellow", "failed": "red", "done": "green"}


def print_status(members: Sequence[MemberStatus], *, as_json: bool = False) -> None:
    """Prints where members stand: a table, or a JSON list of `MemberStatus`."""
    if as_json:
        print(json.dumps([dataclasses.asdict(member) for member in members], indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("member", no_wrap=True)
    for name in ("step", "loss", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("last error", overflow="fold")
    for member in members:
        table.add_row(
            member.name,
            f"{member.step}/{member.steps}",
            "" if member.loss is None else f"{member.loss:.4f}",
            "" if member.tokens_per_second is None else f"{member.tokens_per_second:,.0f}",
            Text(member.state, style=_STYLES.get(member.state, "")),
            Text(member.error or ""),
        )
    # A table that is piped is cut by nobody.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
