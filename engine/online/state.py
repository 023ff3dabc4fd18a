"""The state store as a server or a build uses it: the connection, and what reads and writes through it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from engine.config import Config
from engine.core.exposure import ExposureLayout
from engine.core.types import AnyArray, Int32Array, Int64Array
from engine.data.live import LiveCatalogue
from engine.online.metrics import Metrics
from engine.state.embedded import EmbeddedStore
from engine.state.events import EventLog
from engine.state.exposure import exposure_backend
from engine.state.history import ReadUsers, SnapshotHistory, UserRead, UserState
from engine.state.log import LiveLog
from engine.state.recall_counts import RecallCounts
from engine.state.store import StateStore
from engine.state.url import state_url
from engine.state.users import LiveUsers
from engine.state.writes import UserLimits, UserStore

NONE = "none"
"""What `state.url` says where there is to be no state store."""

FOLDER = "state"
"""Where in the folder of the snapshots the embedded store keeps its data."""


class State:
    """What the state store is to a server.

    Attributes:
        store: the connection.
        users: writes what users did.
        recall_counts: writes how often leftovers were recalled.
        log: the live log.
        events: the event log; None where the configuration wants none.
        exposure: who keeps exposures.
        metrics: of the server that uses it.
    """

    def __init__(self, config: Config, store: StateStore) -> None:
        """Use a connected store as the configuration says."""
        self._config = config
        self.metrics = Metrics()
        settings = config.state
        exposure = settings.exposure
        layout = ExposureLayout(exposure.planned, exposure.bits, exposure.hashes)
        self.store = store
        self.exposure = exposure_backend(exposure.backend, layout, exposure.slice_seconds, exposure.slices)
        self._limits = UserLimits(
            recent=settings.recent,
            follows=settings.follows,
            dislikes=settings.dislikes,
            leftovers=settings.leftovers,
            event_ids=settings.event_ids,
            user_seconds=max(1, round(settings.user_days * 86_400)),
            slice_seconds=exposure.slice_seconds,
            slices=exposure.slices,
        )
        self.users = UserStore(store, self._limits, self.exposure)
        self.recall_counts = RecallCounts(store)
        self.log = LiveLog(store)
        ingest = config.ingest
        self.events = EventLog(store, ingest.event_log_length) if ingest.event_log else None

    def live_users(
        self, catalogue: LiveCatalogue, history: SnapshotHistory, store: StateStore | None = None
    ) -> UserState:
        """Return what reads users: their live state in front of what the release knows.

        Args:
            catalogue: whose rows are answered.
            history: of the release.
            store: where to read; None: this store.
        """
        config = self._config

        users = LiveUsers(
            self.store if store is None else store,
            self._limits,
            catalogue,
            history,
            config.interest,
            config.history.keep,
            self.exposure,
        )
        return MeasuredUsers(users, self.metrics)


class MeasuredUsers:
    """A `UserState` whose reads are measured."""

    def __init__(self, users: UserState, metrics: Metrics) -> None:
        self._users = users
        self._metrics = metrics

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Ask; what reads notes how long it took, without what was done in between, and whether the store answered."""
        began = time.perf_counter()
        read = self._users.ask(user_ids)
        return partial(self._read, read, time.perf_counter() - began)

    def _read(
        self, read: ReadUsers, spent: float, users: Int32Array, now: Int64Array, cities: Int32Array
    ) -> UserRead:
        began = time.perf_counter()
        known = read(users, now, cities)
        self._metrics.state_read_seconds.observe(spent + time.perf_counter() - began)
        if not known.live.available:
            self._metrics.state_unavailable.inc()
        return known


@contextmanager
def open_state(config: Config, begin: bool = True) -> Iterator[State | None]:
    """Connect to the state store that the configuration names for as long as the context lasts.

    Where it names none, that is the embedded store in the folder of the snapshots, which is started, and stopped in the
    end, unless another process serves it already.

    Args:
        config: the configuration; the environment's RECALL_STATE_URL stands in for `state.url`.
        begin: whether to make an embedded store where there never was one.

    Yields:
        The store; None where the configuration wants none, or there is none to begin with.

    Raises:
        StateError: it cannot be had.
    """
    url = state_url(config.state.url, config.state.password_file)
    folder = config.store.path / FOLDER
    if url == NONE or (not url and not begin and not folder.is_dir()):
        yield None
        return
    embedded = None if url else EmbeddedStore(folder, config.state.durability)
    try:
        address = url if embedded is None else embedded.start()
        store = StateStore.connect(address, config.state.prefix, config.state.timeout_ms)
        try:
            yield State(config, store)
        finally:
            store.close()
    finally:
        if embedded is not None:
            embedded.stop()
