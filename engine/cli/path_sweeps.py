"""`recall bench deep-retrieval-sweeps`: one setting of Deep Retrieval at a time, as its paper does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import console
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


def bench_path_sweeps(
    directory: DataArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Where results.jsonl and the pictures go; what is there is not repeated."
        ),
    ],
    sweep: Annotated[
        str, typer.Option(help="What is varied, with commas between them.")
    ] = "beam,width,depth,paths,penalty",
    beam: Annotated[str, typer.Option(help="Values of B.")] = "1,5,10,25,50,100",
    width: Annotated[str, typer.Option(help="Values of K.")] = "10,25,50,100",
    depth: Annotated[str, typer.Option(help="Values of D.")] = "2,3,4",
    paths: Annotated[str, typer.Option(help="Values of J.")] = "1,2,3,4,5",
    penalty: Annotated[str, typer.Option(help="Values of alpha.")] = "0,3e-5,3e-3,3e-2,3e-1",
    at: Annotated[int, typer.Option(min=1, max=100_000, help="Length N of the lists.")] = 10,
    part: Annotated[
        str, typer.Option(metavar="test|validation", help="`validation` to choose by, `test` to report.")
    ] = "validation",
    seeds: Annotated[
        str | None, typer.Option(help="Train each with these seeds, as 1,2,3. Default: that of the options.")
    ] = None,
    held_users: Annotated[
        int | None, typer.Option(min=1, help="Users of each part. Default: 1,000, at most a tenth of them.")
    ] = None,
    held_seed: Annotated[int | None, typer.Option(min=0, help="Another seed draws other users.")] = None,
    params: ParamsOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Vary width, depth, paths, beam and penalty of Deep Retrieval, one at a time: tables and pictures.

    By the protocol disjoint-users, beside the brute force of each model. An interrupted sweep goes on where it was.
    """
    from engine.bench.path_sweeps import CHANNEL, SWEPT, Sweeps, draw_sweeps, run_sweeps
    from engine.bench.report import circumstances
    from engine.cli.evaluate import held_out, part_of
    from engine.data.dataset import Dataset
    from engine.offline.cache import cached_store

    loaded = configured(config, params)
    if CHANNEL not in loaded.channels:
        loaded = loaded.with_channel_options({CHANNEL: {}})
    given = {"beam": beam, "width": width, "depth": depth, "paths": paths}
    values: dict[str, list[float]] = {
        name: [float(each) for each in counts(text, f"--{name}")] for name, text in given.items()
    }
    values["penalty"] = _numbers(penalty, "--penalty")
    wanted = [name.strip() for name in sweep.split(",") if name.strip()]
    for name in wanted:
        if name not in SWEPT:
            raise ConfigError(f"expected one of {', '.join(SWEPT)}, got {name!r}", "--sweep")
    if not wanted:
        raise ConfigError("expected at least one setting", "--sweep")
    sweeps = Sweeps(
        values={name: values[name] for name in SWEPT if name in wanted},
        at=at,
        seeds=[] if seeds is None else counts(seeds, "--seeds"),
        part=part_of(part),
        held=held_out("disjoint-users", held_users, held_seed),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", f"--out {out}") from error
    with console.BuildProgress() as progress:
        progress.start("checking", 1)
        dataset = Dataset.open(directory)
        progress.advance()
        store = cached_store(cache or console.cache_folder() / "evaluations", dataset.fingerprint())
        report = run_sweeps(loaded, dataset, sweeps, store, out / "results.jsonl", progress, threads)
    pictures = draw_sweeps(report, out)
    if as_json:
        print_json(report | {"pictures": [str(each) for each in pictures]} | circumstances())
        return
    _show(report)
    console.output().print(f"Drawn: {', '.join(map(str, pictures))}", markup=False, soft_wrap=True)


def _numbers(text: str, flag: str) -> list[float]:
    """Return the numbers of a comma-separated list; ConfigError if one is none, or below 0."""
    found = []
    for part in (part.strip() for part in text.split(",")):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"expected numbers from 0 on, got {part!r}", flag)
        found.append(value)
    return found


def _show(report: Mapping[str, Any]) -> None:
    from engine.bench.path_sweeps import METRICS, SWEPT

    out = console.output()
    out.print(f"disjoint-users, {report['part']}: {report['statement']}.", soft_wrap=True)
    base = ", ".join(f"{name} {value:g}" for name, value in report["base"].items())
    out.print(f"Where they are not varied: {base}.", soft_wrap=True)
    for setting, rows in report["sweeps"].items():
        names = [*(f"{metric}@{report['at']}" for metric in METRICS), "of brute force", "reached"]
        names += ["fullest path", "paths in use", "top path"]
        table = console.table((setting, "right"), *((name, "right") for name in names), title=SWEPT[setting])
        for row in rows:
            several = len(report["seeds"]) > 1
            cells = [f"{row[m]:.4f}" + (f" ±{row[f'{m}_sd']:.4f}" if several else "") for m in METRICS]
            cells += [f"{row['of_brute_force']:.1%}", f"{row['reached']:,.0f}", f"{row['largest']:,.0f}"]
            cells += [f"{row['used']:,.0f}", f"{row['top_share']:.2%}"]
            table.add_row(f"{row['value']:g}", *cells)
        out.print()
        out.print(table)
