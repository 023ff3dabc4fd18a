"""`recall inspect deep_retrieval`: how full the paths are, who is on one, where a user is led."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import console
from engine.cli.common import ConfigOption
from engine.cli.inspected import StoreArgument, batch_of, catalogue_of, opened, row_of_user, sampled, titles
from engine.cli.measuring import JsonOption, print_json
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.data.catalogue import Catalogue
    from engine.data.snapshot import Snapshot
    from engine.offline.lattice import Lattice, PathSizes, TopPath


def inspect_deep_retrieval(
    directory: StoreArgument = None,
    path: Annotated[str | None, typer.Option(metavar="36-27-20", help="Show the items of this path.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="Show the paths of this user's beam.")
    ] = None,
    beam: Annotated[int, typer.Option(min=1, max=10_000, help="Paths of a beam.")] = 50,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Rows shown at most.")] = 20,
    sample: Annotated[
        int, typer.Option(min=0, max=100_000, help="Users asked for the share of the top path; 0: none.")
    ] = 1000,
    keep: Annotated[
        int, typer.Option(min=1, max=10_000, help="Candidates that the softmax keeps for each of them.")
    ] = 200,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw how many paths have how many items.")
    ] = None,
    channel: Annotated[str, typer.Option(help="The channel's name in the release.")] = "deep_retrieval",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how full the paths are, or with --path what is on one, or with --user where a user is led.

    Of the release in service, as it was built: what was published since is on no path here, and users have the histories
    of the release.
    """
    from engine.offline.lattice import Lattice, PathSizes, TopPath, draw_sizes

    release, snapshots = opened(directory, config, channel)
    lattice = Lattice(snapshots[channel].arrays)
    catalogue = catalogue_of(snapshots)
    where = {"release": release, "channel": channel}
    if path is not None and user is not None:
        raise ConfigError("expected one of --path and --user")
    if path is not None:
        on_path = _path(lattice, catalogue, path, limit)
        if as_json:
            print_json(where | on_path)
        else:
            _show_path(on_path)
    elif user is not None:
        led = _user(lattice, catalogue, snapshots, user, beam, limit)
        if as_json:
            print_json(where | led)
        else:
            _show_user(led)
    else:
        sizes = PathSizes.of(lattice)
        asked = batch_of(catalogue, snapshots, sampled(snapshots, sample)) if sample else None
        top = (
            None if asked is None or not len(asked) else TopPath.of(lattice, lattice.users(asked), beam, keep)
        )
        if as_json:
            print_json(where | _summary(lattice, sizes, top))
        else:
            _show_sizes(lattice, sizes, top, beam)
    if picture is not None:
        draw_sizes(lattice, picture)
        if not as_json:
            console.output().print(f"Drawn: {picture}", markup=False, soft_wrap=True)


def _summary(lattice: Lattice, sizes: PathSizes, top: TopPath | None) -> dict[str, Any]:
    name = lattice.spec.name
    found = asdict(sizes) | {"fullest": name(sizes.fullest) if sizes.used else None}
    found |= {
        "width": lattice.spec.width,
        "depth": lattice.spec.depth,
        "paths_per_item": lattice.assignment.shape[1],
    }
    if top is None:
        return found | {"top_path": None}
    named = {
        "code": name(top.code) if top.code >= 0 else None,
        "kept_code": name(top.kept_code) if top.kept_code >= 0 else None,
    }
    return found | {"top_path": asdict(top) | named}


def _show_sizes(lattice: Lattice, sizes: PathSizes, top: TopPath | None, beam: int) -> None:
    out, name = console.output(), lattice.spec.name
    rows = console.table("", ("", "right"))
    rows.add_row("paths", f"{lattice.spec.width}^{lattice.spec.depth} = {sizes.paths:,}")
    rows.add_row("in use", f"{sizes.used:,}")
    rows.add_row("items on a path", f"{sizes.placed:,} of {sizes.items:,}")
    rows.add_row("paths of an item", f"{sizes.entries / sizes.placed:.2f}" if sizes.placed else "-")
    rows.add_row("items of a path, mean", f"{sizes.mean:.1f}")
    rows.add_row("50 %, 90 %, 99 % of them at most", ", ".join(f"{each:.0f}" for each in sizes.quantiles))
    if sizes.used:
        share = f"{sizes.largest_share:.2%} of the items"
        rows.add_row("the fullest", f"{name(sizes.fullest)}: {sizes.largest:,}, {share}")
    out.print(rows)
    if sizes.bins:
        out.print()
        bars = console.table(("items on a path", "right"), ("paths", "right"), ("items", "right"), "")
        most = max(each[2] for each in sizes.bins)
        for least, largest, paths, items in sizes.bins:
            bar = "#" * math.ceil(40 * paths / most)
            bars.add_row(
                str(least) if least == largest else f"{least:,} to {largest:,}",
                f"{paths:,}",
                f"{items:,}",
                bar,
            )
        out.print(bars)
    if top is not None and top.code >= 0:
        asked = console.counted(top.users, "user")
        out.print(
            f"\n{asked} with a beam of {beam:,}: {top.reached:,.0f} candidates each, {top.share:.2%} of all from "
            f"{name(top.code)};\nof the {top.kept:,.0f} that the softmax keeps, {top.kept_share:.2%} from "
            f"{name(top.kept_code)}.",
            soft_wrap=True,
        )


def _path(lattice: Lattice, catalogue: Catalogue, name: str, limit: int) -> dict[str, Any]:
    import numpy as np

    place = int(lattice.places(np.array([lattice.code_of(name)], np.int64))[0])
    if place < 0:
        raise ConfigError(
            f"no item is on {name}: {lattice.codes.size:,} of {lattice.spec.paths:,} paths are in use",
            "--path",
        )
    members = lattice.members(place)
    # Those first that the softmax thinks most likely of all, whoever asks.
    shown = members[np.argsort(-lattice.bias[members], kind="stable")[:limit]]
    others = [
        [lattice.spec.name(c) for c in lattice.assignment[row].tolist() if c >= 0] for row in shown.tolist()
    ]
    items = [
        {"item": each.id, "title": each.title, "tags": list(each.tags), "paths": paths}
        for each, paths in zip(catalogue.describe_items(shown), others, strict=True)
    ]
    return {"path": name, "size": int(members.size), "items": items}


def _show_path(found: Mapping[str, Any]) -> None:
    rows = console.table(("item", "right"), ("title", "fold"), ("tags", "fold"), ("also on", "fold"))
    for each in found["items"]:
        also = ", ".join(path for path in each["paths"] if path != found["path"])
        rows.add_row(str(each["item"]), each["title"], ", ".join(each["tags"]), also)
    out = console.output()
    out.print(f"{found['path']}: {console.counted(found['size'], 'item')}", style="bold")
    out.print(rows)


def _user(
    lattice: Lattice,
    catalogue: Catalogue,
    snapshots: Mapping[str, Snapshot],
    user: str,
    beam: int,
    limit: int,
) -> dict[str, Any]:
    import numpy as np

    batch = batch_of(catalogue, snapshots, row_of_user(catalogue, user))
    vectors = lattice.users(batch)
    codes, logs = lattice.beam(vectors, beam)
    places = lattice.places(codes[0])
    paths: list[dict[str, Any]] = []
    for code, log, place in zip(codes[0].tolist(), logs[0].tolist(), places.tolist(), strict=True):
        members = lattice.members(place) if place >= 0 else np.empty(0, np.int32)
        best = members[
            np.argsort(-(lattice.vectors[members] @ vectors[0] + lattice.bias[members]), kind="stable")[:3]
        ]
        paths.append(
            {
                "path": lattice.spec.name(code),
                "probability": math.exp(log),
                "size": int(members.size),
                "titles": titles(catalogue, best),
            }
        )
    reached, _ = lattice.reached(vectors, beam)
    return {
        "user": user,
        "history": titles(catalogue, batch.history.rows[:10]),
        "beam": len(paths),
        "probability": math.fsum(each["probability"] for each in paths),
        "candidates": int(reached.rows.size),
        "paths": paths[:limit],
    }


def _show_user(found: Mapping[str, Any]) -> None:
    out = console.output()
    newest: Sequence[str] = found["history"]
    out.print(f"newest: {'; '.join(newest) if newest else 'nothing'}", markup=False, soft_wrap=True)
    rows = console.table(
        "path", ("probability", "right"), ("items", "right"), ("the user's best of these", "fold")
    )
    for each in found["paths"]:
        rows.add_row(
            each["path"], f"{each['probability']:.4f}", f"{each['size']:,}", "; ".join(each["titles"])
        )
    out.print(rows)
    out.print(
        f"{found['beam']:,} paths of the beam have {found['probability']:.1%} of the probability and "
        f"{found['candidates']:,} candidates.",
        style="dim",
    )
