"""`recall serve`: answer the Recall RPC."""

from __future__ import annotations

from typing import Annotated

import typer

from engine import console
from engine.cli.common import ConfigOption, StoreOption, settings, start_logging
from engine.core.errors import SnapshotError


def serve(
    config: ConfigOption = None,
    store: StoreOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one. Default: server.port.")
    ] = None,
) -> None:
    """Serve the newest release that is whole, until SIGTERM or Ctrl-C; requests in flight finish."""
    from engine.online.server import run_server

    loaded, snapshots = settings(config, store)
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    loaded = loaded.model_copy(update={"server": loaded.server.model_copy(update=changes)})
    if not snapshots.release_names():
        text = "no release has been published here; `recall build DIR` makes one"
        raise SnapshotError(text, str(snapshots.root))
    start_logging()

    def ready(bound: int) -> None:
        console.output().print(f"Serving on {loaded.server.host}:{bound}. Ctrl-C stops.", soft_wrap=True)

    raise typer.Exit(run_server(loaded, snapshots, ready))
