"""`recall bench`: measure this machine. Each command prints a table, or one JSON object with `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import console
from engine.cli.build import channel_names
from engine.cli.common import ConfigOption
from engine.cli.measuring import (
    CacheOption,
    DataArgument,
    JsonOption,
    ParamsOption,
    ThreadsOption,
    configured,
    counts,
    print_json,
)
from engine.core.errors import ConfigError

NEIGHBOUR_CHANNELS = "itemcf,swing,usercf"
LARGEST = 1_000_000_000
"""Of anything that a synthetic data set has."""

ChannelsOption = Annotated[str, typer.Option(help="Channels, with commas between them.")]

app = typer.Typer(help="Measure building and answering on this machine.", no_args_is_help=True)


@app.command("build")
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
    _show_spreads(report, shown)
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
    _show_where(report)


@app.command("pipeline")
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
    _show_spreads(report, ["batch1_us", "batch8_us"])
    rows = console.table("µs per request", ("batch of 1", "right"), ("batch of 8", "right"))
    for name, alone in report["batch1_parts_us"].items():
        rows.add_row(name, f"{alone:.1f}", f"{report['batch8_parts_us'][name]:.1f}")
    console.output().print()
    console.output().print(rows)
    _show_where(report)


@app.command("serve")
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
    from engine.bench.world import made_up_world, world_of_data
    from engine.data.dataset import Dataset
    from engine.offline.cache import cached_store

    loaded = configured(config, params)
    names = list(loaded.scenes["default"].quotas) if channels is None else channel_names(loaded, channels)
    settings = Settings(
        limit, seconds, rounds, baseline, in_flight, counts(steps, "--steps", most=1024), profile
    )
    folder = cache or console.cache_folder() / "worlds"
    with console.BuildProgress() as progress, tempfile.TemporaryDirectory(prefix="recall-serve-") as own:
        if data is None:
            store = cached_store(folder, "pipeline")
            world = made_up_world(loaded, names, items, limit, store, progress)
        else:
            store = cached_store(folder, Dataset.open(data).fingerprint())
            world = world_of_data(loaded, names, data, limit, store, progress)
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
    _show_spreads(report, [name for name in shown if report[name] is not None])
    rows = console.table("", ("", "right"))
    for name in ("kernels_us", "glue_us", "half_p99_ms", "goodput_share", "overload_p99_ms", "rss_mb"):
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
    _show_where(report)


@app.command("memory")
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
    from engine.bench.world import made_up_world, world_of_data
    from engine.data.dataset import Dataset
    from engine.offline.cache import cached_store

    loaded = configured(config, params)
    names = list(loaded.scenes["default"].quotas)
    folder = cache or console.cache_folder() / "worlds"
    with console.BuildProgress() as progress:
        if data is None:
            store = cached_store(folder, "pipeline")
            world = made_up_world(loaded, names, items, 500, store, progress)
        else:
            store = cached_store(folder, Dataset.open(data).fingerprint())
            world = world_of_data(loaded, names, data, 500, store, progress)
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
    _show_where(report)


@app.command("ingest")
def bench_ingest_(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Send the interactions of this data set. Default: made-up exposures."
        ),
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=LARGEST, help="Of the made-up exposures.")] = 10_000,
    events: Annotated[int, typer.Option(min=1, max=LARGEST, help="Events per repetition.")] = 100_000,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events of a message.")] = 1000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    durability: Annotated[
        str, typer.Option(metavar="everysec|always", help="When the state store brings its log to the disk.")
    ] = "everysec",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time reporting events: over gRPC into an embedded state store, both processes of their own."""
    from engine.bench.ingest import bench_ingest

    if durability not in ("everysec", "always"):
        raise ConfigError(f"expected everysec or always, got {durability!r}", "--durability")
    always = durability == "always"
    loaded = configured(config, None)
    with console.BuildProgress() as progress:
        report = bench_ingest(loaded, data, users, events, batch, repetitions, always, progress)
    if as_json:
        print_json(report)
        return
    _show_spreads(report, ["events_per_second", "client_us", "server_us", "store_us"])
    console.output().print("The last three are CPU time per event.", style="dim")
    _show_where(report)


@app.command("scaling")
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
    _show_where(report)


@app.command("exposure")
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
    _show_spreads(report, [name for name in ("check_us", "pybloom_us") if name in report])
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
    _show_where(report)


@app.command("state")
def bench_state(
    users: Annotated[int, typer.Option(min=1, max=2000, help="Users in the store.")] = 200,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Users per read.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="How often the reads are timed.")] = 7,
    reads: Annotated[int, typer.Option(min=1, help="Reads per repetition.")] = 200,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time what reading the users of a batch costs: 200 actions, 2,000 exposures and more of each.

    A read decodes histories; `used` is with all else, which is sorted out when a channel or filter asks for it.
    """
    import tempfile

    from engine.bench.state import bench_state

    if batch > users:
        raise ConfigError(f"a batch of {batch} needs as many users, there are {users}", "--batch")
    options = configured(config, None)
    with console.BuildProgress() as progress, tempfile.TemporaryDirectory(prefix="recall-state-") as folder:
        report = bench_state(options, Path(folder), users, batch, progress, repetitions, reads)
    if as_json:
        print_json(report)
        return
    _show_spreads(
        report, ["read_us", "used_us", "fetch_us", "decode_us", "decode_used_us", "ping_us", "wall_us"]
    )
    console.output().print(f"{report['bytes_per_user']:,.0f} bytes of the store's memory per user")
    _show_where(report)


@app.command("live")
def bench_live(
    rate: Annotated[float, typer.Option(min=1, max=10_000, help="Items published a second.")] = 200.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 30.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Server processes on one state store.")] = 2,
    load: Annotated[float, typer.Option(min=0, help="Requests of other users a second, beside.")] = 20.0,
    as_json: JsonOption = False,
) -> None:
    """Serve the bundled sample, publish items, and time how soon every worker recalls each of them."""
    import tempfile

    from engine.bench.live import bench_live

    with console.BuildProgress() as progress, tempfile.TemporaryDirectory(prefix="recall-live-") as folder:
        report = bench_live(Path(folder), rate, seconds, workers, load, progress)
    if as_json:
        print_json(report)
        return
    rows = console.table("ms", *((each, "right") for each in ("p50", "p99", "max", "never seen")))
    for name, row in report["channels"].items():
        spent = (f"{row[key]:,.1f}" for key in ("p50", "p99", "max"))
        rows.add_row(f"acknowledged to recalled by {name}", *spent, f"{row['never_seen']:,}")
    for label, key in (("published to acknowledged", "acknowledged_ms"), ("Recall beside", "recall_ms")):
        rows.add_row(label, *(f"{report[key][each]:,.1f}" for each in ("p50", "p99", "max")), "")
    console.output().print(rows)
    words = f"{report['published']:,} items, {rate:g} a second, {workers} workers"
    console.output().print(words, style="dim", markup=False)
    shares = (report[f"cpu_{who}_percent"] for who in ("own", "elsewhere", "stolen"))
    own, elsewhere, stolen = ("?" if share is None else f"{share:g}" for share in shares)
    words = (
        f"meanwhile: processors {own} % ours, {elsewhere} % others', {stolen} % stolen by the host; "
        f"the longest wait of a process with nothing to do {report['largest_host_gap_ms']:g} ms; "
        f"{console.counted(report['compiled_while_serving'], 'kernel')} compiled while serving"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    _show_where(report)


@app.command("ann")
def bench_ann(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up vectors.")] = 1_000_000,
    dimension: Annotated[int, typer.Option(min=2, max=4096, help="Of the made-up vectors.")] = 64,
    vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own instead: a .npy of float32[items, dimension]."),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What they are asked for: a .npy like it.")
    ] = None,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries, where no file has them.")] = 500,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Neighbours asked for.")] = 200,
    kinds: Annotated[
        str, typer.Option(help="Kinds of index, with commas between them.")
    ] = "hnsw,hnsw_faiss,ivf_int8,ivf_flat,ivf_pq,exact",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the index, as m=32.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often the queries are timed.")] = 3,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the kinds of vector index: what they find, and the CPU time of a query alone and in a batch of 8."""
    from engine.bench import ann
    from engine.offline.build import usable_cores

    names = ann.kinds_of(kinds)
    options = ann.options_of(option or [])
    if queries is not None and vectors is None:
        raise ConfigError("means nothing without --vectors", "--queries")
    if vectors is None:
        corpus, questions = ann.made_up_vectors(items, dimension, asked)
    else:
        corpus = ann.read_vectors(vectors, "--vectors")
        questions = (
            ann.queries_near(corpus, asked) if queries is None else ann.read_vectors(queries, "--queries")
        )
    with console.BuildProgress() as progress:
        report = ann.bench_ann(
            corpus, questions, names, options, k, threads or usable_cores(), progress, repetitions
        )
    report["vectors"] = "made up" if vectors is None else vectors.name
    if as_json:
        print_json(report)
        return
    headings = ("recall", "of the worst 20th", "µs alone", "µs of 8", "build s", "bytes")
    rows = console.table("index", "setting", *((each, "right") for each in headings))
    for row in report["rows"]:
        setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
        numbers = [f"{row[key]:.4f}" for key in ("recall", "recall_p5")]
        numbers += [f"{row[key]:,.0f}" for key in ("batch1_us", "batch8_us")]
        rows.add_row(row["kind"], setting, *numbers, f"{row['build_s']:,.1f}", console.size(row["bytes"]))
    console.output().print(rows)
    words = (
        f"{report['items']:,} vectors of {report['dimension']} dimensions ({report['vectors']}), "
        f"{report['queries']:,} queries for {report['k']:,}; bytes are without the vectors; "
        f"built with {console.counted(report['threads'], 'thread')}"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    _show_where(report)


@app.command("deep-retrieval")
def bench_deep_retrieval(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up items.")] = 1_480_000,
    width: Annotated[int, typer.Option(min=2, max=65_536, help="K, nodes of a layer.")] = 100,
    depth: Annotated[int, typer.Option(min=1, max=62, help="D, layers.")] = 3,
    beam: Annotated[int, typer.Option(min=1, max=10_000, help="B, paths searched.")] = 50,
    dimension: Annotated[int, typer.Option(min=1, max=4096, help="Of the user's vector.")] = 64,
    hidden: Annotated[int, typer.Option(min=0, max=65_536, help="Hidden units of a layer; 0: none.")] = 64,
    reached: Annotated[int, typer.Option(min=1, max=LARGEST, help="Items on a user's paths, about.")] = 1500,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Items asked for.")] = 200,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries.")] = 400,
    repetitions: Annotated[int, typer.Option(min=1, help="How often they are timed.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Time the search of paths and the ranker, of random weights, against comparing every item; on one core."""
    from engine.bench import deep_retrieval

    with console.BuildProgress() as progress:
        report = deep_retrieval.bench_deep_retrieval(
            items, width, depth, beam, dimension, (hidden,) if hidden else (), reached, k, asked, repetitions, progress
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    headings = ("beam", "lists and ranker", "both", "tower besides", "all items", "times")
    rows = console.table("batch", *((each, "right") for each in headings))
    for row in report["rows"]:
        parts = [f"{row[f'{name}_us']:,.0f}" for name in ("beam", "gather", "search", "tower", "brute")]
        rows.add_row(str(row["batch"]), *parts, f"{row['ratio']:,.1f}")
    console.output().print(rows)
    words = (
        f"CPU microseconds of a request; {report['items']:,} items on {report['paths']:,} of "
        f"{report['width']}^{report['depth']} paths, a beam of {report['beam']}, which reaches "
        f"{report['reached']:,.0f} entries, {report['k']:,} asked for"
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    _show_where(report)


@app.command("streaming-vq")
def bench_streaming_vq(
    items: Annotated[int, typer.Option(min=1000, max=LARGEST, help="Made-up items.")] = 1_000_000,
    clusters: Annotated[int, typer.Option(min=2, max=1_048_576, help="K.")] = 16_384,
    rank_list: Annotated[int, typer.Option(min=1, max=1_000_000, help="Items that are ranked.")] = 5000,
    dimension: Annotated[int, typer.Option(min=1, max=4096, help="Of the clusters' vectors.")] = 64,
    rank: Annotated[str, typer.Option(metavar="KIND", help="none, two_tower or complex.")] = "two_tower",
    rank_dimension: Annotated[int, typer.Option(min=1, max=1024, help="Of the ranking step's vectors.")] = 32,
    k: Annotated[int, typer.Option(min=1, max=10_000, help="Items asked for.")] = 200,
    asked: Annotated[int, typer.Option(min=8, max=100_000, help="Queries.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="How often they are timed.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Time streaming VQ of random weights, as built and after every item has moved, and say what an item takes."""
    from engine.bench import streaming_vq

    if rank not in ("none", "two_tower", "complex"):
        raise ConfigError(f"expected none, two_tower or complex, got {rank!r}", "--rank")
    with console.BuildProgress() as progress:
        report = streaming_vq.bench_streaming_vq(
            items, clusters, rank_list, dimension, rank, rank_dimension, k, asked, repetitions, progress
        )
    if as_json:
        print_json(report)
        return
    headings = ("scores", "merge", "rank", "all three", "tower besides", "sorting all", "times")
    rows = console.table("lists", "batch", *((each, "right") for each in headings))
    for row in report["rows"]:
        parts = [f"{row[f'{name}_us']:,.0f}" for name in ("scores", "merge", "rank", "search", "tower")]
        sorting = [f"{row['sort_us']:,.0f}", f"{row['ratio']:,.0f}"] if "ratio" in row else ["", ""]
        rows.add_row(row["lists"], str(row["batch"]), *parts, *sorting)
    console.output().print(rows)
    memory = report["memory"]
    larger = memory["larger"]
    words = (
        f"CPU microseconds of a request; {report['items']:,} items in {report['clusters']:,} clusters, "
        f"{report['rank_list']:,} ranked, {report['k']:,} asked for. An assignment takes {report['assign_us']:.2f} us. "
        f"Bytes an item: {memory['index']:g} to be found, {sum(memory['mapped'].values()) - memory['index']:g} to be "
        f"ranked, {sum(memory['own'].values()):.1f} of a worker's own once it has moved; {larger['items']:,} items take "
        f"{larger['index_gib']:g}, {larger['ranking_gib']:g} and {larger['own_gib']:g} GiB."
    )
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    _show_where(report)


@app.command("sasrec")
def bench_sasrec(
    directory: DataArgument,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the log.")] = 5,
    rectools_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="An interpreter that has rectools[torch].")
    ] = None,
    width: Annotated[int, typer.Option(min=1, max=4096, help="Of vectors and layers.")] = 64,
    blocks: Annotated[int, typer.Option(min=1, max=64, help="Blocks of attention.")] = 2,
    heads: Annotated[int, typer.Option(min=1, max=64, help="Heads of each.")] = 2,
    length: Annotated[int, typer.Option(min=1, max=4096, help="Newest items that are read.")] = 200,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Inside the layers.")] = 0.2,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST, help="Users per step.")] = 128,
    rate: Annotated[float, typer.Option(min=0, max=1, help="Step size.")] = 0.001,
    seed: Annotated[int, typer.Option(min=0, help="Of both trainings.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of each training.")] = 1,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train SASRec on all but each user's newest item, beside RecTools' SASRecModel, and look for that item."""
    from engine.bench.sasrec import Settings, bench_sasrec

    settings = Settings(width, blocks, heads, length, dropout, batch, rate, epochs, seed)
    with console.BuildProgress() as progress:
        report = bench_sasrec(
            configured(config, None), directory, settings, rectools_python, threads, progress
        )
    if as_json:
        print_json(report)
        return
    names = [("HR@10", "hr", ".4f"), ("NDCG@10", "ndcg", ".4f"), ("CPU s", "cpu_s", ",.1f")]
    names += [("CPU s an epoch", "cpu_s_per_epoch", ",.2f"), ("wall s", "wall_s", ",.1f")]
    rows = console.table("", *((title, "right") for title, _, _ in names))
    for who in ("recall_engine", "rectools"):
        if who in report:
            rows.add_row(who, *(f"{report[who][key]:{form}}" for _, key, form in names))
    console.output().print(rows)
    words = ", ".join(f"{name} {value:g}" for name, value in report["settings"].items())
    console.output().print(words, style="dim", markup=False, soft_wrap=True)
    _show_where(report)


@app.command("mstep")
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
    _show_spreads(report, ["seconds"])
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
    _show_where(report)


def sizes_of(text: str) -> tuple[int, int, int]:
    """Return users, items and events of `30000x40000x800000`; ConfigError if it is not of that form."""
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise ConfigError(f"expected USERSxITEMSxEVENTS, got {text!r}", "--synthetic")
    users, items, events = (counts(part, "--synthetic", LARGEST)[0] for part in parts)
    return users, items, events


def _show_spreads(report: Mapping[str, Any], names: list[str]) -> None:
    rows = console.table("", ("median", "right"), ("min", "right"), ("max", "right"))
    for name in names:
        rows.add_row(name, *(f"{report[key]:,.3f}" for key in (name, f"{name}_min", f"{name}_max")))
    console.output().print(rows)


def _show_where(report: Mapping[str, Any]) -> None:
    commit = f", commit {report['commit']}" if report["commit"] else ""
    words = f"{report['machine']}, {report['cpus']} cores, {report['date']}{commit}"
    console.output().print(f"\n{words}", style="dim", markup=False)
