"""`recall data`: look at data sets, import published ones, copy the bundled sample."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from engine import console
from engine.core.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from engine.data.summary import DatasetSummary

app = typer.Typer(
    help="Look at data sets, import published ones, copy the bundled sample.", no_args_is_help=True
)


@app.command("describe")
def describe(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data set: a folder of Parquet files.")
    ],
) -> None:
    """Check a data set and show what it holds."""
    from engine.data.dataset import Dataset
    from engine.data.summary import describe

    dataset = Dataset.open(directory)
    show_summary(describe(dataset))
    facts = [(key, dataset.meta[key]) for key in ("licence", "source", "attribution") if key in dataset.meta]
    for key, value in facts:
        console.output().print(Text(f"{key}: {value}", "dim"))


@app.command("import", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def import_(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="movielens, lightgcn, kuairand or goodbooks.")],
    source: Annotated[Path, typer.Argument(help="The folder or zip archive as it was downloaded.")],
    destination: Annotated[Path, typer.Argument(help="Where the data set goes; what is there is replaced.")],
) -> None:
    """Import a published data set.

    An importer's own options follow as --option VALUE: movielens has --min-rating, goodbooks has --tags.
    """
    from engine.data.importers import import_dataset

    options = importer_arguments(kind, context.args)
    with console.errors().status(f"importing {source}"):
        summary = import_dataset(kind, source, destination, **options)
    show_summary(summary)
    console.output().print(Text(f"written to {destination}; `recall build {destination}` comes next"))


def importer_arguments(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Turn `--min-rating 4` into {"min_rating": 4.0}, by the importer's own declaration.

    Raises:
        ConfigError: the importer has no such option, or the value is not of its type.
    """
    from pydantic import TypeAdapter, ValidationError

    from engine.data.importers import importer_options

    known = importer_options(kind)
    pending = [
        part for text in arguments for part in (text.split("=", 1) if text.startswith("--") else [text])
    ]
    options: dict[str, Any] = {}
    for flag, value in zip(pending[::2], [*pending[1::2], None], strict=False):
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            offered = ", ".join(f"--{each.replace('_', '-')}" for each in known) or "none"
            raise ConfigError(f"the importer {kind!r} has no such option; it has: {offered}", flag)
        if value is None:
            raise ConfigError("expected a value", flag)
        try:
            options[name] = TypeAdapter(known[name].annotation).validate_strings(value)
        except ValidationError as error:
            raise ConfigError(f"{error.errors()[0]['msg']} (got {value!r})", flag) from error
    return options


@app.command("sample")
def sample(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
) -> None:
    """Copy the bundled sample (KuaiRand-Pure, CC BY-SA 4.0) to look at or to change."""
    from engine.data.sample import sample_path

    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DatasetError("is there already; name a folder that does not exist", str(destination))
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for file in sorted(sample_path().iterdir()):
            if file.suffix in (".parquet", ".toml", ".npz") or file.name == "LICENSE":
                # Contents only: the installed files may be read-only.
                shutil.copyfile(file, destination / file.name)
    except OSError as error:
        raise DatasetError(f"cannot be written: {error.strerror}", str(destination)) from error
    console.output().print(Text(f"The sample is in {destination}; its licence is {destination / 'LICENSE'}."))


def show_summary(summary: DatasetSummary) -> None:
    """Print what a data set holds."""
    out = console.output()
    out.print(
        Text.assemble(
            (summary.name, "bold"),
            f": {console.counted(summary.events, 'event')} of {console.counted(summary.users, 'user')} "
            f"on {console.counted(summary.items, 'item')}, {summary.id_type} ids, "
            f"density {summary.density:.4%}\n",
        )
    )
    files = console.table("file", ("rows", "right"), ("size", "right"), ("columns", "fold"))
    for file in summary.files:
        columns = ", ".join(
            f"{column.name} {column.type}" + (f" ({column.nulls:,} null)" if column.nulls else "")
            for column in file.columns
        )
        files.add_row(file.name, f"{file.rows:,}", console.size(file.bytes), Text(columns))
    out.print(files)
    facts = console.table("", ("", "fold"))
    facts.show_header = False
    facts.add_row("events by kind", Text(_counts(summary.kinds)))
    if summary.splits:
        facts.add_row("by split", Text(_counts(summary.splits)))
    if summary.first is not None and summary.last is not None:
        facts.add_row("from / to (UTC)", f"{_moment(summary.first)} / {_moment(summary.last)}")
    for name, spread in (("events per user", summary.per_user), ("events per item", summary.per_item)):
        facts.add_row(
            name, f"median {spread.median:,.0f}, 99th percentile {spread.p99:,.0f}, most {spread.most:,}"
        )
    out.print()
    out.print(facts)


def _counts(counts: Any) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
