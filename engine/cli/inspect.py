"""`recall inspect`: what a channel has learnt, as a store of snapshots has it. A command for each kind of channel."""

from __future__ import annotations

import typer

from engine.cli.inspect_clusters import inspect_streaming_vq
from engine.cli.inspect_paths import inspect_deep_retrieval

app = typer.Typer(help="Look into what a channel has learnt.", no_args_is_help=True)
app.command("deep_retrieval")(inspect_deep_retrieval)
app.command("streaming_vq")(inspect_streaming_vq)


@app.callback()
def inspect() -> None:
    """Look into what a channel has learnt."""
