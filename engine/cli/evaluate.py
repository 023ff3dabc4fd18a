"""`recall eval`: run the serving pipeline over a data set's past, and count what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import console
from engine.cli.build import channel_names
from engine.cli.common import ConfigOption
from engine.cli.measuring import (
    CacheOption,
    ChannelsOption,
    DataArgument,
    JsonOption,
    ParamsOption,
    ProtocolOption,
    SceneOption,
    ThreadsOption,
    configured,
    counts,
    positive,
    print_json,
    protocol_of,
    scene_named,
)
from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.offline.evaluate import Report
    from engine.offline.protocols import HeldUsers, Part, Protocol

Metrics = dict[str, float]
_METRICS = ("recall", "ndcg", "hit", "coverage", "tail")
_PAPERS = ("precision", "recall", "f", "coverage")
"""What is shown of disjoint-users: the metrics of the papers that have it."""


def evaluate(
    directory: DataArgument,
    protocol: ProtocolOption = None,
    channels: ChannelsOption = None,
    at: Annotated[str, typer.Option(help="Lengths K of the lists, with commas between them.")] = "20,50",
    scene: SceneOption = "default",
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="quota|snake|rank_fusion", help="How channels are merged. Default: the scene's."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the merge score, as itemcf=1,swing=0.5. Default: the scene's."),
    ] = None,
    rank_constant: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Constant of the merge score. Default: the scene's."),
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="test|validation", help="`validation` to choose by, `test` to report.")
    ] = "test",
    seeds: Annotated[
        str | None,
        typer.Option(help="Train with each of these seeds, as 1,2,3, and report means and deviations."),
    ] = None,
    held_users: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="disjoint-users: users of each part. Default: 1,000, at most a tenth of those there are.",
        ),
    ] = None,
    held_seed: Annotated[
        int | None, typer.Option(min=0, help="disjoint-users: another seed draws other users.")
    ] = None,
    repeats: Annotated[
        bool, typer.Option("--repeats/--no-repeats", help="Let lists hold what users are known to like.")
    ] = False,
    params: ParamsOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of what users liked later each channel finds, alone and merged.

    What is built for it is kept in a cache and used again.
    """
    from engine.bench.report import circumstances
    from engine.data.dataset import Dataset
    from engine.offline.cache import cached_store, remember
    from engine.offline.evaluate import averaged, deviations, evaluate, with_seed

    loaded = configured(config, params)
    base = scene_named(loaded, scene)
    names = list(base.quotas) if channels is None else channel_names(loaded, channels)
    asked = base.model_copy(update=merge_settings(names, merge, weights, rank_constant))
    loaded = loaded.model_copy(update={"scenes": {**loaded.scenes, scene: asked}})
    cuts = counts(at, "--at")
    chosen = part_of(part)
    drawn = [] if seeds is None else counts(seeds, "--seeds")
    if len(drawn) == 1:
        raise ConfigError("expected two seeds or more: one has no spread", "--seeds")
    variants = [with_seed(loaded, names, seed) for seed in drawn] or [loaded]
    with console.BuildProgress() as progress:
        progress.start("checking", 1)
        dataset = Dataset.open(directory)
        progress.advance()
        way = protocol_of(dataset, protocol)
        held = held_out(way, held_users, held_seed)
        store = cached_store(cache or console.cache_folder() / "evaluations", dataset.fingerprint())
        reports = [
            evaluate(each, dataset, way, names, cuts, store, progress, scene, chosen, threads, held, repeats)
            for each in variants
        ]
    for one in reports:
        remember(store, one.snapshots)
    report, spread = averaged(reports), deviations(reports) if drawn else {}
    if as_json:
        setting: dict[str, Any] = {
            "part": chosen,
            "at": cuts,
            "merge": asked.merge.name.lower(),
            "repeats": repeats,
        }
        if drawn:
            runs = [
                {"seed": seed, "channels": one.channels} for seed, one in zip(drawn, reports, strict=True)
            ]
            setting |= {"seeds": drawn, "deviation": spread, "runs": runs}
        print_json(report.to_json() | setting | circumstances())
    else:
        show_report(report, cuts, spread)
        if drawn:
            words = f"means of seeds {', '.join(map(str, drawn))}, ± standard deviation"
            console.output().print(words, style="dim")


def merge_settings(
    channels: Sequence[str], merge: str | None, weights: str | None, rank_constant: str | None
) -> dict[str, Any]:
    """Return those settings of a scene that were given on the command line.

    Raises:
        ConfigError: no such mode, a weight of a channel that is not merged, or a number that is not above 0.
    """
    from engine.core.merge import MergeMode

    settings: dict[str, Any] = {}
    if merge is not None:
        if merge.upper() not in MergeMode.__members__:
            known = ", ".join(mode.name.lower() for mode in MergeMode)
            raise ConfigError(f"expected one of {known}, got {merge!r}", "--merge")
        settings["merge"] = MergeMode[merge.upper()]
    if weights is not None:
        settings["weights"] = {}
        for pair in weights.split(","):
            name, _, value = (part.strip() for part in pair.partition("="))
            if name not in channels:
                raise ConfigError(f"expected one of {', '.join(channels)}, got {name!r}", "--weights")
            settings["weights"][name] = positive(value, f"--weights {name}")
    if rank_constant is not None:
        settings["rank_constant"] = positive(rank_constant, "--rank-constant")
    return settings


def held_out(protocol: Protocol, count: int | None, seed: int | None) -> HeldUsers | None:
    """Return whom disjoint-users tests; None for its defaults, and for the other protocols.

    Raises:
        ConfigError: it was said for another protocol.
    """
    from engine.offline.protocols import HeldUsers

    given = {"count": count, "seed": seed}
    values = {name: value for name, value in given.items() if value is not None}
    if values and protocol != "disjoint-users":
        name = "--held-users" if "count" in values else "--held-seed"
        raise ConfigError(f"means nothing for {protocol}: it belongs to disjoint-users", name)
    return HeldUsers(**values) if values else None


def part_of(text: str) -> Part:
    """Return the part of that name; ConfigError if it is none."""
    from engine.offline.protocols import PARTS

    for part in PARTS:
        if part == text:
            return part
    raise ConfigError(f"expected {' or '.join(PARTS)}, got {text!r}", "--part")


def show_report(report: Report, cuts: Sequence[int], spread: Mapping[str, Any]) -> None:
    """Print a table per K, what the channels have in common, and what users without history get.

    `spread` has the deviations between seeds; empty where there was one run.
    """
    out = console.output()
    tested = console.counted(report.users, "user")
    out.print(f"{report.protocol}: {report.statement}.")
    out.print(f"{tested} tested, {console.counted(report.items, 'item')} in the catalogue.")
    for k in cuts:
        out.print()
        out.print(_metrics_table(report, k, spread))
    if len(report.channels) > 1:
        out.print()
        out.print(_overlap_table(report))
    if report.cold is not None:
        out.print(
            f"\n{console.counted(int(report.cold['users']), 'user')} without history, fallback channels:"
        )
        out.print("  " + ", ".join(f"recall@{k} {report.cold[f'recall@{k}']:.4f}" for k in cuts))


def _metrics_table(report: Report, k: int, spread: Mapping[str, Any]) -> Any:
    shown = _PAPERS if report.protocol == "disjoint-users" else _METRICS
    names = [*shown, *(["recall lost"] if report.without else [])]
    rows = console.table("", *((name, "right") for name in names), title=f"The first {k}")

    def add(label: str, metrics: Metrics, *lost: str, apart: Metrics | None = None) -> None:
        cells = [f"{metrics[f'{name}@{k}']:.4f}" for name in shown]
        if apart is not None:
            cells = [f"{cell} ±{apart[f'{name}@{k}']:.4f}" for name, cell in zip(shown, cells, strict=True)]
        rows.add_row(label, *cells, *lost)

    for name, metrics in report.channels.items():
        add(name, metrics, apart=spread["channels"][name] if spread else None)
    if report.merged is not None:
        add("merged", report.merged, apart=spread["merged"] if spread else None)
        whole = report.merged[f"recall@{k}"]
        for name, metrics in report.without.items():
            left = metrics[f"recall@{k}"]
            add(f"without {name}", metrics, f"{(whole - left) / whole:.1%}" if whole else "")
    return rows


def _overlap_table(report: Report) -> Any:
    names = list(report.channels)
    columns = [(f"also in {name}", "right") for name in names]
    rows = console.table(
        "",
        ("candidates", "right"),
        *columns,
        ("hits of its own", "right"),
        title="What channels have in common",
    )
    for name in names:
        shares = ["" if other == name else f"{report.overlap[name][other]:.1%}" for other in names]
        found = f"{report.channels[name]['candidates']:.1f}"
        rows.add_row(name, found, *shares, f"{report.unique_share[name]:.1%}")
    return rows
