"""`recall releases`: what is there, what is in service, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine import console
from engine.cli.common import ConfigOption, StoreOption, offset_time, settings

app = typer.Typer(help="List the releases of a store, or go back to one.", no_args_is_help=True)


@app.command("list")
def list_releases(config: ConfigOption = None, store: StoreOption = None) -> None:
    """List the releases, newest first; the one in service is marked."""
    from engine.core.errors import SnapshotError
    from engine.data.snapshot import CATALOGUE

    _, snapshots = settings(config, store)
    names = snapshots.release_names()
    if not names:
        raise SnapshotError(
            "no release has been published here; `recall build` makes one", str(snapshots.root)
        )
    current = snapshots.current()
    rows = console.table("", "release", "made (UTC)", "live items until (UTC)", ("components", "fold"))
    for name in names:
        mark = "in service" if current is not None and name == current.name else ""
        try:
            release = snapshots.release(name)
            offset = snapshots.manifest(CATALOGUE, release.snapshots.get(CATALOGUE, "")).log_offset
            made = release.created[:19].replace("T", " ")
            rows.add_row(mark, name, made, offset_time(offset), ", ".join(release.snapshots))
        except SnapshotError as error:
            rows.add_row(mark, name, "damaged", "", str(error))
    console.output().print(rows)


@app.command("rollback")
def rollback(
    name: Annotated[
        str | None, typer.Argument(help="Which release. Default: the one before the one in service.")
    ] = None,
    config: ConfigOption = None,
    store: StoreOption = None,
) -> None:
    """Put an earlier release back in service; running servers take it without a restart."""
    _put_in_service(name, config, store)


def publish(
    name: Annotated[str, typer.Argument(help="Which release.")],
    config: ConfigOption = None,
    store: StoreOption = None,
) -> None:
    """Put a release in service, an earlier or a later one; running servers take it without a restart."""
    _put_in_service(name, config, store)


def _put_in_service(name: str | None, config: Path | None, store: Path | None) -> None:
    _, snapshots = settings(config, store)
    release = snapshots.rollback(name)
    console.output().print(f"Release {release.name} is in service.")
