"""What the commands of `recall inspect` share: the release in service, and words for what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from engine.cli.common import parse_id, settings
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.core.query import QueryBatch
    from engine.core.types import Int32Array
    from engine.data.catalogue import Catalogue
    from engine.data.snapshot import Snapshot

StoreArgument: TypeAlias = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", help="Folder of the snapshots. Default: store.path of the configuration."),
]


def opened(directory: Path | None, config: Path | None, channel: str) -> tuple[str, Mapping[str, Snapshot]]:
    """Return the release in service and its snapshots, by component.

    Raises:
        SnapshotError: there is no release that is whole, or it has nothing of the channel.
    """
    from engine.core.errors import SnapshotError

    _, store = settings(config, directory)
    release, snapshots, _ = store.newest_valid(verify=False)
    if channel not in snapshots:
        there = ", ".join(snapshots)
        raise SnapshotError(f"has no snapshot of {channel!r}; it has {there}", f"release {release.name}")
    return release.name, snapshots


def catalogue_of(snapshots: Mapping[str, Snapshot]) -> Catalogue:
    """Return the catalogue of a release."""
    from engine.data.catalogue import Catalogue
    from engine.data.snapshot import CATALOGUE

    return Catalogue.load(snapshots[CATALOGUE].arrays)


def sampled(snapshots: Mapping[str, Snapshot], most: int) -> Int32Array:
    """Return at most so many rows of users who have a history, always the same ones."""
    import numpy as np

    from engine.state.history import HISTORY

    users = np.flatnonzero(np.diff(snapshots[HISTORY].arrays["indptr"])).astype(np.int32)
    if users.size > most:
        users = np.sort(np.random.default_rng(1).choice(users, most, replace=False))
    return users


def batch_of(catalogue: Catalogue, snapshots: Mapping[str, Snapshot], users: Int32Array) -> QueryBatch:
    """Return the queries of some users, with the histories of the release, asked when the last of these ended."""
    from engine.data.live import LiveCatalogue
    from engine.online.hydrate import Hydrator
    from engine.online.request import Request
    from engine.state.history import HISTORY, SnapshotHistory

    live = LiveCatalogue.of(catalogue)
    arrays = snapshots[HISTORY].arrays
    hydrator = Hydrator(live.items, live.users, SnapshotHistory(arrays), live.authors, live.columns)
    now = int(arrays["timestamps"].max(initial=0))
    return hydrator([Request(user_id=each, now=now) for each in catalogue.users.ids(users).tolist()]).batch


def row_of_user(catalogue: Catalogue, text: str) -> Int32Array:
    """Return int32[1], the row of a user; ConfigError if the release does not know them."""
    import numpy as np

    strings = catalogue.users.kind == "string"
    user = parse_id(text, strings)
    known = isinstance(user, str) if strings else isinstance(user, int) and 0 <= user < 2**63
    rows = catalogue.users.rows(np.array([user])) if known else np.empty(0, np.int32)
    if not (rows >= 0).any():
        raise ConfigError(f"the release knows no user {text!r}", "--user")
    return rows


def titles(catalogue: Catalogue, rows: Int32Array) -> list[str]:
    """Return what items are called: the title, else the id."""
    return [each.title or str(each.id) for each in catalogue.describe_items(rows)]
