"""`recall build`: a data set in, a release out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine import console
from engine.cli.check import check_release, show_findings
from engine.cli.common import ConfigOption, StoreOption, offset_time, settings
from engine.core.errors import ConfigError, StateError

if TYPE_CHECKING:
    from engine.config import Config
    from engine.core.channel import BuildMode
    from engine.data.dataset import Dataset
    from engine.data.snapshot import Release, SnapshotStore
    from engine.offline.build import Source
    from engine.state.log import LiveLog


def build(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data set: a folder of Parquet files.")
    ],
    config: ConfigOption = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Build these anew, built before or not; commas between them. The others are used again where they fit."
        ),
    ] = None,
    params: Annotated[
        Path | None, typer.Option(help="TOML file with options per channel, as `recall tune` writes it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use. Default: all.")] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live/--no-live",
            help="Take in the items that the state store knows of; without, the data set is all.",
        ),
    ] = True,
    store: StoreOption = None,
) -> None:
    """Build the channels from a data set and put them in service as one release.

    What an earlier build made of the same data, options and code is used again.
    """
    from engine.config import read_params
    from engine.online.state import open_state

    loaded, snapshots = settings(config, store)
    if params is not None:
        loaded = loaded.with_channel_options(read_params(params), params.name)
    names = None if channels is None else channel_names(loaded, channels)
    if live:
        try:
            with open_state(loaded, begin=False) as state:
                log = None if state is None else state.log
                report = run_build(loaded, directory, snapshots, names, threads, log)
        except StateError as error:
            text = f"{error}. With --no-live the build does without what was published since the data set was made"
            raise StateError(text) from error
    else:
        report = run_build(loaded, directory, snapshots, names, threads)
    show_build(report)
    # A release of some channels only is what was asked for, but a server may want the others.
    show_findings(
        [each for each in check_release(loaded, snapshots, report.release) if each.severity == "error"]
    )


class BuildReport:
    """What a build did, for people to look at."""

    def __init__(
        self,
        dataset: Dataset,
        source: Source,
        store: SnapshotStore,
        release: Release,
        before: dict[str, set[str]],
        spent: float,
    ) -> None:
        self.dataset = dataset
        self.source = source
        self.store = store
        self.release = release
        self.spent = spent
        self.reused = {
            name for name, version in release.snapshots.items() if version in before.get(name, set())
        }


def run_build(
    config: Config,
    directory: Path,
    store: SnapshotStore,
    channels: list[str] | None = None,
    threads: int | None = None,
    live_log: LiveLog | None = None,
    mode: BuildMode = "full",
) -> BuildReport:
    """Build with a progress bar and return what was done; errors as `build_release` and `Dataset.open`."""
    from engine.data.dataset import Dataset
    from engine.data.snapshot import CATALOGUE
    from engine.offline.build import build_release
    from engine.state.history import HISTORY

    began = time.monotonic()
    before = {name: set(store.versions(name)) for name in (CATALOGUE, HISTORY, *config.channels)}
    with console.BuildProgress() as progress:
        progress.start("checking", 1)
        dataset = Dataset.open(directory)
        progress.advance()
        release, source = build_release(config, dataset, store, progress, channels, threads, live_log, mode)
    return BuildReport(dataset, source, store, release, before, time.monotonic() - began)


def show_build(report: BuildReport) -> None:
    """Print a row per component, and everything that the build took in besides or left out."""
    from engine.state.log import START

    out = console.output()
    rows = console.table("component", "", ("arrays", "right"), ("size", "right"), "version")
    whole = 0
    for name, version in report.release.snapshots.items():
        files = report.store.manifest(name, version).files.values()
        bytes_ = sum(file.bytes for file in files)
        whole += bytes_
        how = "reused" if name in report.reused else "built"
        rows.add_row(name, how, str(len(files)), console.size(bytes_), version)
    out.print(rows)
    liked = report.source.liked
    out.print(
        f"\n{console.counted(report.dataset.rows['interactions'], 'event')} of "
        f"{console.counted(liked.users, 'user')} and {console.counted(liked.items, 'item')}: "
        f"{console.counted(liked.entries, '(user, item) pair')} of interest."
    )
    for kind, count in report.source.ignored.items():
        out.print(f"  left out: {count:,} {kind!r} events, which have no points in \\[interest]")
    if report.source.log_offset != START:
        out.print(
            f"  taken in: what the live log says of items until {offset_time(report.source.log_offset)} UTC"
        )
    for column in report.source.catalogue.skipped:
        out.print(f"  left out: column {column!r} of items.parquet, whose type has no place in the catalogue")
    out.print(
        f"\nRelease {report.release.name} is in service: {console.size(whole)} in {report.store.root}, "
        f"made in {console.seconds(report.spent)}."
    )


def channel_names(config: Config, text: str) -> list[str]:
    """Return the channels of a comma-separated list.

    Raises:
        ConfigError: one of them is not declared.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in config.channels:
            raise ConfigError(
                f"no channel is called {name!r}; known: {', '.join(config.channels)}", "--channels"
            )
    if not names:
        raise ConfigError("names no channel", "--channels")
    return names
