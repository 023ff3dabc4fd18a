"""The sweeps of Deep Retrieval's paper: one setting at a time is varied, the others stay, and the curve is drawn.

Source: Gao et al. 2020, "Learning a Retrievable Structure for Large-Scale Recommendations", section 4.3: figures 3 to 5
(recall, precision and F against width K, paths J, beam B and penalty alpha), table 4 (depth D) and table 5 (the fullest
path against the penalty). Measured by the protocol `disjoint-users`, which is the paper's; beside each point stands the
brute force of the same model, which scores all items by the softmax that reranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from engine.config import Config
from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.core.types import RaggedRows
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.data.snapshot import SnapshotStore
from engine.offline.build import usable_cores
from engine.offline.cache import remember
from engine.offline.evaluate import World, scene_of, with_seed
from engine.offline.lattice import Lattice, PathSizes, TopPath
from engine.offline.metrics import ranking_metrics
from engine.offline.pictures import drawing
from engine.offline.protocols import HeldUsers, Part, Split, cut

CHANNEL = "deep_retrieval"

SWEPT = {
    "beam": "B, paths searched",
    "width": "K, nodes of a layer",
    "depth": "D, layers",
    "paths": "J, paths of an item",
    "penalty": "alpha, penalty of full paths",
}
"""What can be varied, and what it is called. `penalty` stands in the table `training` of the options."""

METRICS = ("recall", "precision", "f")
LOGARITHMIC = ("beam", "width", "penalty")

Record = dict[str, Any]


@dataclass(frozen=True)
class Sweeps:
    """What is measured.

    Attributes:
        values: per setting of `SWEPT` that is varied its values; the configuration's own is always one more.
        at: N, the length of the lists.
        seeds: of the trainings; empty for the configuration's own.
        part: of the protocol.
        held: whom the protocol tests; None for its defaults.
    """

    values: Mapping[str, Sequence[float]]
    at: int
    seeds: Sequence[int]
    part: Part
    held: HeldUsers | None


@dataclass(frozen=True)
class Point:
    """One training and search: the setting that is varied ("" at the start), its value, the seed, the configuration."""

    setting: str
    value: float
    seed: int
    config: Config


def points_of(config: Config, sweeps: Sweeps) -> list[Point]:
    """Return all that has to be measured, in an order in which one training serves all beams.

    Raises:
        ConfigError: a value does not fit the others.
    """
    points = []
    for seed in sweeps.seeds or (None,):
        base = config if seed is None else with_seed(config, [CHANNEL], seed)
        drawn = int(base.channels[CHANNEL].model_dump()["training"]["seed"])
        points.append(Point("", 0.0, drawn, base))
        for setting in SWEPT:
            points += [
                Point(setting, value, drawn, _changed(base, setting, value))
                for value in _values(config, sweeps, setting)
            ]
    return points


def run_sweeps(
    config: Config,
    dataset: Dataset,
    sweeps: Sweeps,
    store: SnapshotStore,
    results: Path,
    progress: Progress,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure every point that the file of results does not have, and return all of them.

    Args:
        config: the options that stay; it declares the channel.
        dataset: an open data set.
        sweeps: what is varied.
        store: where trained models are cached.
        results: a file of JSON lines. A point is added when it is measured, so that what is interrupted goes on.
        progress: told how far it is.
        threads: cores to use; None for all.

    Returns:
        `sweeps`: per setting a row per value; `base`: the options that stay; `statement`, `part`, `at`, `seeds`.

    Raises:
        ConfigError: a value does not fit the others, or the file cannot be written.
    """
    threads = threads or usable_cores()
    points = points_of(config, sweeps)
    catalogue = Catalogue.from_dataset(dataset)
    events = EventLog.read(dataset, catalogue)
    split = cut(config, events, "disjoint-users", sweeps.part, sweeps.held)
    fingerprint = dataset.fingerprint()
    done = read_records(results)
    found: list[tuple[Point, Record]] = []
    for point in points:
        key = _key(point, sweeps, split, fingerprint)
        if key not in done:
            measured = _measure(
                point, sweeps, catalogue, events, split, fingerprint, store, progress, threads
            )
            done[key] = {"key": key} | measured
            append_record(results, done[key])
        found.append((point, done[key]))
    options = config.channels[CHANNEL].model_dump(mode="json")
    return {
        "statement": split.statement,
        "part": sweeps.part,
        "at": sweeps.at,
        "users": int(split.users.size),
        "items": len(catalogue.items),
        "seeds": sorted({point.seed for point in points}),
        "base": {setting: _own(config, setting) for setting in SWEPT},
        "options": options,
        "sweeps": {
            setting: [_summed(found, setting, value) for value in _values(config, sweeps, setting)]
            for setting in SWEPT
            if setting in sweeps.values
        },
    }


def draw_sweeps(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw recall, precision and F, a panel per setting; return the files.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    made = []
    sweeps = report["sweeps"]
    for metric in METRICS:
        path = folder / f"deep-retrieval-{metric}.png"
        with drawing(path, (3.2 * len(sweeps), 3.2)) as figure:
            panels = figure.subplots(1, len(sweeps), squeeze=False, sharey=True)[0]
            for axes, (setting, rows) in zip(panels, sweeps.items(), strict=True):
                values = [row["value"] for row in rows]
                # A penalty of 0 has no place on a logarithmic axis: it stands a step to the left of the least.
                above = [value for value in values if value > 0]
                places = [value if value > 0 else min(above, default=1.0) / 10 for value in values]
                for name, style, label in (("", "o-", "beam search"), ("all_", "s--", "brute force")):
                    axes.errorbar(
                        places,
                        [row[f"{name}{metric}"] for row in rows],
                        [row[f"{name}{metric}_sd"] for row in rows],
                        fmt=style,
                        capsize=3,
                        markersize=4,
                        label=label,
                    )
                if setting in LOGARITHMIC:
                    axes.set_xscale("log")
                axes.set_xticks(places, [f"{value:g}" for value in values], rotation=45)
                axes.minorticks_off()
                axes.set_xlabel(SWEPT[setting])
                axes.grid(alpha=0.3)
            panels[0].set_ylabel(f"{metric}@{report['at']}")
            panels[0].legend()
        made.append(path)
    return made


def read_records(path: Path) -> dict[str, Record]:
    """Return the points of a file of results, by key; a line that was cut off is passed over.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", str(path)) from error
    found: dict[str, Record] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "key" in record:
            found[record["key"]] = record
    return found


def append_record(path: Path, record: Record) -> None:
    """Add a point; behind a line that was cut off it begins a new one.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(path)) from error


def _own(config: Config, setting: str) -> float:
    options = config.channels[CHANNEL].model_dump()
    value: float = options["training"]["penalty"] if setting == "penalty" else options[setting]
    return value


def _values(config: Config, sweeps: Sweeps, setting: str) -> list[float]:
    if setting not in sweeps.values:
        return []
    return sorted({*sweeps.values[setting], _own(config, setting)})


def _changed(config: Config, setting: str, value: float) -> Config:
    if setting != "penalty":
        return config.with_channel_options({CHANNEL: {setting: int(value)}}, f"--{setting}")
    training: Any = getattr(config.channels[CHANNEL], "training")  # noqa: B009  # an option of this channel
    changed = {**training.model_dump(exclude_unset=True), "penalty": value}
    return config.with_channel_options({CHANNEL: {"training": changed}}, "--penalty")


def _key(point: Point, sweeps: Sweeps, split: Split, fingerprint: str) -> str:
    options = point.config.channels[CHANNEL].model_dump(mode="json")
    said = json.dumps([options, fingerprint, split.key, sweeps.part, sweeps.at], sort_keys=True)
    return blake2b(said.encode(), digest_size=12).hexdigest()


def _measure(
    point: Point,
    sweeps: Sweeps,
    catalogue: Catalogue,
    events: EventLog,
    split: Split,
    fingerprint: str,
    store: SnapshotStore,
    progress: Progress,
    threads: int,
) -> Record:
    """Train, or find it trained, ask, and count."""
    at, config = sweeps.at, point.config
    world = World.built(
        config, catalogue, split, fingerprint, [CHANNEL], store, progress, threads, events=events
    )
    base = config.scenes["default"] if "default" in config.scenes else next(iter(config.scenes.values()))
    ranked = world.lists(scene_of(base, [CHANNEL], at), split.users, at, threads)
    lattice = Lattice(store.open(CHANNEL, world.snapshots[CHANNEL], verify=False).arrays)
    remember(store, world.snapshots)
    users = lattice.users(world.batch(split.users))
    known = [
        split.known.rows[split.known.indptr[u] : split.known.indptr[u + 1]] for u in split.users.tolist()
    ]
    best = lattice.best_of_all(users, at, RaggedRows.of(known))
    record: Record = {"options": {setting: _own(config, setting) for setting in SWEPT}, "seed": point.seed}
    for name, lists in (("", ranked), ("all_", best)):
        metrics = ranking_metrics(lists, split.truth, len(catalogue.items), [at])
        record |= {f"{name}{metric}": metrics[f"{metric}@{at}"] for metric in METRICS}
    sizes = PathSizes.of(lattice)
    top = TopPath.of(lattice, users, int(_own(config, "beam")), at)
    return record | {
        "largest": sizes.largest,
        "largest_share": sizes.largest_share,
        "used": sizes.used,
        "reached": top.reached,
        "top_share": top.share,
    }


def _summed(found: Sequence[tuple[Point, Record]], setting: str, value: float) -> Record:
    """Return the means of the seeds at one value, and their standard deviations (n - 1) as `_sd`."""
    records = [record for point, record in found if point.setting == setting and point.value == value]
    row: Record = {"value": value}
    for name in _numbers(records[0]):
        values = [record[name] for record in records]
        row[name] = mean(values)
        row[f"{name}_sd"] = stdev(values) if len(values) > 1 else 0.0
    row["of_brute_force"] = row["recall"] / row["all_recall"] if row["all_recall"] else 0.0
    return row


def _numbers(record: Record) -> Iterator[str]:
    return (name for name, value in record.items() if isinstance(value, int | float) and name != "seed")
