"""Evaluate: run the serving pipeline over a data set as it was at an earlier moment, and count what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import numpy as np

from engine.config import Config, SceneConfig
from engine.core.channel import Channel, Progress
from engine.core.errors import ConfigError
from engine.core.filter import Filter
from engine.core.interactions import Interactions
from engine.core.memory import MemorySink
from engine.core.merge import MergeMode
from engine.core.options import Options
from engine.core.query import QueryBatch
from engine.core.types import Int32Array, RaggedRows
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.follows import read_follows
from engine.data.live import LiveCatalogue
from engine.data.snapshot import SnapshotStore
from engine.offline.build import (
    Source,
    build_components,
    build_context,
    events_read,
    usable_cores,
)
from engine.offline.metrics import hit_matrix, long_tail, overlap_share, ranking_metrics, tail_recall
from engine.offline.past import PastLeftovers, PastState, Places
from engine.offline.protocols import HeldUsers, Part, Protocol, Split, cut, pick
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.replica import load_context
from engine.online.request import RecentItems, Request
from engine.state.history import SnapshotHistory, write_history

BATCH = 64
REHEARSED_SECONDS = 86_400
FILTER = "excluded"


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        protocol, statement: the cut, and one sentence about it.
        users, items: how many were tested, and how large the catalogue is.
        channels: per channel its metrics alone.
        merged: metrics of all channels together; None for one channel.
        without: per channel the metrics of all the others together; empty for fewer than two.
        overlap: overlap[a][b] is the share of a's candidates that b gave the same user too.
        unique_share: share of a channel's hits that no other channel has.
        cold: metrics of the fallback channels for users without history; None where there are none.
        snapshots: component -> version in the store: what was built, or found there, and asked.
    """

    protocol: Protocol
    statement: str
    users: int
    items: int
    channels: dict[str, dict[str, float]]
    merged: dict[str, float] | None
    without: dict[str, dict[str, float]]
    overlap: dict[str, dict[str, float]]
    unique_share: dict[str, float]
    cold: dict[str, float] | None
    snapshots: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class World:
    """A cut data set with the channels that were built from its known part: what pipelines are made of and asked.

    Attributes:
        config, live, split: as their types say.
        state: the users as they were.
        channels, filters: loaded, by name.
        snapshots: component -> version where they came from a store; empty where they were built in memory.
        repeats: what users know may be answered, too.
    """

    config: Config
    live: LiveCatalogue
    split: Split
    state: PastState
    channels: dict[str, Channel]
    filters: dict[str, Filter]
    snapshots: dict[str, str]
    repeats: bool = False

    @classmethod
    def built(
        cls,
        config: Config,
        catalogue: Catalogue,
        split: Split,
        fingerprint: str,
        names: Sequence[str],
        store: SnapshotStore,
        progress: Progress,
        threads: int | None = None,
        follows: Interactions | None = None,
        events: EventLog | None = None,
    ) -> World:
        """Build the channels into a store, or find them there; of `events` those that the split knows are read."""
        live = LiveCatalogue.of(catalogue)
        source = _source(catalogue, split, fingerprint, follows)
        if events is not None:
            source = replace(source, events=events_read(config, names, events, split.seen))
        versions = build_components(config, source, store, progress, names, threads)
        snapshots = {name: store.open(name, version, verify=False) for name, version in versions.items()}
        channels: dict[str, Channel] = {}
        for name in names:
            loaded, options = config.channel(name)
            lender = config.snapshot_of(name)
            arrays = snapshots[lender].arrays if lender in snapshots else {}
            channels[name] = loaded.load(options, load_context(arrays, live))
        return cls._with(config, live, split, channels, versions, follows)

    @classmethod
    def in_memory(
        cls,
        config: Config,
        catalogue: Catalogue,
        split: Split,
        names: Sequence[str],
        progress: Progress,
        threads: int,
        follows: Interactions | None = None,
    ) -> World:
        """Build the channels in memory, for tuning."""
        live = LiveCatalogue.of(catalogue)
        source = _source(catalogue, split, "", follows)
        sinks: dict[str, MemorySink] = {}
        for name in dict.fromkeys(config.snapshot_of(name) for name in names):
            loaded, options = config.channel(name)
            sinks[name] = MemorySink()
            if loaded.needs_build:
                columns, of_users = catalogue.item_columns(), catalogue.user_columns()
                loaded.build(
                    options, build_context(source, columns, sinks[name], progress, threads, of_users)
                )
        channels: dict[str, Channel] = {}
        for name in names:
            loaded, options = config.channel(name)
            context = load_context(sinks[config.snapshot_of(name)].arrays, live)
            channels[name] = loaded.load(options, context)
        return cls._with(config, live, split, channels, {}, follows)

    @classmethod
    def _with(
        cls,
        config: Config,
        live: LiveCatalogue,
        split: Split,
        channels: dict[str, Channel],
        snapshots: dict[str, str],
        follows: Interactions | None,
    ) -> World:
        history = MemorySink()
        write_history(history, split.known, config.history.keep)
        loaded, options = config.filter(FILTER)
        return cls(
            config,
            live,
            split,
            PastState(SnapshotHistory(history.arrays), follows),
            channels,
            {FILTER: loaded.load(options, load_context({}, live))},
            snapshots,
        )

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue of the data set."""
        return self.live.base

    def lists(self, scene: SceneConfig, users: Int32Array, limit: int, threads: int) -> RaggedRows:
        """Return the ranked rows that the scene's pipeline gives each user, what they know masked unless it `repeats`.

        Users ask from where they were last. Where nothing is learnt from them, they are guests who bring what they did.
        """
        pipeline = Pipeline(scene, self.channels, self.filters, self._hydrator())
        places = Places.of(self.split.known, self.live.columns)

        def ask(start: int) -> tuple[Int32Array, Any]:
            run = pipeline.run(self._requests(users[start : start + BATCH], limit, places))
            if run.messages:
                raise ConfigError(f"a channel failed: {'; '.join(run.messages.values())}")
            return run.merged.rows, np.diff(run.merged.offsets)

        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(ask, range(0, users.size, BATCH)))
        offsets = np.zeros(users.size + 1, np.int64)
        np.cumsum(np.concatenate([lengths for _, lengths in parts]), out=offsets[1:])
        return RaggedRows(np.concatenate([rows for rows, _ in parts]), offsets)

    def batch(self, users: Int32Array) -> QueryBatch:
        """Return the batch that a channel is given when these users ask together, as in `lists`."""
        places = Places.of(self.split.known, self.live.columns)
        return self._hydrator()(self._requests(users, 1, places)).batch

    def _hydrator(self) -> Hydrator:
        live = self.live
        return Hydrator(live.items, live.users, self.state, live.authors, live.columns)

    def _requests(self, users: Int32Array, limit: int, places: Places) -> list[Request]:
        known, keep = self.split.known, self.config.history.keep
        now = moment(self.catalogue, self.split)
        cities = ["", *self.live.columns.city_codes]  # in order of code, from 0; -1 is the first
        requests = []
        for user, user_id in zip(users.tolist(), self.catalogue.users.ids(users).tolist(), strict=True):
            mine = slice(known.indptr[user], known.indptr[user + 1])
            items = self.catalogue.items.ids(known.rows[mine])
            recent = None
            if self.split.strangers:
                points, times = known.weights[mine][:keep], known.timestamps[mine][:keep]
                recent = RecentItems(items[:keep], points, times, np.zeros(points.size, np.int64), True)
            requests.append(
                Request(
                    user_id=None if self.split.strangers else user_id,
                    limit=limit,
                    recent=recent,
                    excluded=None if self.repeats else items,
                    now=now,
                    latitude=float(places.latitude[user]),
                    longitude=float(places.longitude[user]),
                    city=cities[places.cities[user] + 1],
                )
            )
        return requests


def moment(catalogue: Catalogue, split: Split) -> int:
    """Return when the requests are asked: at the last event that is known, or, where events have no times, when every
    item is published; seconds since the epoch."""
    last = max(int(each.timestamps.max(initial=0)) for each in (split.learnt, split.known))
    published = catalogue.numeric.get("published_at")
    return last if last or published is None else int(published.max(initial=0))


def known_follows(dataset: Dataset, catalogue: Catalogue, split: Split, timed: bool) -> Interactions | None:
    """Return the follows of the time that is known; all of them where events have no times (`timed`).

    Where nothing is learnt from the users that are tested, only of users that something is learnt from.
    """
    follows = read_follows(dataset, catalogue, int(split.learnt.timestamps.max(initial=0)) if timed else None)
    if follows is None or not split.strangers:
        return follows
    return pick(follows, np.repeat(split.learnt.user_counts() > 0, follows.user_counts()))


def _source(catalogue: Catalogue, split: Split, fingerprint: str, follows: Interactions | None) -> Source:
    now = int(split.learnt.timestamps.max(initial=0))
    return Source(catalogue, split.learnt, now, f"{fingerprint}.{split.key}", {}, follows)


def scene_of(
    base: SceneConfig, channels: Sequence[str], limit: int, fallback: Sequence[str] = ()
) -> SceneConfig:
    """Return a scene in which some channels answer with equal quotas, merged as the base scene does.

    Quotas are the base scene's where it names all the channels, else `limit` each.
    """
    quotas = {name: base.quotas.get(name, 0) for name in channels}
    if len(channels) == 1 or not all(quotas.values()) or base.merge is MergeMode.RANK_FUSION:
        quotas = dict.fromkeys(channels, limit)
    return base.model_copy(
        update={
            "quotas": quotas,
            "limit": limit,
            "filters": (FILTER,),
            "fallback": tuple(fallback),
            "weights": {name: weight for name, weight in base.weights.items() if name in channels},
        }
    )


def evaluate(
    config: Config,
    dataset: Dataset,
    protocol: Protocol,
    channels: Sequence[str],
    cuts: Sequence[int],
    store: SnapshotStore,
    progress: Progress,
    scene: str = "default",
    part: Part = "test",
    threads: int | None = None,
    held: HeldUsers | None = None,
    repeats: bool = False,
) -> Report:
    """Evaluate channels alone, together, and together but for one.

    Args:
        config: channels and their options, and the scene whose merge is used.
        dataset: an open data set.
        protocol: how it is cut.
        channels: which channels; in merge order.
        cuts: list lengths K.
        store: where built channels are cached.
        progress: told how far it is.
        scene: whose merge mode, quotas, weights and fallback are used.
        part: "test", or "validation" for choosing.
        threads: cores to use; None for all.
        held: whom disjoint-users tests; None for its defaults.
        repeats: what users are known to like may be answered, too; else it is masked.

    Raises:
        ConfigError: an unknown scene or channel, a channel that fails, or `held` leaves nobody to learn from.
        DatasetError: the data lacks what the protocol needs.
    """
    threads = threads or usable_cores()
    if scene not in config.scenes:
        raise ConfigError(f"no scene is called {scene!r}; known: {', '.join(config.scenes)}")
    for name in channels:
        if name not in config.channels:
            raise ConfigError(f"no channel is called {name!r}; declared: {', '.join(config.channels)}")
    if not cuts or min(cuts) < 1:
        raise ConfigError(f"list lengths must be at least 1, got {', '.join(map(str, cuts)) or 'none'}", "at")
    base = config.scenes[scene]
    catalogue = Catalogue.from_dataset(dataset)
    events = EventLog.read(dataset, catalogue)
    split = cut(config, events, protocol, part, held)
    follows = known_follows(dataset, catalogue, split, events.timed)
    fallback = [name for name in base.fallback if name not in channels] if split.cold.size else []
    needed = [*channels, *fallback]
    fingerprint = dataset.fingerprint()
    world = World.built(
        config, catalogue, split, fingerprint, needed, store, progress, threads, follows, events
    )
    world = replace(world, repeats=repeats)
    if protocol == "temporal":
        rankers = [name for name in channels if not world.channels[name].counts_recalls]
        if 0 < len(rankers) < len(channels):
            earlier = _rehearsed(
                config, catalogue, events, split, fingerprint, rankers, base, store, progress, threads
            )
            world = replace(world, state=replace(world.state, leftovers=earlier))
    del events
    deepest = max(cuts)
    groups = {name: [name] for name in channels}
    if len(channels) > 1:
        groups["merged"] = list(channels)
    if len(channels) > 2:
        groups |= {f"without {name}": [c for c in channels if c != name] for name in channels}
    progress.start("evaluating", len(groups))
    lists: dict[str, RaggedRows] = {}
    for label, names in groups.items():
        lists[label] = world.lists(scene_of(base, names, deepest), split.users, deepest, threads)
        progress.advance()

    tail = long_tail(split.learnt)

    def measured(ranked: RaggedRows, truth: RaggedRows) -> dict[str, float]:
        metrics = ranking_metrics(ranked, truth, len(catalogue.items), cuts)
        metrics |= tail_recall(ranked, truth, tail, cuts)
        return metrics | {"candidates": float(ranked.lengths.mean())}

    metrics = {label: measured(ranked, split.truth) for label, ranked in lists.items()}
    cold = None
    if split.cold.size and fallback:
        popular = world.lists(
            scene_of(base, fallback[:1], deepest, fallback[1:]), split.cold, deepest, threads
        )
        cold = {"users": float(split.cold.size)} | measured(popular, split.cold_truth)
    without = {name: metrics[f"without {name}"] for name in channels} if len(channels) > 2 else {}
    if len(channels) == 2:
        without = {name: metrics[other] for name, other in (tuple(channels), tuple(channels)[::-1])}
    return Report(
        protocol=protocol,
        statement=f"{split.statement}; what users know is {'not masked' if repeats else 'masked'}",
        users=int(split.users.size),
        items=len(catalogue.items),
        channels={name: metrics[name] for name in channels},
        merged=metrics.get("merged"),
        without=without,
        overlap={a: {b: overlap_share(lists[a], lists[b]) for b in channels if b != a} for a in channels},
        unique_share=_unique_share({name: lists[name] for name in channels}, split.truth),
        cold=cold,
        snapshots=world.snapshots,
    )


def with_seed(config: Config, channels: Sequence[str], seed: int) -> Config:
    """Return the configuration with another seed of the channels that are trained.

    Raises:
        ConfigError: none of them is.
    """
    changes = {}
    for name in channels:
        training = getattr(config.channels[name], "training", None)
        if isinstance(training, Options):
            changes[name] = {"training": {**training.model_dump(exclude_unset=True), "seed": seed}}
    if not changes:
        raise ConfigError(f"means nothing: none of {', '.join(channels)} is trained", "--seeds")
    return config.with_channel_options(changes)


def averaged(reports: Sequence[Report]) -> Report:
    """Return the means of evaluations that differ in their seeds alone; `snapshots` are those of the first."""
    names = ("channels", "merged", "without", "overlap", "unique_share", "cold")
    return replace(
        reports[0], **{name: _each([getattr(one, name) for one in reports], mean) for name in names}
    )


def deviations(reports: Sequence[Report]) -> dict[str, Any]:
    """Return the standard deviations between seeds (n - 1), for `channels` and `merged` as the report has them."""
    return {name: _each([getattr(one, name) for one in reports], stdev) for name in ("channels", "merged")}


def _each(values: Sequence[Any], of: Callable[[Sequence[float]], float]) -> Any:
    """Apply a function to the numbers that stand at the same place of equal dictionaries."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _each([value[key] for value in values], of) for key in first}
    return None if first is None else of(values)


def _rehearsed(
    config: Config,
    catalogue: Catalogue,
    events: EventLog,
    split: Split,
    fingerprint: str,
    channels: Sequence[str],
    base: SceneConfig,
    store: SnapshotStore,
    progress: Progress,
    threads: int,
) -> PastLeftovers:
    """Return what a ranking of a day before the cut would have left over for the cache channel.

    No log says what a fine ranking left over. So the scene without the cache channel is built from what was known a day
    before and asked for every tested user; the front of its list that the user did not meet until the cut is left over.
    The merge stands in for the fine ranking.
    """
    last = int(split.known.timestamps.max(initial=0))
    then = last - REHEARSED_SECONDS
    past = events.timestamps < then
    known = interest_matrix(events, config.interest, past, config.min_rating)
    users = split.users[known.user_counts()[split.users] > 0]
    none = np.empty(0, np.int32)
    if not users.size:  # nobody had done anything yet: nothing to build from, and nobody to rank for
        return PastLeftovers(np.zeros(len(catalogue.users) + 1, np.int64), none, then)
    nothing = RaggedRows.empty(users.size)
    empty = RaggedRows.empty(0)
    earlier = Split(known, known, users, nothing, none, empty, f"{split.key}.rehearsed", "", past)
    world = World.built(
        config, catalogue, earlier, fingerprint, channels, store, progress, threads, events=events
    )
    ranked = world.lists(
        scene_of(base, channels, config.state.leftovers), users, config.state.leftovers, threads
    )
    owner = np.repeat(users, ranked.lengths).astype(np.int64)
    met = (events.timestamps >= then) & (events.timestamps <= last)
    pairs = events.users[met].astype(np.int64) * len(catalogue.items) + events.items[met]
    left = ~np.isin(owner * len(catalogue.items) + ranked.rows, pairs)
    indptr = np.zeros(len(catalogue.users) + 1, np.int64)
    np.cumsum(np.bincount(owner[left], minlength=len(catalogue.users)), out=indptr[1:])
    return PastLeftovers(indptr, ranked.rows[left], then)


def _unique_share(lists: dict[str, RaggedRows], truth: RaggedRows) -> dict[str, float]:
    hits = {name: hit_matrix(ranked, truth) for name, ranked in lists.items()}
    total = np.sum(list(hits.values()), axis=0)
    return {
        name: float((found * (total == 1)).sum() / found.sum()) if found.any() else 0.0
        for name, found in hits.items()
    }


def restricted(split: Split, most: int, seed: int = 1) -> Split:
    """Return the split with at most `most` of its users, drawn with a seed: enough to compare settings."""
    if split.users.size <= most:
        return split
    chosen = np.sort(np.random.default_rng(seed).choice(split.users.size, most, replace=False))
    lists = [split.truth.rows[split.truth.offsets[u] : split.truth.offsets[u + 1]] for u in chosen.tolist()]
    return replace(split, users=split.users[chosen], truth=RaggedRows.of(lists))
