"""What the commands of `recall bench` share: limits of options, and the tables that all of them print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import typer

from engine import console

NEIGHBOUR_CHANNELS = "itemcf,swing,usercf"
LARGEST = 1_000_000_000
"""Of anything that a synthetic data set has."""

ChannelsOption: TypeAlias = Annotated[str, typer.Option(help="Channels, with commas between them.")]


def show_spreads(report: Mapping[str, Any], names: list[str]) -> None:
    """Print the median, the least and the most of each number."""
    rows = console.table("", ("median", "right"), ("min", "right"), ("max", "right"))
    for name in names:
        rows.add_row(name, *(f"{report[key]:,.3f}" for key in (name, f"{name}_min", f"{name}_max")))
    console.output().print(rows)


def show_where(report: Mapping[str, Any]) -> None:
    """Print where and when a report was made."""
    commit = f", commit {report['commit']}" if report["commit"] else ""
    words = f"{report['machine']}, {report['cpus']} cores, {report['date']}{commit}"
    console.output().print(f"\n{words}", style="dim", markup=False)
