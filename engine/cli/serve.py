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
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes. Default: server.workers.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen without TLS where others can connect, too.")
    ] = False,
) -> None:
    """Serve the newest release that is whole, until SIGTERM or Ctrl-C; requests in flight finish."""
    from engine.config import default_config_path
    from engine.online.security import check_address
    from engine.online.supervisor import run_supervisor

    loaded, snapshots = settings(config, store)
    document = (config or default_config_path()).read_text("utf-8")
    given = (("host", host), ("port", port), ("workers", workers), ("insecure", insecure or None))
    changes = {name: value for name, value in given if value is not None}
    loaded = loaded.model_copy(update={"server": loaded.server.model_copy(update=changes)})
    check_address(loaded)
    if not snapshots.release_names():
        text = "no release has been published here; `recall build DIR` makes one"
        raise SnapshotError(text, str(snapshots.root))
    start_logging()

    def ready(bound: int) -> None:
        where = f"{loaded.server.host}:{bound}"
        count = console.counted(loaded.server.workers, "worker")
        console.output().print(f"Serving on {where} with {count}. Ctrl-C stops.", soft_wrap=True)

    raise typer.Exit(run_supervisor(loaded, document, ready))
