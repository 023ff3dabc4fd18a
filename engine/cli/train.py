"""`recall train`: one channel that learns, built anew or on from where it was, and published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from engine import console
from engine.cli.build import BuildReport, run_build, show_build
from engine.cli.check import check_release, show_findings
from engine.cli.common import ConfigOption, StoreOption, settings
from engine.core.errors import ConfigError, StateError

if TYPE_CHECKING:
    from engine.config import Config

Mode = Literal["full", "resume", "incremental"]


def train(
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="A channel of the configuration.")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data set: a folder of Parquet files.")
    ],
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
    config: ConfigOption = None,
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
    """Train one channel and put it in service; the other channels are used again where they fit.

    What is interrupted, by Ctrl-C or by force, goes on from its last epoch when the same is asked for again.
    """
    from engine.online.state import open_state

    loaded, snapshots = settings(config, store)
    if mode not in get_args(Mode):
        raise ConfigError(f"{mode!r} is none of {', '.join(get_args(Mode))}", "--mode")
    loaded = _trainable(loaded, channel, seed)
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
    show_findings(
        [each for each in check_release(loaded, snapshots, report.release) if each.severity == "error"]
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


def _show_curves(report: BuildReport, channel: str) -> None:
    """Say where the curves of the training are."""
    made = sorted(
        report.store.root.glob(f".work/{channel}-*/curves.png"), key=lambda path: path.stat().st_mtime
    )
    if made:
        console.output().print(f"Curves of the training: {made[-1]}", markup=False)
