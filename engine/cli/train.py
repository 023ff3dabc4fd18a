"""`recall train`: one channel that learns, built anew or on from where it was, and published."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from engine import console
from engine.cli.build import BuildReport, run_build, show_build
from engine.cli.check import check_release, show_findings
from engine.cli.common import ConfigOption, StoreOption, settings, start_logging
from engine.core.errors import ConfigError, StateError

if TYPE_CHECKING:
    from engine.config import Config
    from engine.data.snapshot import SnapshotStore
    from engine.offline.follow import Told

Mode = Literal["full", "resume", "incremental"]


def train(
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="A channel of the configuration.")],
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="The data set: a folder of Parquet files; none with --follow."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="full: from nothing. resume: one pass over everything from the last model on. incremental: what came "
            "since the last model, embeddings of ids only."
        ),
    ] = "full",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the training instead of that of the configuration.")
    ] = None,
    params: Annotated[
        Path | None, typer.Option(help="TOML file with options per channel, as `recall tune` writes it.")
    ] = None,
    config: ConfigOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use. Default: all.")] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live/--no-live",
            help="Take in the items that the state store knows of; without, the data set is all.",
        ),
    ] = True,
    with_data: Annotated[
        bool,
        typer.Option(
            "--with-data",
            help="Write what was learnt into DIR, too: a build of the same data with the same options takes it from "
            "there, and needs neither PyTorch nor the time.",
        ),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Go on from the release in service with what users do and what is published, until SIGTERM or Ctrl-C: "
            "for channels that learn from a stream. Needs ingest.event_log.",
        ),
    ] = False,
    store: StoreOption = None,
) -> None:
    """Train one channel and put it in service; the other channels are used again where they fit.

    What is interrupted, by Ctrl-C or by force, goes on from its last epoch when the same is asked for again; with
    --follow, from its last checkpoint.
    """
    from engine.config import read_params
    from engine.online.state import open_state

    loaded, snapshots = settings(config, store)
    if params is not None:
        loaded = loaded.with_channel_options(read_params(params), params.name)
    if mode not in get_args(Mode):
        raise ConfigError(f"{mode!r} is none of {', '.join(get_args(Mode))}", "--mode")
    loaded = _trainable(loaded, channel, seed)
    if follow:
        if directory is not None or with_data or mode != "full":
            raise ConfigError(
                "goes on from the release in service: no DIR, --mode or --with-data", "--follow"
            )
        _follow(loaded, channel, snapshots, threads)
        return
    if directory is None:
        raise ConfigError("names no data set; only --follow needs none", "DIR")
    if with_data and not loaded.channel(channel)[0].learnt:
        raise ConfigError(
            f"the channel {channel!r} cannot be built from what was learnt earlier", "--with-data"
        )
    how: Mode = mode  # type: ignore[assignment]  # looked at above
    if live:
        try:
            with open_state(loaded, begin=False) as state:
                log = None if state is None else state.log
                report = run_build(loaded, directory, snapshots, [channel], threads, log, how)
        except StateError as error:
            text = f"{error}. With --no-live the build does without what was published since the data set was made"
            raise StateError(text) from error
    else:
        report = run_build(loaded, directory, snapshots, [channel], threads, mode=how)
    show_build(report)
    _show_curves(report, channel)
    if with_data:
        written = _write_beside(loaded, report, channel)
        console.output().print(f"What was learnt: {written}", markup=False, soft_wrap=True)
    show_findings(
        [each for each in check_release(loaded, snapshots, report.release) if each.severity == "error"]
    )


def _follow(config: Config, channel: str, snapshots: SnapshotStore, threads: int | None) -> None:
    """Train from the stream until told to stop."""
    from engine.offline.build import usable_cores
    from engine.offline.follow import Follower
    from engine.online.state import NONE, open_state

    start_logging()
    stop = threading.Event()
    if not config.ingest.event_log:
        raise ConfigError(
            "is off, so that there is nothing to follow: set it to true for the servers, too",
            "ingest.event_log",
        )
    with open_state(config) as state:
        if state is None or state.events is None:
            raise ConfigError(f"is {NONE!r}, and the event log is in the state store", "state.url")
        cores = threads or usable_cores()
        follower = Follower(config, channel, snapshots, state.store, state.events, cores, _say_progress)
        before = {
            number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            follower.run(stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say_progress(told: Told) -> None:
    print(
        f"{told.events:,} events  {told.events_per_second:,.0f}/s  lag {console.seconds(told.lag_seconds)} "
        f"({told.waiting:,} waiting)  {told.steps:,} steps  loss {told.loss:.3f}  "
        f"{told.assignments_per_second:,.0f} assignments/s  {told.pending:,} impressions wait for rewards"
        + (f"  {told.unknown:,} of unknown items" if told.unknown else "")
        + (f"  {told.crowded_out:,} items without embeddings of their own" if told.crowded_out else "")
        + (f"  release {told.release}" if told.release else ""),
        flush=True,
    )


def _trainable(config: Config, channel: str, seed: int | None) -> Config:
    """Return the configuration with the seed in it.

    Raises:
        ConfigError: there is no such channel, or it does not learn.
    """
    learning = [name for name in config.channels if hasattr(config.channel(name)[1], "training")]
    if channel not in learning:
        what = "does not learn" if channel in config.channels else "is not declared"
        raise ConfigError(
            f"the channel {channel!r} {what}; channels that do: {', '.join(learning) or 'none'}", "CHANNEL"
        )
    if seed is None:
        return config
    options: Any = config.channel(channel)[1]
    training = options.training.model_dump(mode="json")
    return config.with_channel_options({channel: {"training": {**training, "seed": seed}}}, "--seed")


def _write_beside(config: Config, report: BuildReport, channel: str) -> Path:
    """Write what the channel learnt into the folder of the data set; return the file."""
    from engine.data.learnt import write_learnt
    from engine.offline.build import made_of

    loaded, options = config.channel(channel)
    arrays = report.store.open(channel, report.release.snapshots[channel], verify=True).arrays
    of_training = {name: array for name, array in arrays.items() if name.startswith(loaded.learnt)}
    of_what = made_of(config, options, report.source.key)
    return write_learnt(report.dataset.path, channel, of_what, of_training)


def _show_curves(report: BuildReport, channel: str) -> None:
    """Say where the curves of the training are."""
    made = sorted(
        report.store.root.glob(f".work/{channel}-*/curves.png"), key=lambda path: path.stat().st_mtime
    )
    if made:
        console.output().print(f"Curves of the training: {made[-1]}", markup=False)
