"""`recall synth`: make a data set of any size with planted structure."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from engine import console
from engine.core.errors import ConfigError


def synth(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that is empty or does not exist yet.")
    ],
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 100_000,
    users: Annotated[int, typer.Option(help="Users.")] = 20_000,
    events: Annotated[
        int, typer.Option(help="Events: what was shown, clicked, liked and so on, each a row.")
    ] = 2_000_000,
    days: Annotated[int, typer.Option(help="Days that the events are of.")] = 30,
    interests: Annotated[
        int | None, typer.Option(help="Interests. Default: one per 100 items, at most 200.")
    ] = None,
    authors: Annotated[int | None, typer.Option(help="Authors. Default: one per 20 items.")] = None,
    cities: Annotated[
        int | None, typer.Option(help="Cities. Default: one per 100 items, at most 300.")
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            metavar="DATE", help="Day (UTC) at whose beginning the events end. Default: 2024-02-01."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same bytes.")] = 1,
) -> None:
    """Make a data set of any size whose structure is known: interests, groups, authors, cities, popularity, time.

    What was planted is written beside it, for comparing what channels find.
    """
    from engine.offline.synth import PLANTED, Plan, synthesize
    from engine.offline.synth.plan import END

    plan = Plan.of(
        items, users, events, days, interests, authors, cities, END if end is None else midnight(end), seed
    )
    began = time.perf_counter()
    with console.BuildProgress() as progress:
        dataset = synthesize(directory, plan, progress)
    spent = time.perf_counter() - began
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    out = console.output()
    rows = ", ".join(f"{count:,} {file}" for file, count in dataset.rows.items())
    out.print(
        Text(f"{rows}; {console.size(size)} in {console.seconds(spent)}, {plan.events / spent:,.0f} events/s")
    )
    out.print(Text(f"written to {directory}, what was planted to {directory / PLANTED}"))
    out.print(Text(f"`recall build {directory}` comes next"))


def midnight(text: str) -> int:
    """Return the seconds since the epoch at which a day begins; ConfigError if the text is no day."""
    try:
        day = datetime.strptime(text, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"expected a day such as 2024-02-01, got {text!r}", "--end") from error
    return int(day.replace(tzinfo=UTC).timestamp())
