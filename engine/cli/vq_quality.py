"""`recall bench streaming-vq-quality` and `streaming-vq-drift`: what streaming VQ finds, how even its clusters are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from engine import console
from engine.cli.common import ConfigOption
from engine.cli.measuring import (
    CacheOption,
    DataArgument,
    JsonOption,
    ParamsOption,
    ProtocolOption,
    configured,
    counts,
    print_json,
    protocol_of,
)
from engine.core.errors import ConfigError


def bench_vq_quality(
    directory: DataArgument,
    protocol: ProtocolOption = None,
    part: Annotated[
        str, typer.Option(metavar="test|validation", help="`validation` to choose by, `test` to report.")
    ] = "validation",
    at: Annotated[str, typer.Option(help="Lengths K of the lists, with commas between them.")] = "50,200",
    seeds: Annotated[
        str | None,
        typer.Option(help="Train with each of these seeds, as 1,2,3. Default: those of the options."),
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Take the parts of streaming VQ away one by one instead.")
    ] = False,
    rows: Annotated[
        str | None, typer.Option(help="Which ablations, with semicolons between them. Default: all.")
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only so many users, drawn at random, the same ones each time. Default: all."
        ),
    ] = None,
    orders: Annotated[
        str,
        typer.Option(
            metavar="time|shuffled|both", help="Orders in which the other two channels' passes are done."
        ),
    ] = "both",
    params: ParamsOption = None,
    config: ConfigOption = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Cores to use.")] = 1,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare streaming VQ with a two-tower model behind HNSW and Deep Retrieval, at rank lists of the same length."""
    from engine.bench.vq_quality import ORDERS, PATHS, VECTORS, VQ, ablate, compare
    from engine.cli.evaluate import part_of
    from engine.data.dataset import Dataset
    from engine.offline.cache import cached_store

    chosen = [order for order in ORDERS if orders in (order, "both")]
    if not chosen:
        raise ConfigError(f"must be one of time, shuffled, both, not {orders!r}", "--orders")
    loaded = configured(config, params)
    missing: dict[str, dict[str, Any]] = {
        name: {} for name in (VQ, PATHS, VECTORS) if name not in loaded.channels
    }
    loaded = loaded.with_channel_options(missing) if missing else loaded
    cuts, drawn = counts(at, "--at"), [] if seeds is None else counts(seeds, "--seeds")
    with console.BuildProgress() as progress:
        progress.start("checking", 1)
        dataset = Dataset.open(directory)
        progress.advance()
        how = protocol_of(dataset, protocol)
        if ablations:
            names = [] if rows is None else [name.strip() for name in rows.split(";") if name.strip()]
            report = ablate(loaded, dataset, how, part_of(part), cuts, drawn, names, progress, threads, users)
        else:
            store = cached_store(cache or console.cache_folder() / "evaluations", dataset.fingerprint())
            report = compare(
                loaded, dataset, how, part_of(part), cuts, drawn, store, progress, threads, users, chosen
            )
    if as_json:
        print_json(report)
        return
    _show(report, ablations)


def bench_vq_drift(
    users: Annotated[int, typer.Option(min=100, max=1_000_000, help="Made-up users.")] = 2000,
    items: Annotated[int, typer.Option(min=100, max=1_000_000, help="Made-up items.")] = 2000,
    clusters: Annotated[int, typer.Option(min=2, max=65_536, help="K.")] = 128,
    rate: Annotated[int, typer.Option(min=1, max=1_000_000, help="Impressions a minute.")] = 6000,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the items that change.")] = 0.4,
    warm_up: Annotated[int, typer.Option(min=1, max=10_000, help="Minutes before the change.")] = 20,
    seeds: Annotated[str, typer.Option(help="A world and a training each.")] = "1,2,3",
    as_json: JsonOption = False,
) -> None:
    """Change a planted world in mid-stream, under streaming VQ and under an index that is rebuilt nightly."""
    from engine.bench.vq_drift import BACK, BEST, bench_drift
    from engine.models.streaming_options import StreamingOptions

    drawn = counts(seeds, "--seeds")
    with console.BuildProgress() as progress:
        report = bench_drift(
            users, items, clusters, rate, share, warm_up, drawn, StreamingOptions(), progress
        )
    if as_json:
        print_json(report)
        return
    table = console.table(("minute", "right"), ("streaming VQ", "right"), ("as last night", "right"))
    for row in report["rows"]:
        cells = (f"{row[name]:.3f} ±{row[f'{name}_sd']:.3f}" for name in ("live", "frozen"))
        table.add_row(str(row["minute"]), *cells)
    out = console.output()
    out.print(table)
    out.print(
        f"Share of the {BEST} best that are of the user's interest; {report['before']:.3f} before. Back at {BACK:.0%} "
        f"of that after {', '.join(str(each) for each in report['back'])} minutes.",
        soft_wrap=True,
    )


def _show(report: Mapping[str, Any], ablations: bool) -> None:
    out = console.output()
    several = len(report["seeds"]) > 1

    def cell(row: Mapping[str, Any], name: str, form: str = ".4f") -> str:
        return f"{row[name]:{form}}" + (f" ±{row[f'{name}_sd']:{form}}" if several else "")

    out.print(f"{report['protocol']}, {report['part']}: {report['statement']}.", soft_wrap=True)
    found = [f"{metric}@{k}" for k in report["at"] for metric in ("recall", "tail")]
    if not ablations:
        table = console.table(
            "channel", "order", ("items ranked", "right"), *((name, "right") for name in found)
        )
        for row in report["rows"]:
            ranked = f"{row['rank_list']:,.0f}" if row["rank_list"] else ""
            table.add_row(row["channel"], row["order"], ranked, *(cell(row, name) for name in found))
        out.print(table)
        balance = report["balance"]
        out.print(
            f"Clusters: fullest {balance['largest']:.2%} of the items, p99 {balance['spread']:.1f} times the median, "
            f"{balance['empty']:.1%} empty.",
            soft_wrap=True,
        )
        return
    exact = [f"exact_recall@{k}" for k in report["at"]]
    names = [
        *found,
        *(name.replace("_recall", "") for name in exact),
        "fullest",
        "p99 / p50",
        "empty",
        "stale",
        "tail",
    ]
    table = console.table("", *((name, "right") for name in names))
    for row in report["rows"]:
        shares = [cell(row, name, ".1%") for name in ("empty", "stale", "tail_stale")]
        table.add_row(
            row["name"], *(cell(row, name) for name in (*found, *exact)),
            cell(row, "largest", ".2%"), cell(row, "spread", ".1f"), *shares,
        )  # fmt: skip
    out.print(table)
