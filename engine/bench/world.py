"""Worlds that benchmarks answer from: a made-up one of any size, or a data set; built once and found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.bench.made_up import made_up_catalogue
from engine.config import Config
from engine.core.channel import Progress
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.data.follows import read_follows
from engine.data.snapshot import Snapshot, SnapshotStore
from engine.offline.build import Source, build_components
from engine.offline.cache import cached_store, remember
from engine.offline.evaluate import scene_of
from engine.offline.synthetic import synthetic_interactions
from engine.online.replica import Replica
from engine.online.state import State

EVENTS_PER_USER = 60
USERS_PER_ITEM = 0.2
KEEP = 2
"""Worlds that stay in a store: one of a million items takes gigabytes."""


@dataclass(frozen=True)
class World:
    """Snapshots of a catalogue, histories and channels, and the one scene that answers from them.

    Attributes:
        config: has the scene "default" and no other.
        store: the folder of the snapshots.
        versions: component -> snapshot version.
        now: seconds since the epoch; the time of the newest event, and of the requests.
    """

    config: Config
    store: Path
    versions: Mapping[str, str]
    now: int

    def snapshots(self) -> dict[str, Snapshot]:
        """Map the snapshots."""
        store = SnapshotStore(self.store)
        return {name: store.open(name, version, verify=False) for name, version in self.versions.items()}

    def replica(self, state: State | None = None) -> Replica:
        """Load the world, so that it answers."""
        return Replica.of(self.config, "bench", self.snapshots(), state)


def cached_world(
    config: Config,
    channels: Sequence[str],
    items: int,
    data: Path | None,
    limit: int,
    folder: Path,
    progress: Progress,
) -> World:
    """Return the world of a data set, or without one a made-up world, from a cache.

    Args:
        config, channels, items, limit: as in `made_up_world`.
        data: the data set; None: none.
        folder: the cache.
        progress: told of what is built.

    Raises:
        DatasetError, BuildError: it cannot be read or built.
    """
    if data is None:
        return made_up_world(config, channels, items, limit, cached_store(folder, "pipeline"), progress)
    store = cached_store(folder, Dataset.open(data).fingerprint())
    return world_of_data(config, channels, data, limit, store, progress)


def made_up_world(
    config: Config, channels: Sequence[str], items: int, limit: int, store: SnapshotStore, progress: Progress
) -> World:
    """Build a synthetic world into a store, or find it there: a fifth as many users as items, with 60 likes each.

    Args:
        config: channels and their options.
        channels: which answer; the scene's fallback channels are added.
        items: catalogue size.
        limit: of the scene.
        store: where the world is kept.
        progress: told of the build.
    """
    users = max(10, int(items * USERS_PER_ITEM))
    progress.start("making the world", 1)
    liked = synthetic_interactions(users, items, users * EVENTS_PER_USER)
    progress.advance()
    now = int(liked.timestamps.max())
    catalogue = made_up_catalogue(users, items, now)
    source = Source(catalogue, liked, now, f"made up.{users}.{items}.{EVENTS_PER_USER}", {})
    return _world(config, channels, limit, source, store, progress)


def world_of_data(
    config: Config, channels: Sequence[str], data: Path, limit: int, store: SnapshotStore, progress: Progress
) -> World:
    """Build a data set into a store, or find it there; arguments as in `made_up_world`.

    Raises:
        DatasetError, BuildError: it cannot be read or built.
    """
    progress.start("reading", 1)
    dataset = Dataset.open(data)
    catalogue = Catalogue.from_dataset(dataset)
    events = EventLog.read(dataset, catalogue)
    follows = read_follows(dataset, catalogue)
    source = Source.of(config, events, catalogue, dataset.fingerprint(), follows=follows)
    progress.advance()
    return _world(config, channels, limit, source, store, progress)


def _world(
    config: Config,
    channels: Sequence[str],
    limit: int,
    source: Source,
    store: SnapshotStore,
    progress: Progress,
) -> World:
    base = config.scenes["default"]
    fallback = [name for name in base.fallback if name not in channels]
    versions = build_components(config, source, store, progress, [*channels, *fallback])
    remember(store, versions, KEEP)
    scene = scene_of(base, channels, limit, fallback).model_copy(update={"filters": base.filters})
    config = config.model_copy(update={"scenes": {"default": scene}})
    return World(config, store.root, versions, source.now)
