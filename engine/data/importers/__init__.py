"""Turns data sets as they are published into the form: `recall data import KIND SOURCE DESTINATION`.

An importer is a function `(source, destination, **options) -> Dataset`; its keyword-only parameters are its
options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError
from engine.data.dataset import Dataset
from engine.data.importers.goodbooks import import_goodbooks
from engine.data.importers.kuairand import import_kuairand
from engine.data.importers.lightgcn import import_lightgcn
from engine.data.importers.movielens import import_movielens
from engine.data.summary import DatasetSummary, describe

IMPORTERS: dict[str, Callable[..., Dataset]] = {
    "movielens": import_movielens,
    "lightgcn": import_lightgcn,
    "kuairand": import_kuairand,
    "goodbooks": import_goodbooks,
}
"""The importers by the name that `recall data import` knows them by."""


def importer_options(kind: str) -> dict[str, inspect.Parameter]:
    """Return the options of an importer: name, type and default of each.

    Raises:
        ConfigError: there is no such importer.
    """
    if kind not in IMPORTERS:
        raise ConfigError(f"no importer {kind!r}; there are {', '.join(IMPORTERS)}", "kind")
    parameters = inspect.signature(IMPORTERS[kind], eval_str=True).parameters
    return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


def import_dataset(kind: str, source: str | Path, destination: str | Path, **options: Any) -> DatasetSummary:
    """Import a published data set, replacing what is at the destination, and summarise what came of it.

    Args:
        kind: which importer, see `IMPORTERS`.
        source: the folder or zip archive as it was downloaded.
        destination: the data set's directory.
        options: the importer's, see `importer_options`.

    Raises:
        ConfigError: there is no such importer, or it has no such option.
        DatasetError: a file is missing, lacks a column or is not as published.
    """
    known = importer_options(kind)
    for name in options:
        if name not in known:
            raise ConfigError(
                f"importer {kind!r} has no such option; it has {', '.join(known) or 'none'}", name
            )
    return describe(IMPORTERS[kind](Path(source), Path(destination), **options))
