"""What `eval`, `tune` and `bench` share: options, how their values are read, and the one JSON object."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.config import Config, SceneConfig
    from engine.data.dataset import Dataset
    from engine.offline.protocols import Protocol

DataArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="The data set: a folder of Parquet files.")
]
ProtocolOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="fixed-split|leave-one-out|temporal|disjoint-users",
        help="How the data is cut. Default: `protocol` in its dataset.toml.",
    ),
]
ChannelsOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Channels, with commas between them. Default: those of the scene.")
]
SceneOption: TypeAlias = Annotated[
    str, typer.Option(help="The scene whose channels, quotas and merge are used.")
]
ParamsOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="TOML file with options per channel, as `recall tune` writes it.")
]
ThreadsOption: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Cores to use. Default: all.")]
CacheOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Folder for what is built. Default: RECALL_CACHE, or your cache folder."),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else.")
]

MOST = 100_000
"""The longest list that a scene may be asked for."""


def configured(config: Path | None, params: Path | None) -> Config:
    """Return the configuration, with the options of a file of parameters in the place of its own.

    Raises:
        ConfigError: one of the two is wrong.
    """
    from engine.config import load_config, read_params

    loaded = load_config(config)
    return loaded if params is None else loaded.with_channel_options(read_params(params), params.name)


def scene_named(config: Config, name: str) -> SceneConfig:
    """Return a scene; ConfigError if there is none of that name."""
    if name not in config.scenes:
        raise ConfigError(f"no scene is called {name!r}; known: {', '.join(config.scenes)}", "--scene")
    return config.scenes[name]


def protocol_of(dataset: Dataset, wanted: str | None) -> Protocol:
    """Return the protocol that was asked for, or else the data set's own.

    Raises:
        ConfigError: it is not one of ours.
    """
    from engine.offline.protocols import PROTOCOLS

    name = dataset.meta.get("protocol", "") if wanted is None else wanted
    for protocol in PROTOCOLS:
        if protocol == name:
            return protocol
    known = f"expected one of {', '.join(PROTOCOLS)}"
    if wanted is not None:
        raise ConfigError(f"{known}, got {wanted!r}", "--protocol")
    raise ConfigError(f"{known}; the data set's dataset.toml names none of them", "--protocol")


def counts(text: str, flag: str, most: int = MOST) -> list[int]:
    """Return the distinct numbers of a comma-separated list, rising.

    Raises:
        ConfigError: it is empty, or one of them is not a whole number from 1 to `most`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (re.fullmatch("[0-9]{1,9}", part) and 1 <= int(part) <= most):
            raise ConfigError(f"expected whole numbers from 1 to {most}, got {part!r}", flag)
    if not parts:
        raise ConfigError("expected at least one number", flag)
    return sorted({int(part) for part in parts})


def positive(text: str, flag: str) -> float:
    """Return a number above 0; ConfigError if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"expected a number above 0, got {text!r}", flag)
    return value


def print_json(report: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of standard output; numbers that JSON lacks are a bug here."""
    typer.echo(json.dumps(report, allow_nan=False))
