"""`recall inspect streaming_vq`: how full the clusters are, who is in one, and what moved in the last hour."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import console
from engine.cli.common import ConfigOption, settings
from engine.cli.inspected import StoreArgument, catalogue_of, opened
from engine.cli.measuring import JsonOption, print_json
from engine.core.errors import SnapshotError, StateError

if TYPE_CHECKING:
    from engine.config import Config
    from engine.data.live import LiveCatalogue
    from engine.data.snapshot import Snapshot
    from engine.offline.clusters import Clusters, ClusterSizes, Moves
    from engine.state.store import StateStore

NEIGHBOURS = 5
"""Clusters named that are nearest to the one that is shown."""

_READ_AT_ONCE = 1000


def inspect_streaming_vq(
    directory: StoreArgument = None,
    cluster: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Show the items of this cluster.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=100_000, help="How far to look back for assignments that moved.")
    ] = 60.0,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Items shown at most.")] = 20,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the clusters on a plane, coloured by size, and how many are how large."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live/--no-live",
            help="Look at what a trainer has assigned since, in the state store; without, at the release alone.",
        ),
    ] = True,
    channel: Annotated[str, typer.Option(help="The channel's name in the release.")] = "streaming_vq",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how full the clusters are and what moved between them, or with --cluster what is in one.

    Of the release in service, with what a trainer has assigned since where there is a state store.
    """
    from engine.data.live import LiveCatalogue
    from engine.offline.clusters import Clusters, ClusterSizes, draw_clusters

    loaded, _ = settings(config, directory)
    release, snapshots = opened(directory, config, channel)
    clusters, catalogue = Clusters(snapshots[channel].arrays), LiveCatalogue.of(catalogue_of(snapshots))
    if clusters.assignment.size != len(catalogue.items):
        raise SnapshotError("the model and the catalogue are of different items", f"release {release}")
    since = Since(None, "the release alone, as --no-live says")
    if live:
        since = read_since(loaded, channel, snapshots, clusters, catalogue, minutes)
    found: dict[str, Any] = {"release": release, "channel": channel, "live": since.note or None}
    if cluster is not None:
        members = _cluster(clusters, catalogue, cluster, limit)
        found |= members
    else:
        sizes = ClusterSizes.of(clusters)
        found |= asdict(sizes) | {"moves": None if since.moves is None else asdict(since.moves)}
    if picture is not None:
        draw_clusters(clusters, picture)
    if as_json:
        print_json(found)
        return
    if cluster is not None:
        _show_cluster(members)
    else:
        _show_sizes(sizes)
        _show_moves(since)
    if picture is not None:
        console.output().print(f"Drawn: {picture}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Since:
    """What a trainer did since the release.

    Attributes:
        moves: in the time that was asked for; None where nobody says.
        note: why nobody does; "" where somebody does.
    """

    moves: Moves | None
    note: str = ""


def read_since(
    config: Config,
    channel: str,
    snapshots: Mapping[str, Snapshot],
    clusters: Clusters,
    catalogue: LiveCatalogue,
    minutes: float,
) -> Since:
    """Move the items of a release to where the assignment log has them now, and say what moved.

    Args:
        config: names the state store.
        channel: in the release.
        snapshots: of the release.
        clusters: of its model; changed in place.
        catalogue: of the release; takes in what was published since.
        minutes: to look back.
    """
    from engine.online.state import open_state

    try:
        with open_state(config, begin=False) as state:
            if state is None:
                return Since(None, "there is no state store: the release alone, and nobody says what moved")
            return _read_log(state.store, channel, snapshots, clusters, catalogue, minutes)
    except StateError as error:
        return Since(None, f"the release alone, and nobody says what moved: {error}")


def _read_log(
    store: StateStore,
    channel: str,
    snapshots: Mapping[str, Snapshot],
    clusters: Clusters,
    catalogue: LiveCatalogue,
    minutes: float,
) -> Since:
    import numpy as np

    from engine.data.changes import ItemChanges
    from engine.data.snapshot import CATALOGUE
    from engine.offline.clusters import Moves
    from engine.offline.follow_files import position_of
    from engine.state.assignments import AssignedItems, AssignmentLog
    from engine.state.log import LiveLog
    from engine.state.stream import offset_key

    log, held = AssignmentLog(store, channel), position_of(snapshots[channel])
    run = log.run()
    if run != held.run:
        said = (
            "no trainer has written to its assignment log"
            if not run
            else f"the assignment log is of run {run}"
        )
        return Since(None, f"{said}: the release alone, of run {held.run}, and nobody says what moved")
    there = np.flatnonzero(clusters.assignment >= 0)
    known = AssignedItems(
        catalogue.columns.keys[there].copy(), clusters.assignment[there], clusters.bias[there]
    )
    news, offset = LiveLog(store), snapshots[CATALOGUE].manifest.log_offset
    parts = (
        news.table() if news.missed(offset) else (values for values, _ in news.replay(offset, _READ_AT_ONCE))
    )
    for values in parts:
        catalogue.apply(ItemChanges.parse(values, catalogue.id_type))
    keys = catalogue.columns.keys
    order = np.argsort(keys, kind="stable")
    for part in log.table():
        items = part.newest()
        place = np.minimum(np.searchsorted(keys, items.keys, sorter=order), max(keys.size - 1, 0))
        rows = order[place].astype(np.int32)
        mine = keys[rows] == items.keys
        clusters.put(rows[mine], items.clusters[mine], items.biases[mine])
    now = log.clock()
    return Since(Moves.of(log.entries(run), known, offset_key(held.offset)[0], now, minutes))


def _cluster(clusters: Clusters, catalogue: LiveCatalogue, cluster: int, limit: int) -> dict[str, Any]:
    members = clusters.members(cluster)
    shown = members[:limit]
    items = [
        {"item": each.id, "title": each.title, "tags": list(each.tags), "bias": round(float(bias), 4)}
        for each, bias in zip(catalogue.describe_items(shown), clusters.bias[shown], strict=True)
    ]
    nearest = clusters.nearest(cluster, NEIGHBOURS)
    return {"cluster": cluster, "size": int(members.size), "nearest": nearest, "items": items}


def _show_cluster(found: Mapping[str, Any]) -> None:
    rows = console.table(("item", "right"), ("title", "fold"), ("tags", "fold"), ("bias", "right"))
    for each in found["items"]:
        rows.add_row(str(each["item"]), each["title"], ", ".join(each["tags"]), f"{each['bias']:.3f}")
    out = console.output()
    out.print(f"cluster {found['cluster']}: {console.counted(found['size'], 'item')}", style="bold")
    out.print(rows)
    out.print(f"nearest clusters: {', '.join(map(str, found['nearest']))}", style="dim")


def _show_sizes(sizes: ClusterSizes) -> None:
    out = console.output()
    rows = console.table("", ("", "right"))
    empty = sizes.clusters - sizes.used
    rows.add_row("clusters", f"{sizes.clusters:,}")
    rows.add_row("empty", f"{empty:,}, {empty / sizes.clusters:.1%}")
    rows.add_row("items in a cluster", f"{sizes.placed:,} of {sizes.items:,}")
    rows.add_row("items of a cluster, mean", f"{sizes.mean:.1f}")
    rows.add_row("50 %, 90 %, 99 % of them at most", ", ".join(f"{each:.0f}" for each in sizes.quantiles))
    rows.add_row("99 % over 50 %", "-" if sizes.spread is None else f"{sizes.spread:.1f}")
    rows.add_row("variance over mean; 1 is a random hash", f"{sizes.dispersion:.1f}")
    share = f"{sizes.largest_share:.2%} of the items"
    rows.add_row("the fullest", f"{sizes.fullest}: {console.counted(sizes.largest, 'item')}, {share}")
    out.print(rows)
    out.print()
    bars = console.table(("items of a cluster", "right"), ("clusters", "right"), ("items", "right"), "")
    most = max(each[2] for each in sizes.bins)
    for least, largest, clusters, items in sizes.bins:
        span = str(least) if least == largest else f"{least:,} to {largest:,}"
        bars.add_row(span, f"{clusters:,}", f"{items:,}", "#" * math.ceil(40 * clusters / most))
    out.print(bars)


def _show_moves(since: Since) -> None:
    out, moves = console.output(), since.moves
    out.print()
    if moves is None:
        out.print(f"{since.note[0].upper()}{since.note[1:]}.", markup=False, soft_wrap=True)
        return
    span = f"the last {moves.minutes:g} minutes"
    if not moves.assignments:
        ago = console.seconds(max(0.0, time.time() - moves.newest_ms / 1000))
        newest = f"; the newest one is of {ago} ago" if moves.newest_ms else ""
        out.print(f"Nothing was assigned in {span}{newest}.", soft_wrap=True)
        return
    out.print(
        f"In {span}: {console.counted(moves.assignments, 'assignment')} of {console.counted(moves.items, 'item')}, "
        f"{moves.first:,} of them in a cluster for the first time;\n"
        f"{console.counted(moves.moves, 'move')} of {console.counted(moves.moved, 'item')}, of which {moves.away:,} are"
        " elsewhere now than they were.\n",
        soft_wrap=True,
    )
    rows = console.table(("minutes ago", "right"), ("assignments", "right"), ("moves", "right"), "")
    most, width = max(1, *(moved for _, moved in moves.parts)), moves.minutes / len(moves.parts)
    for at, (assigned, moved) in enumerate(moves.parts):
        ends = (moves.minutes - at * width, moves.minutes - (at + 1) * width)
        rows.add_row(
            f"{ends[0]:.3g} to {ends[1]:.3g}",
            f"{assigned:,}",
            f"{moved:,}",
            "#" * math.ceil(40 * moved / most),
        )
    out.print(rows)
    if moves.flows:
        flows = ", ".join(f"{came} to {went}: {count:,}" for came, went, count in moves.flows)
        out.print(f"\nmost between the clusters {flows}", style="dim", soft_wrap=True)
