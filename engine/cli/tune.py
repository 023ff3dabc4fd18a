"""`recall tune`: search the options that channels declare, on the validation part of a data set."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import console
from engine.cli.build import channel_names
from engine.cli.common import ConfigOption
from engine.cli.measuring import (
    ChannelsOption,
    DataArgument,
    JsonOption,
    ParamsOption,
    ProtocolOption,
    SceneOption,
    ThreadsOption,
    configured,
    print_json,
    protocol_of,
    scene_named,
)
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.offline.tune import Tuned


def tune(
    directory: DataArgument,
    out: Annotated[Path, typer.Option(help="File that the best options go to; `--params` takes it.")],
    protocol: ProtocolOption = None,
    channels: ChannelsOption = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="METRIC@K",
            help="What is made as large as can be: recall, ndcg, hit, precision, f, coverage.",
        ),
    ] = "recall@20",
    trials: Annotated[int, typer.Option(min=1, help="Settings tried per channel.")] = 40,
    scene: SceneOption = "default",
    params: ParamsOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed is another search.")] = 7,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search each channel's options for the best metric on validation; the test part is never looked at.

    Ctrl-C keeps what was found for the channels whose search had ended.
    """
    from engine.bench.report import circumstances
    from engine.config import read_params
    from engine.core.options import tunable
    from engine.data.dataset import Dataset
    from engine.offline.tune import depth_of, tune, write_params

    loaded = configured(config, params)
    start = {} if params is None else read_params(params)
    base = scene_named(loaded, scene)
    if channels is None:
        names = [name for name in base.quotas if tunable(type(loaded.channels[name]))]
    else:
        names = channel_names(loaded, channels)
    depth_of(metric)
    check_writable(out)
    found: dict[str, Tuned] = {}
    interrupted = False
    way = ""
    try:
        with console.BuildProgress() as progress:
            progress.start("checking", 1)
            dataset = Dataset.open(directory)
            progress.advance()
            way = protocol_of(dataset, protocol)
            # One by one, so that an interruption loses the search under way and nothing else.
            found.update(tune(loaded, dataset, way, names, metric, trials, progress, scene, threads, seed))
    except KeyboardInterrupt:
        if not found:
            raise
        interrupted = True
    comment = (
        f"found by `recall tune`: {metric}, {way}, {console.counted(trials, 'trial')} a channel, seed {seed}"
    )
    write_params(out, found, comment, start)
    if interrupted:
        # A search cut short would be no answer to what was asked: the file is kept, the object is not printed.
        console.say_error(f"interrupted; {out} holds what was found for {', '.join(found)}")
        raise typer.Exit(130)
    if as_json:
        setting = {"protocol": way, "metric": metric, "trials": trials, "seed": seed, "out": str(out)}
        channels_found = {name: dataclasses.asdict(tuned) for name, tuned in found.items()}
        print_json(setting | channels_found | circumstances())
        return
    for channel, tuned in found.items():
        show_tuned(channel, metric, tuned)
    console.output().print(
        f"Written to {out}; `recall eval {directory} --params {out}` measures it.", soft_wrap=True
    )


def check_writable(path: Path) -> None:
    """Say now rather than after an hour of searching that a file could not be written.

    Raises:
        ConfigError: its folder is not there, or may not be written.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("expected a file in a folder that exists", f"--out {path}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError("the folder may not be written", f"--out {path}")


def show_tuned(channel: str, metric: str, tuned: Tuned) -> None:
    """Print what was found for one channel, the options that mattered most first."""
    rows = console.table("option", ("before", "right"), ("best", "right"), ("mattered", "right"))
    for name in sorted(tuned.options, key=lambda each: -tuned.importance.get(each, 0.0)):
        share = f"{tuned.importance[name]:.1%}" if name in tuned.importance else ""
        rows.add_row(name, _words(tuned.before[name]), _words(tuned.options[name]), share)
    out = console.output()
    out.print(f"{channel}: {metric} {tuned.best:.4f} on validation, {tuned.default:.4f} before", style="bold")
    out.print(rows)
    out.print()


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
