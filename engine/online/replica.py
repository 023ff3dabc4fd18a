"""A replica: one release loaded into memory, its channels alive, a pipeline for each scene."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import Config
from engine.core.channel import Channel, LoadContext
from engine.core.errors import ConfigError, SnapshotError
from engine.core.types import AnyArray
from engine.data.catalogue import Catalogue
from engine.data.live import LiveCatalogue
from engine.data.snapshot import CATALOGUE, Snapshot, SnapshotStore
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.state.history import HISTORY, SnapshotHistory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """What answers requests.

    Attributes:
        release: the release's name.
        versions: component -> snapshot version.
        catalogue: items, users and their columns.
        pipelines: scene -> pipeline.
    """

    release: str
    versions: Mapping[str, str]
    catalogue: LiveCatalogue
    pipelines: Mapping[str, Pipeline]

    @classmethod
    def open(cls, config: Config, store: SnapshotStore, verify: bool = True) -> Replica:
        """Load the store's newest release that is whole; a damaged one is logged and the one before it serves.

        Args:
            config: scenes and channels.
            store: where the releases are.
            verify: hold every file to its checksum first.

        Raises:
            SnapshotError: if no release is whole, or none was ever published.
            ConfigError: if a scene uses a channel that the release has no snapshot of.
        """
        release, snapshots, refused = store.newest_valid(verify=verify)
        for error in refused:
            log.error("release refused, an earlier one serves: %s", error)
        return cls.of(config, release.name, snapshots)

    @classmethod
    def of(cls, config: Config, release: str, snapshots: Mapping[str, Snapshot]) -> Replica:
        """Make a replica of loaded snapshots; errors as in `open`."""
        for needed in (CATALOGUE, HISTORY):
            if needed not in snapshots:
                raise SnapshotError(f"has no {needed}; run `recall build`", f"release {release}")
        catalogue = Catalogue.load(snapshots[CATALOGUE].arrays)
        live = LiveCatalogue.of(catalogue)
        hydrator = Hydrator(live.items, live.users, SnapshotHistory(snapshots[HISTORY].arrays))
        wanted = {name for scene in config.scenes.values() for name in (*scene.quotas, *scene.fallback)}
        channels = {
            name: _load_channel(config, name, snapshots, live) for name in config.channels if name in wanted
        }
        filter_names = {name for scene in config.scenes.values() for name in scene.filters}
        filters = {}
        for name in sorted(filter_names):
            loaded, options = config.filter(name)
            filters[name] = loaded.load(options, load_context({}, live))
        pipelines = {
            name: Pipeline(scene, channels, filters, hydrator, config.server.reserve_ms)
            for name, scene in config.scenes.items()
        }
        versions = {component: snapshot.manifest.version for component, snapshot in snapshots.items()}
        return cls(release, versions, live, pipelines)


def load_context(arrays: Mapping[str, AnyArray], catalogue: LiveCatalogue) -> LoadContext:
    """Return what a channel or a filter is loaded from."""
    base = catalogue.base
    return LoadContext(arrays, len(base.items), len(base.users), catalogue.columns)


def _load_channel(
    config: Config, name: str, snapshots: Mapping[str, Snapshot], catalogue: LiveCatalogue
) -> Channel:
    loaded, options = config.channel(name)
    if loaded.needs_build and name not in snapshots:
        raise ConfigError("the release has no snapshot of it; run `recall build`", f"channels.{name}")
    arrays = snapshots[name].arrays if name in snapshots else {}
    context = load_context(arrays, catalogue)
    try:
        return loaded.load(options, context)
    except KeyError as error:
        text = f"has no array {error}, which the channel {name!r} needs; build it again"
        raise SnapshotError(text, str(snapshots[name].path)) from error
