"""`recall bench` of live state: reports coming in, and what requests read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine import console
from engine.cli.bench.shared import LARGEST, show_spreads, show_where
from engine.cli.common import ConfigOption
from engine.cli.measuring import JsonOption, configured, print_json
from engine.core.errors import ConfigError


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
    show_spreads(report, ["events_per_second", "client_us", "server_us", "store_us"])
    console.output().print("The last three are CPU time per event.", style="dim")
    show_where(report)


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
    show_spreads(
        report, ["read_us", "used_us", "fetch_us", "decode_us", "decode_used_us", "ping_us", "wall_us"]
    )
    console.output().print(f"{report['bytes_per_user']:,.0f} bytes of the store's memory per user")
    show_where(report)


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
    show_where(report)
