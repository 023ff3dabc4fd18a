"""`recall bench streaming-vq-quality`: streaming VQ beside HNSW and Deep Retrieval, and its parts one by one.

The comparison cuts a data set as `recall eval` does and asks all three channels for the same users; streaming VQ is asked
with rank lists of several lengths: as many items as Deep Retrieval's beams reach, parts of these, and its own option. The
ablations train the index model alone, of item ids and no other feature, and rank all items by u . Q(v) + v_bias.

Streaming VQ reads the log in order of time. The other two are trained both ways: in that order, which is the same task,
and shuffled, as a nightly build of theirs is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np

from engine.bench.report import circumstances
from engine.config import Config
from engine.core.channel import Progress
from engine.core.errors import BuildError, ConfigError
from engine.core.types import AnyArray, Float32Array, Int32Array, RaggedRows
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.data.snapshot import SnapshotStore
from engine.models.codebook import balance_of
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.options import Order
from engine.models.spec import ITEM_ID, Feature, ModelSpec, Towers
from engine.models.towers import ItemTower, UserTower
from engine.models.vq_spec import VqSpec
from engine.offline.cache import remember
from engine.offline.evaluate import World, scene_of, with_seed
from engine.offline.lattice import Lattice
from engine.offline.metrics import long_tail, ranking_metrics, tail_recall
from engine.offline.protocols import Part, Protocol, Split, cut

VQ, PATHS, VECTORS = "streaming_vq", "deep_retrieval", "two_tower"

PARTS_OF_PATHS = (0.1, 1 / 3, 1.0)
"""Lengths of the rank lists of streaming VQ that are asked for, as parts of Deep Retrieval's."""

USERS = 256
"""Users who are ranked at once."""

ORDERS: tuple[Order, Order] = ("time", "shuffled")
"""Orders in which the passes of the other two channels are done."""

DRAW = 0
"""Seed of the drawing of users."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it": {},
    "clusters as moving averages": {"centres": "moving"},
    "the same, crowding 2.5": {"centres": "moving", "crowding": 2.5},
    "the paper's rules: moving averages, no crowding": {"centres": "moving", "crowding": 0.0},
    "the same, no disturbance": {"centres": "moving", "crowding": 0.0, "boost": 0.0},
    "no crowding": {"crowding": 0.0},
    "no crowding, no disturbance": {"crowding": 0.0, "boost": 0.0},
    "no disturbance": {"boost": 0.0},
    "beta 0": {"beta": 0.0},
    "beta 1": {"beta": 1.0},
    "L_sim in the place of L_aux": {"similarity_weight": 1.0, "auxiliary_weight": 0.0},
    "L_sim besides": {"similarity_weight": 1.0},
    "no bias": {"bias": False},
    "no candidate stream": {"candidate_share": 0.0},
    "as many candidates as impressions": {"candidate_share": 1.0},
    "no replay": {"replay": 0.0},
    "half as many replayed as new, memory of 20,000": {"replay": 0.5, "memory": 20_000},
}
"""What is changed in the table `training`, by what it is called."""


def compare(
    config: Config,
    dataset: Dataset,
    protocol: Protocol,
    part: Part,
    at: Sequence[int],
    seeds: Sequence[int],
    store: SnapshotStore,
    progress: Progress,
    threads: int = 1,
    users: int | None = None,
    orders: Sequence[Order] = ORDERS,
) -> dict[str, Any]:
    """Train, or find trained, the three channels, and ask them.

    Args:
        config: declares the channels and their options.
        dataset: an open data set.
        protocol, part: how it is cut.
        at: lengths K of the lists.
        seeds: of the trainings; empty for those of the options.
        store: where trained models are cached.
        progress: told how far it is.
        threads: cores to use.
        users: as of `drawn_users`; None: all.
        orders: in which the other two's passes are done; the lists of streaming VQ are as long as Deep Retrieval's of the
            first.

    Returns:
        `rows`, each with `channel`, `order` (of its pass), `rank_list` (mean items that are ranked; 0 where all are, or a
        graph is walked), `recall@K` and `tail@K` and their deviations `_sd`, n - 1; `balance` of streaming VQ's
        clusters; `statement`.

    Raises:
        ConfigError: a channel is not declared, or has no training.
    """
    for name in (VQ, PATHS, VECTORS):
        if name not in config.channels:
            raise ConfigError(
                f"the comparison needs the channel {name!r}, and it is not declared", "channels"
            )
    catalogue = Catalogue.from_dataset(dataset)
    events = drawn_users(EventLog.read(dataset, catalogue), users)
    fingerprint = dataset.fingerprint() + ("" if users is None else f", {users} users")
    split = cut(config, events, protocol, part)
    tail = long_tail(split.learnt)
    found: dict[tuple[str, Order, str], list[dict[str, float]]] = {}
    balances: list[dict[str, float]] = []
    for seed in seeds or (None,):
        mine = config if seed is None else with_seed(config, [VQ, PATHS, VECTORS], seed)

        def world_of(name: str, changed: Config) -> World:
            built = World.built(
                changed,
                catalogue,
                split,
                fingerprint,
                [name],
                store,
                progress,
                threads,
                events=events,
            )
            remember(store, built.snapshots)
            return built

        def ask(name: str, order: Order, label: str, ranked: float | None, built: World) -> None:
            base = next(iter(config.scenes.values()))
            lists = built.lists(scene_of(base, [name], max(at)), split.users, max(at), threads)
            metrics = ranking_metrics(lists, split.truth, len(catalogue.items), at)
            metrics |= tail_recall(lists, split.truth, tail, at)
            kept = {key: value for key, value in metrics.items() if key.startswith(("recall", "tail"))}
            found.setdefault((name, order, label), []).append(kept | {"rank_list": ranked or 0.0})

        lists: dict[Order, float] = {}
        for name in (VECTORS, PATHS):
            for order in orders:
                built = world_of(name, _in_order(mine, name, order))
                if name == PATHS:
                    lists[order] = _reached(built, store, split)
                ask(name, order, "", lists[order] if name == PATHS else None, built)
        reached = lists[orders[0]]
        own = int(mine.channels[VQ].model_dump()["rank_list"])
        lengths = {
            f"{each:.2g} of Deep Retrieval's": max(1, round(each * reached)) for each in PARTS_OF_PATHS
        }
        for label, length in {**lengths, "the option's": min(own, len(catalogue.items))}.items():
            changed = mine.with_channel_options({VQ: {"rank_list": length}})
            built = world_of(VQ, changed)
            ask(VQ, "time", label, length, built)
        assignment = store.open(VQ, built.snapshots[VQ], verify=False).arrays["assignment"]
        clusters = int(mine.channels[VQ].model_dump()["clusters"])
        balances.append(_balance(assignment, clusters))
    return circumstances() | {
        "statement": split.statement, "protocol": protocol, "part": part, "users": int(split.users.size),
        "items": len(catalogue.items), "seeds": list(seeds), "at": list(at),
        "rows": [
            {"channel": name, "order": order, "label": label} | _mean(each)
            for (name, order, label), each in found.items()
        ],
        "balance": _mean(balances),
    }  # fmt: skip


def ablate(
    config: Config,
    dataset: Dataset,
    protocol: Protocol,
    part: Part,
    at: Sequence[int],
    seeds: Sequence[int],
    names: Sequence[str],
    progress: Progress,
    threads: int = 1,
    users: int | None = None,
) -> dict[str, Any]:
    """Train the index model once per row and seed, and count what it finds and how even its clusters are.

    Args: as of `compare`; names: rows of `ABLATIONS`, none for all.

    Returns:
        `rows`, each with `name`, `recall@K`, `tail@K`, `exact@K` (by u . v + v_bias), `largest`, `spread` and `empty` of
        the clusters as all items are assigned at the end, `stale` and `tail_stale`: share of the items, and of the long
        tail, that this moved, those that were in no cluster before included; deviations `_sd`.

    Raises:
        ConfigError: no such row, or the channel is not declared.
        BuildError: PyTorch is not installed, or a training fails.
    """
    try:
        from engine.training.data import TrainingData
        from engine.training.streaming_vq import train_streaming
    except ModuleNotFoundError as error:
        raise BuildError("training needs PyTorch: pip install 'recall-engine[train]'") from error
    unknown = sorted(set(names) - set(ABLATIONS))
    if unknown:
        raise ConfigError(f"no row is called {unknown[0]!r}; there are: {'; '.join(ABLATIONS)}", "--rows")
    if VQ not in config.channels:
        raise ConfigError(f"needs the channel {VQ!r}, and it is not declared", "channels")
    catalogue = Catalogue.from_dataset(dataset)
    split = cut(config, drawn_users(EventLog.read(dataset, catalogue), users), protocol, part)
    known, tail = split.known, long_tail(split.learnt)
    options: Any = config.channels[VQ]
    spec = _bare_spec(options, known.items)
    data = TrainingData(known, _nothing(known.users), _ids(known.items))
    rows = []
    for name in names or ABLATIONS:
        records: list[dict[str, float]] = []
        for seed in seeds or (options.training.seed,):
            training = options.training.model_copy(update={**ABLATIONS[name], "seed": seed})
            began = time.process_time()
            made = train_streaming(spec, training, data, progress, threads=threads)
            seconds = time.process_time() - began
            arrays = made.arrays
            queries = UserTower.load(spec.tower, arrays).vectors(_histories(split, spec))
            items = ItemTower.load(spec.tower, arrays).vectors(data.items)
            record: dict[str, float] = {}
            for label, vectors in (
                ("", arrays["codebook.vectors"][arrays["assignment"]]), ("exact_", items),
            ):  # fmt: skip
                lists = _ranked(queries, vectors, arrays["item_bias"], split, max(at))
                metrics = ranking_metrics(lists, split.truth, known.items, at)
                metrics |= tail_recall(lists, split.truth, tail, at)
                record |= {
                    f"{label}{key}": value
                    for key, value in metrics.items()
                    if key.startswith(("recall", "tail"))
                }
            moved = made.streamed != arrays["assignment"]
            record |= _balance(arrays["assignment"], spec.clusters)
            record |= {"stale": float(moved.mean()), "tail_stale": float(moved[tail].mean())}
            records.append(
                record | {"events_per_second": known.entries * training.epochs / max(seconds, 1e-9)}
            )
        rows.append({"name": name} | _mean(records))
    return circumstances() | {
        "statement": split.statement, "protocol": protocol, "part": part, "users": int(split.users.size),
        "items": known.items, "clusters": spec.clusters, "seeds": list(seeds), "at": list(at), "rows": rows,
    }  # fmt: skip


def drawn_users(events: EventLog, count: int | None) -> EventLog:
    """Return the events of so many users, drawn once for all; of all where there are not more, or `count` is None.

    Items stay, those too that none of these users likes.
    """
    there = np.unique(events.users)
    if count is None or count >= there.size:
        return events
    drawn = np.random.default_rng(DRAW).permutation(there)[:count]
    kept = np.isin(events.users, drawn)
    return replace(
        events,
        users=events.users[kept],
        items=events.items[kept],
        kinds=events.kinds[kept],
        timestamps=events.timestamps[kept],
        splits=None if events.splits is None else events.splits[kept],
        ratings=None if events.ratings is None else events.ratings[kept],
    )


def _in_order(config: Config, name: str, order: Order) -> Config:
    """Return the configuration with the passes of a channel's training in another order."""
    training: Any = config.channels[name].model_dump(exclude_unset=True).get("training", {})
    return config.with_channel_options({name: {"training": {**training, "order": order}}})


def _reached(world: World, store: SnapshotStore, split: Split) -> float:
    """Return the mean count of items on the users' beams that they do not know: what the ranker is given."""
    lattice = Lattice(store.open(PATHS, world.snapshots[PATHS], verify=False).arrays)
    beam = int(world.config.channels[PATHS].model_dump()["beam"])
    some = split.users[:: max(1, split.users.size // 1000)]
    found, _ = lattice.reached(lattice.users(world.batch(some)), beam)
    indptr, rows = split.known.indptr, split.known.rows
    new = [
        np.setdiff1d(
            found.rows[found.offsets[q] : found.offsets[q + 1]], rows[indptr[user] : indptr[user + 1]]
        ).size
        for q, user in enumerate(some.tolist())
    ]
    return float(np.mean(new))


def _bare_spec(options: Any, items: int) -> VqSpec:
    """Return the options' model of item ids alone, without a ranking step."""
    given = {name: getattr(options, name) for name in Towers.model_fields}
    feature = Feature(name=ITEM_ID, kind="id", dimension=options.dimension, size=items + 1)
    tower = ModelSpec(**{**given, "user_features": (), "item_features": (feature,)}, items=items)
    made: VqSpec = options.spec_of(tower).model_copy(update={"rank": "none"})
    return made


def _ids(items: int) -> Encoded:
    return Encoded(np.arange(1, items + 1, dtype=np.int32)[:, None], (), np.empty((items, 0), np.float32))


def _nothing(users: int) -> Encoded:
    return Encoded(np.empty((users, 0), np.int32), (), np.empty((users, 0), np.float32))


def _histories(split: Split, spec: VqSpec) -> EncodedUsers:
    """Return the users that are tested, with what the towers read."""
    length, known, users = spec.read, split.known, split.users
    sequence, lengths = np.zeros((users.size, length), np.int32), np.zeros(users.size, np.int32)
    for row, user in enumerate(users.tolist()):
        newest = known.rows[known.indptr[user] : known.indptr[user + 1]][:length][::-1] + 1
        sequence[row, length - newest.size :] = newest
        lengths[row] = newest.size
    none = _nothing(users.size)
    return EncodedUsers(none.codes, none.multi, none.numbers, sequence, lengths)


def _ranked(users: Float32Array, items: AnyArray, biases: AnyArray, split: Split, count: int) -> RaggedRows:
    """Return the best items of each user, those that the user knows left out."""
    known, count = split.known, min(count, items.shape[0])
    parts: list[Int32Array] = []
    for begin in range(0, split.users.size, USERS):
        some = split.users[begin : begin + USERS]
        scores = users[begin : begin + USERS] @ items.T + biases
        for row, user in enumerate(some.tolist()):
            scores[row, known.rows[known.indptr[user] : known.indptr[user + 1]]] = -np.inf
        parts.append(np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32))
    rows = np.concatenate(parts).ravel()
    return RaggedRows(rows, np.arange(0, rows.size + 1, count, dtype=np.int64))


def _balance(assignment: AnyArray, clusters: int) -> dict[str, float]:
    balance = balance_of(assignment, clusters)
    spread = balance.spread if np.isfinite(balance.spread) else 0.0  # which JSON has no word for
    return {"largest": balance.largest, "spread": spread, "empty": balance.empty}


def _mean(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over seeds, and standard deviations (n - 1) as `_sd`."""
    made: dict[str, float] = {}
    for name in records[0]:
        values = [record[name] for record in records]
        made[name] = mean(values)
        made[f"{name}_sd"] = stdev(values) if len(values) > 1 else 0.0
    return made
