"""`recall bench` of requests: in the pipeline alone, through the server, and the memory of a world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine import console
from engine.cli.bench.shared import LARGEST, NEIGHBOUR_CHANNELS, ChannelsOption, show_spreads, show_where
from engine.cli.build import channel_names
from engine.cli.common import ConfigOption
from engine.cli.measuring import CacheOption, JsonOption, ParamsOption, configured, counts, print_json


def bench_pipeline(
    items: Annotated[int, typer.Option(min=100, max=LARGEST, help="Size of the catalogue.")] = 1_000_000,
    limit: Annotated[int, typer.Option(min=1, max=5000, help="Candidates asked for.")] = 300,
    channels: ChannelsOption = NEIGHBOUR_CHANNELS,
    repetitions: Annotated[int, typer.Option(min=1, help="How often the requests are timed.")] = 7,
    requests: Annotated[int, typer.Option(min=8, help="Requests per repetition and batch size.")] = 1000,
    params: ParamsOption = None,
    config: ConfigOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a request in the pipeline, without gRPC: CPU time, alone and in a batch of 8, over a made-up catalogue.

    The catalogue and its channels are kept in a cache and used again.
    """
    from engine.bench.pipeline import bench_pipeline
    from engine.offline.cache import cached_store

    loaded = configured(config, params)
    names = channel_names(loaded, channels)
    with console.BuildProgress() as progress:
        store = cached_store(cache or console.cache_folder() / "worlds", "pipeline")
        report = bench_pipeline(loaded, names, items, limit, store, progress, repetitions, requests)
    if as_json:
        print_json(report)
        return
    show_spreads(report, ["batch1_us", "batch8_us"])
    rows = console.table("µs per request", ("batch of 1", "right"), ("batch of 8", "right"))
    for name, alone in report["batch1_parts_us"].items():
        rows.add_row(name, f"{alone:.1f}", f"{report['batch8_parts_us'][name]:.1f}")
    console.output().print()
    console.output().print(rows)
    show_where(report)


def bench_serve(
    items: Annotated[
        int, typer.Option(min=100, max=LARGEST, help="Size of the made-up catalogue.")
    ] = 1_000_000,
    limit: Annotated[int, typer.Option(min=1, max=5000, help="Candidates asked for.")] = 500,
    channels: Annotated[
        str | None, typer.Option(help="Channels, with commas between them. Default: those of the scene.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Of each measurement.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often; they take turns.")] = 5,
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Unanswered requests at saturation.")] = 32,
    steps: Annotated[str, typer.Option(help="Other numbers of them.")] = "1,4,16,32,64",
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Measure the straightforward server beside, see loadtest/baseline.py."
        ),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Serve a data set instead of the made-up world.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Leave a profile of the server there: flame.svg and stacks.txt."),
    ] = None,
    params: ParamsOption = None,
    config: ConfigOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a world from one core, ask from the other, and measure throughput, latency and where the time goes."""
    import tempfile

    from engine.bench.serve import GRPC_CORE, Settings, bench_serve
    from engine.bench.world import cached_world

    loaded = configured(config, params)
    names = list(loaded.scenes["default"].quotas) if channels is None else channel_names(loaded, channels)
    settings = Settings(
        limit, seconds, rounds, baseline, in_flight, counts(steps, "--steps", most=1024), profile
    )
    folder = cache or console.cache_folder() / "worlds"
    with console.BuildProgress() as progress, tempfile.TemporaryDirectory(prefix="recall-serve-") as own:
        world = cached_world(loaded, names, items, data, limit, folder, progress)
        report = bench_serve(world, settings, Path(own), progress)
    if as_json:
        print_json(report)
        return
    shown = ["requests_per_s", "p50_ms", "p90_ms", "p99_ms", "server_cpu_us", "batch_mean"]
    shown += ["echo_requests_per_s", "echo_cpu_us", "share_of_echo"]
    shown += [
        name for name in ("baseline_requests_per_s", "baseline_cpu_us", "over_baseline") if name in report
    ]
    shown += [name for name in ("h2load_requests_per_s", "h2load_echo_requests_per_s") if name in report]
    show_spreads(report, [name for name in shown if report[name] is not None])
    rows = console.table("", ("", "right"))
    names = [
        "kernels_us",
        "glue_us",
        "half_p99_ms",
        "half_stolen_percent",
        "overload_goodput_share",
        "overload_p99_ms",
    ]
    names += ["degrading_goodput_share", "degrading_p99_ms", "rss_mb"]
    for name in names:
        rows.add_row(name, "-" if report[name] is None else f"{report[name]:,.3f}")
    console.output().print(rows)
    if "profile" in report:
        parts = console.table("µs of a request", ("", "right"))
        for name, spent in report["profile"]["places"].items():
            parts.add_row(name, f"{spent:,.1f}")
        parts.add_row(
            "gRPC's core, threads of its own", f"{report['profile']['threads'].get(GRPC_CORE, 0.0):,.1f}"
        )
        console.output().print(parts)
    rows = console.table(*((each, "right") for each in ("in flight", "requests/s", "p99 ms", "batch")))
    for row in report["concurrency"]:
        keys = ("requests_per_s", "p99_ms", "batch_mean")
        values = ("-" if row[key] is None else f"{row[key]:,.1f}" for key in keys)
        rows.add_row(str(row["in_flight"]), *values)
    console.output().print(rows)
    show_where(report)


def bench_memory_(
    items: Annotated[
        int, typer.Option(min=100, max=LARGEST, help="Size of the made-up catalogue.")
    ] = 1_000_000,
    larger: Annotated[
        int, typer.Option(min=100, max=LARGEST, help="Size to say the bytes of, too.")
    ] = 350_000_000,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure a data set instead of the made-up world.")
    ] = None,
    params: ParamsOption = None,
    config: ConfigOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what each channel takes: bytes per item and per user of its arrays, and what a worker has of its own.

    The world is that of `bench serve`, kept in the same cache.
    """
    from engine.bench.footprint import FIXED, bench_memory
    from engine.bench.world import cached_world

    loaded = configured(config, params)
    names = list(loaded.scenes["default"].quotas)
    folder = cache or console.cache_folder() / "worlds"
    with console.BuildProgress() as progress:
        world = cached_world(loaded, names, items, data, 500, folder, progress)
        report = bench_memory(world, larger, progress)
    if as_json:
        print_json(report)
        return
    rows = console.table("array", "counts for", ("MB", "right"), ("bytes each", "right"))
    for row in report["arrays"]:
        if row["counts_for"] != FIXED:
            mb, each = f"{row['bytes'] / 2**20:,.1f}", f"{row['bytes_each']:,.2f}"
            rows.add_row(f"{row['component']} {row['array']}", row["counts_for"], mb, each)
    console.output().print(rows)
    title = f"{report['items']:,} items, {report['users']:,} users"
    names_ = ("MB", "bytes an item", "bytes a user", f"GB of {larger:,} items")
    rows = console.table("files", *((each, "right") for each in names_), title=title)
    for name, sums in report["components"].items():
        values = (f"{sums['bytes'] / 2**20:,.1f}", f"{sums['per_item']:,.1f}", f"{sums['per_user']:,.1f}")
        rows.add_row(name, *values, f"{sums['larger'] / 2**30:,.1f}")
    console.output().print(rows)
    if report["own"] is not None:
        rows = console.table("a worker's own", ("MB", "right"), ("bytes an item", "right"))
        for name, part in report["own"].items():
            rows.add_row(name, f"{part['bytes'] / 2**20:,.1f}", f"{part['per_item']:,.1f}")
        console.output().print(rows)
    show_where(report)


def bench_exposure(
    items: Annotated[int, typer.Option(min=100, max=LARGEST, help="Size of the catalogue.")] = 100_000,
    candidates: Annotated[int, typer.Option(min=1, max=1_000_000, help="Checked at once.")] = 1500,
    repetitions: Annotated[int, typer.Option(min=1, help="How often the checks are timed.")] = 7,
    checks: Annotated[int, typer.Option(min=1, help="Checks per repetition.")] = 200,
    trials: Annotated[int, typer.Option(min=1, help="Users per row of the false positives.")] = 20,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the exposure check of one user's candidates, CPU time, beside pybloom-live, and count false positives."""
    from engine.bench.exposure import bench_exposure
    from engine.core.exposure import ExposureLayout

    options = configured(config, None).state.exposure
    layout = ExposureLayout(options.planned, options.bits, options.hashes)
    with console.BuildProgress() as progress:
        report = bench_exposure(layout, items, candidates, progress, repetitions, checks, trials)
    if as_json:
        print_json(report)
        return
    show_spreads(report, [name for name in ("check_us", "pybloom_us") if name in report])
    if "pybloom_us" in report:
        times = report["pybloom_us"] / report["check_us"]
        console.output().print(f"pybloom-live takes {times:,.0f} times as long.")
    else:
        console.output().print("pybloom-live is not installed: pip install 'recall-engine[pybloom]'")
    names = ("slices", "times planned", "bytes per slice", "false positives", "min", "max")
    rows = console.table(*((each, "right") for each in names))
    for row in report["false_positives"]:
        rates = (f"{row[key]:.3%}" for key in ("rate", "rate_min", "rate_max"))
        rows.add_row(str(row["slices"]), f"{row['times']:g}", f"{row['bytes']:,}", *rates)
    console.output().print()
    console.output().print(rows)
    show_where(report)
