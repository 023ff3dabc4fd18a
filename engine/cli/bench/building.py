"""`recall bench` of builds: what they take in time and memory, and how that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine import console
from engine.cli.bench.shared import LARGEST, NEIGHBOUR_CHANNELS, ChannelsOption, show_spreads, show_where
from engine.cli.build import channel_names
from engine.cli.common import ConfigOption
from engine.cli.measuring import JsonOption, ParamsOption, ThreadsOption, configured, counts, print_json
from engine.core.errors import ConfigError


def bench_build(
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A data set.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(metavar="USERSxITEMSxEVENTS", help="A made-up one, as 30000x40000x800000.")
    ] = None,
    channels: ChannelsOption = NEIGHBOUR_CHANNELS,
    repetitions: Annotated[int, typer.Option(min=1, help="Builds counted of each; they take turns.")] = 5,
    neighbours: Annotated[
        int, typer.Option(min=1, max=10_000, help="Neighbours kept in the comparison.")
    ] = 50,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run implicit's CosineRecommender beside ItemCF.")
    ] = True,
    params: ParamsOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the builds of channels, beside implicit's, and measure what memory they need."""
    from engine.bench.build import bench_build, load_likes
    from engine.offline.synthetic import synthetic_interactions

    loaded = configured(config, params)
    names = channel_names(loaded, channels)
    sizes = None if synthetic is None else sizes_of(synthetic)
    if (data is None) == (sizes is None):
        raise ConfigError("expected one of --data DIR and --synthetic USERSxITEMSxEVENTS")
    with console.BuildProgress() as progress:
        progress.start("reading", 1)
        liked = load_likes(loaded, data) if data is not None else synthetic_interactions(*sizes or ())
        progress.advance()
        report = bench_build(loaded, liked, names, repetitions, neighbours, progress, compare, threads)
    if as_json:
        print_json(report)
        return
    shown = [f"{name}_s" for name in names]
    if compare:
        shown += ["itemcf_cosine_s", "implicit_cosine_s", "itemcf_over_implicit"]
    show_spreads(report, shown)
    if compare:
        share = report["neighbours_equal_share"]
        console.output().print(f"{share:.2%} of itemcf's {neighbours} neighbours are implicit's too.")
    rows = console.table(
        "MB", *((each, "right") for each in ("input", "output", "added", "promised", "process"))
    )
    for name in names:
        memory = report[f"memory_{name}"]
        keys = ("input_csr_mb", "output_mb", "added_with_input_mb", "promised_mb", "peak_rss_mb")
        rows.add_row(name, *(f"{memory[key]:,.1f}" for key in keys))
    console.output().print()
    console.output().print(rows)
    show_where(report)


def bench_scaling(
    channel: Annotated[str, typer.Option(help="Which channel.")] = "swing",
    users: Annotated[int, typer.Option(min=1, max=LARGEST, help="At step 1.")] = 30_000,
    items: Annotated[int, typer.Option(min=1, max=LARGEST, help="At every step.")] = 40_000,
    events: Annotated[int, typer.Option(min=1, max=LARGEST, help="At step 1.")] = 800_000,
    steps: Annotated[str, typer.Option(help="Multiples of users and events.")] = "1,2,4,8",
    repetitions: Annotated[int, typer.Option(min=1, help="Builds per step.")] = 5,
    params: ParamsOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time one channel's build while made-up users and events grow together: linear or not."""
    from engine.bench.build import bench_scaling

    loaded = configured(config, params)
    (name,) = channel_names(loaded, channel.replace(",", " "))
    multiples = counts(steps, "--steps", most=10_000)
    with console.BuildProgress() as progress:
        report = bench_scaling(loaded, name, users, items, events, multiples, progress, repetitions, threads)
    if as_json:
        print_json(report)
        return
    names = ("times", "entries", "s", "min", "max", "µs per entry", "over first")
    rows = console.table(*((each, "right") for each in names), title=f"{name} over {items:,} items")
    for row in report["curve"]:
        seconds = (f"{row[key]:.3f}" for key in ("s", "s_min", "s_max"))
        rows.add_row(
            str(row["times"]),
            f"{row['entries']:,}",
            *seconds,
            str(row["us_per_entry"]),
            str(row["over_first"]),
        )
    console.output().print(rows)
    show_where(report)


def bench_mstep(
    items: Annotated[int, typer.Option(min=10, max=LARGEST, help="Of a made-up catalogue.")] = 1_000_000,
    per_item: Annotated[int, typer.Option(min=1, max=100, help="J, paths of an item.")] = 3,
    kept: Annotated[int, typer.Option(min=1, max=1000, help="S, scored paths of an item.")] = 20,
    width: Annotated[int, typer.Option(min=2, max=65_536, help="K, nodes of a layer.")] = 100,
    depth: Annotated[int, typer.Option(min=1, max=62, help="D, layers.")] = 3,
    penalty: Annotated[float, typer.Option(min=0, help="alpha.")] = 3e-7,
    passes: Annotated[int, typer.Option(min=1, max=100, help="Over the items.")] = 4,
    repetitions: Annotated[int, typer.Option(min=1, help="How often it is timed.")] = 3,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the M-step of Deep Retrieval on made-up scores, and compare path sizes with those without a penalty."""
    from engine.bench.assignment import bench_mstep
    from engine.offline.build import usable_cores

    with console.BuildProgress() as progress:
        report = bench_mstep(
            items,
            per_item,
            kept,
            width,
            depth,
            penalty,
            passes,
            threads or usable_cores(),
            progress,
            repetitions,
        )
    if as_json:
        print_json(report)
        return
    show_spreads(report, ["seconds"])
    names = ("penalty", "items on the fullest path", "share", "paths in use", "items of a path")
    rows = console.table(*((each, "right") for each in names))
    for row in report["rows"]:
        numbers = (
            f"{row['largest']:,}",
            f"{row['largest_share']:.4%}",
            f"{row['paths']:,}",
            f"{row['mean_size']:.2f}",
        )
        rows.add_row(f"{row['penalty']:g}", *numbers)
    console.output().print(rows)
    words = (
        f"{report['items']:,} items, J {report['per_item']}, S {report['kept']}, K {report['width']}, "
        f"D {report['depth']}; the last of {report['passes']} passes changed {report['moved']:.3%} of the items; "
        f"{console.counted(report['threads'], 'thread')}"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    show_where(report)


def sizes_of(text: str) -> tuple[int, int, int]:
    """Return users, items and events of `30000x40000x800000`; ConfigError if it is not of that form."""
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise ConfigError(f"expected USERSxITEMSxEVENTS, got {text!r}", "--synthetic")
    users, items, events = (counts(part, "--synthetic", LARGEST)[0] for part in parts)
    return users, items, events
