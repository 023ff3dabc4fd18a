"""A replica: one release loaded into memory, its channels alive, a pipeline for each scene."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.config import Config
from engine.core.channel import Channel, LoadContext
from engine.core.errors import ConfigError, SnapshotError
from engine.core.filter import Filter
from engine.core.types import AnyArray, Int32Array
from engine.data.catalogue import Catalogue
from engine.data.changes import ItemChanges
from engine.data.live import LiveCatalogue, find_keys
from engine.data.snapshot import CATALOGUE, Snapshot, SnapshotStore
from engine.online.beside import Guards
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.state import State
from engine.state.assignments import AssignedItems
from engine.state.history import HISTORY, SnapshotHistory, UserState
from engine.state.log import LiveLog

log = logging.getLogger(__name__)

REPLAYED = 10_000
"""Entries of the live log taken in together at the start."""


@dataclass
class Replica:
    """What answers requests.

    Attributes:
        release: the release's name.
        versions: component -> snapshot version.
        catalogue: items, users and their columns.
        pipelines: scene -> pipeline.
        channels, filters: what the pipelines have, by name.
        log_offset: how much of the live log it has taken in; "" without a state store.
        snapshots: component -> what it was loaded from.
        guards: keep the channels from harming each other; by name.
    """

    release: str
    versions: Mapping[str, str]
    catalogue: LiveCatalogue
    pipelines: Mapping[str, Pipeline]
    channels: Mapping[str, Channel] = field(default_factory=dict)
    filters: Mapping[str, Filter] = field(default_factory=dict)
    log_offset: str = ""
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    guards: Guards = field(default_factory=lambda: Guards({}))

    @classmethod
    def open(
        cls, config: Config, store: SnapshotStore, verify: bool = True, state: State | None = None
    ) -> Replica:
        """Load the store's newest release that is whole; a damaged one is logged and the one before it serves.

        With a state store it then takes in all that the live log holds behind the release.

        Args:
            config: scenes and channels.
            store: where the releases are.
            verify: hold every file to its checksum first.
            state: the state store; None: what the release says is all there is.

        Raises:
            SnapshotError: if no release is whole, or none was ever published.
            ConfigError: if a scene uses a channel that the release has no snapshot of.
            StateError: if the live log cannot be read.
        """
        release, snapshots, refused = store.newest_valid(verify=verify)
        for error in refused:
            log.error("release refused, an earlier one serves: %s", error)
        return cls.of(config, release.name, snapshots, state)

    @classmethod
    def open_release(
        cls,
        config: Config,
        store: SnapshotStore,
        name: str,
        state: State | None = None,
        before: Replica | None = None,
    ) -> Replica:
        """Load a certain release, whose checksums somebody compared before; as `open`.

        Args:
            config, store, state: as in `open`.
            name: the release's name.
            before: a replica whose open snapshots are used again where the release names the same.
        """
        opened = None if before is None else before.snapshots
        snapshots = store.load_release(store.release(name), verify=False, opened=opened)
        return cls.of(config, name, snapshots, state)

    @classmethod
    def of(
        cls, config: Config, release: str, snapshots: Mapping[str, Snapshot], state: State | None = None
    ) -> Replica:
        """Make a replica of loaded snapshots; as `open`."""
        for needed in (CATALOGUE, HISTORY):
            if needed not in snapshots:
                raise SnapshotError(f"has no {needed}; run `recall build`", f"release {release}")
        catalogue = Catalogue.load(snapshots[CATALOGUE].arrays)
        live = LiveCatalogue.of(catalogue)
        history = SnapshotHistory(snapshots[HISTORY].arrays)
        users: UserState = history if state is None else state.live_users(live, history)
        hydrator = Hydrator(live.items, live.users, users, live.authors, live.columns)
        wanted = {name for scene in config.scenes.values() for name in (*scene.quotas, *scene.fallback)}
        channels = {
            name: _load_channel(config, name, snapshots, live) for name in config.channels if name in wanted
        }
        filter_names = {name for scene in config.scenes.values() for name in scene.filters}
        filters = {}
        for name in sorted(filter_names):
            loaded, options = config.filter(name)
            filters[name] = loaded.load(options, load_context({}, live))
        guards = Guards.of(config, channels)
        pipelines = {
            name: Pipeline(scene, channels, filters, hydrator, config.server.reserve_ms, guards)
            for name, scene in config.scenes.items()
        }
        versions = {component: snapshot.manifest.version for component, snapshot in snapshots.items()}
        if state is None:
            return cls(
                release, versions, live, pipelines, channels, filters, snapshots=snapshots, guards=guards
            )
        offset = snapshots[CATALOGUE].manifest.log_offset
        replica = cls(release, versions, live, pipelines, channels, filters, offset, snapshots, guards)
        began = time.monotonic()
        changes = replica.catch_up(state.log)
        log.info("%d changes of items taken in, in %.1f s", changes, time.monotonic() - began)
        return replica

    def apply(self, changes: ItemChanges, offset: str) -> list[str]:
        """Take in changes of items; between two batches, on the thread that computes them.

        Args:
            changes: from the live log.
            offset: of the last of them.

        Returns:
            The channels and filters that failed to take note, as in `update`.
        """
        rows = self.catalogue.apply(changes)
        failed = self.update(rows) if rows.size else []
        self.log_offset = offset
        return failed

    def catch_up(self, live_log: LiveLog) -> int:
        """Take in everything between `log_offset` and the end of the log; for a replica that does not serve yet.

        Channels and filters are told once, when the catalogue has it all.

        Returns:
            How many changes there were.

        Raises:
            StateError: the log cannot be read.
        """
        parts: list[Int32Array] = []
        changes = 0
        if live_log.missed(self.log_offset):
            end = live_log.end()
            log.warning("the live log no longer has what follows %s: reading the table", self.log_offset)
            for values in live_log.table():
                parts.append(self.catalogue.apply(ItemChanges.parse(values, self.catalogue.id_type)))
                changes += len(values)
            self.log_offset = end
        for values, offset in live_log.replay(self.log_offset, REPLAYED):
            parts.append(self.catalogue.apply(ItemChanges.parse(values, self.catalogue.id_type)))
            changes += len(values)
            self.log_offset = offset
        if parts:
            changed = np.zeros(len(self.catalogue.items), np.bool_)
            for part in parts:
                changed[part] = True
            self.update(np.flatnonzero(changed).astype(np.int32))
        return changes

    def update(self, rows: Int32Array) -> list[str]:
        """Tell every channel and filter that items changed.

        One that fails is logged and goes on with what it has: it knows nothing of these items before the server's next
        start, and is told of the next ones all the same. Filters and columns judge what it returns as things are now.
        A channel that runs beside the compute takes note on its own thread, before its next call; that it failed is
        known at the next update.

        Args:
            rows: int32[m], each once.

        Returns:
            The names of those that failed.
        """
        failed = []
        components: list[tuple[str, Channel | Filter]] = [*self.channels.items(), *self.filters.items()]
        for name, component in components:
            guard = self.guards.get(name) if isinstance(component, Channel) else None
            if guard is not None and guard.beside is not None:
                if guard.beside.update(rows):
                    failed.append(name)
                continue
            try:
                component.update(rows)
            except Exception:  # whatever it raises is its own failure alone
                log.exception("%s failed to take note of %d changed items", name, rows.size)
                failed.append(name)
        return failed

    def assign(self, name: str, items: AssignedItems) -> int:
        """Have a channel take clusters of items; as `update`, between two batches.

        Args:
            name: of a channel that takes assignments.
            items: from its assignment log; those that the catalogue does not know are passed over.

        Returns:
            How many items it was told of.

        Raises:
            Exception: whatever the channel raises, unless it runs beside the compute.
        """
        items = items.newest()
        rows = np.empty(len(items), np.int32)
        find_keys(items.keys, *self.catalogue.items.key_tables, rows)
        known = rows >= 0
        told = items.take(known)
        if len(told):
            guard = self.guards.get(name)
            taker = self.channels[name] if guard is None or guard.beside is None else guard.beside
            taker.assign(rows[known], told.clusters, told.biases)
        return len(told)

    def close(self) -> None:
        """End the threads of channels that run beside the compute; it answers no more."""
        self.guards.close()


def load_context(arrays: Mapping[str, AnyArray], catalogue: LiveCatalogue) -> LoadContext:
    """Return what a channel or a filter is loaded from."""
    base = catalogue.base
    return LoadContext(arrays, len(base.items), len(base.users), catalogue.columns)


def _load_channel(
    config: Config, name: str, snapshots: Mapping[str, Snapshot], catalogue: LiveCatalogue
) -> Channel:
    loaded, options = config.channel(name)
    lender = config.snapshot_of(name)
    if loaded.needs_build and lender not in snapshots:
        raise ConfigError("the release has no snapshot of it; run `recall build`", f"channels.{lender}")
    arrays = snapshots[lender].arrays if lender in snapshots else {}
    context = load_context(arrays, catalogue)
    try:
        return loaded.load(options, context)
    except KeyError as error:
        text = f"has no array {error}, which the channel {name!r} needs; build it again"
        raise SnapshotError(text, str(snapshots[lender].path)) from error
