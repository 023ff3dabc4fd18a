"""The trainer that goes on learning while others serve: from the event log to the assignment log and to bundles.

It reads two streams of the state store, what users did and what was published, in one order (`ordered.py`), so that what
it does is a function of the streams and of where it began. What it has learnt is kept in a checkpoint with the place in
the streams (`follow_files.py`): after a kill it reads again from there, and says the same again.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from recall.v1 import ingest_pb2 as pb

from engine.config import Config
from engine.core.errors import (
    BuildError,
    ConfigError,
    SnapshotError,
    StateError,
    StateUnavailableError,
)
from engine.core.int_table import IntTable
from engine.core.keys import keys_of_cells
from engine.core.types import AnyArray, Int32Array, Int64Array
from engine.data.catalogue import Catalogue
from engine.data.changes import ItemChanges
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue
from engine.data.snapshot import CATALOGUE, Release, SnapshotStore
from engine.models.encoded import EncodedUsers
from engine.models.features import Encoder, encode_live, hash_codes, load_encoded, take_encoded
from engine.models.spec import USER_ID
from engine.models.streaming_options import StreamingOptions
from engine.models.vq_spec import PUBLISHED, VqSpec
from engine.offline.follow_files import FollowFiles, Moment, position_of
from engine.offline.joining import Impressions, Joiner
from engine.offline.ordered import Happened, OrderedStreams, Published
from engine.state.assignments import AssignedItems, AssignmentLog, Lease
from engine.state.events import EventLog
from engine.state.history import HISTORY, SnapshotHistory
from engine.state.log import LiveLog
from engine.state.store import StateStore
from engine.state.stream import START, offset_key

if TYPE_CHECKING:
    from engine.training.impressions import ImpressionBatch
    from engine.training.streaming_trainer import StreamingTrainer

log = logging.getLogger(__name__)

LEASE_SECONDS = 6.0
"""After so long without a sign of life a trainer is taken for dead."""

CHECKPOINT_SECONDS = 30.0
"""How often what was learnt is kept: so much of the stream, at most, is read again after a kill."""

TELL_SECONDS = 5.0

TURN_SECONDS = 0.5
"""After so long, and the step under way, it is looked whether the lease holds and whether it is time for a checkpoint."""

_FORM = "2"
"""Of the checkpoint: another one is not read."""

_PUBLICATIONS = 1000
_RETRY_SECONDS = 0.25

Returned = TypeVar("Returned")


@dataclass(frozen=True, slots=True)
class Told:
    """How far a trainer is.

    Attributes:
        events: taken in since it was started.
        events_per_second, assignments_per_second: since it was last told.
        waiting: events in the log that are not taken in.
        lag_seconds: age of the newest entry taken in while others wait; else 0.
        pending: impressions that wait for their rewards.
        steps: in all.
        loss: mean since it was last told; NaN where nothing was learnt.
        unknown: events of items that nobody published, since it was started.
        crowded_out: items published since the build that share a row of embeddings, as none was spare.
        release: the last one it published; "" before that.
    """

    events: int
    events_per_second: float
    assignments_per_second: float
    waiting: int
    lag_seconds: float
    pending: int
    steps: int
    loss: float
    unknown: int
    crowded_out: int
    release: str


@dataclass(slots=True)
class _Since:
    """What happened since it was last told."""

    began: float
    events: int = 0
    assignments: int = 0
    loss: float = 0.0
    steps: int = 0


class LeaseLostError(StateError):
    """Another trainer has begun, or this one gave no sign of life for too long."""


class Follower:
    """Trains one channel from the event log until it is told to stop."""

    def __init__(
        self,
        config: Config,
        channel: str,
        snapshots: SnapshotStore,
        store: StateStore,
        events: EventLog,
        threads: int = 1,
        tell: Callable[[Told], None] = lambda told: None,
    ) -> None:
        """Load the channel's snapshot of the release in service; nothing is written yet.

        Args:
            config: the configuration.
            channel: which one; of one that loads another's snapshot, that other is trained.
            snapshots: where releases are.
            store: the state store.
            events: the event log.
            threads: cores to use.
            tell: told every few seconds how far it is, on the thread that runs it.

        Raises:
            ConfigError: the channel does not learn from a stream.
            SnapshotError: no release is in service, or it has no snapshot of the channel.
        """
        self._config, self._snapshots, self._store, self._events = config, snapshots, store, events
        self._name = config.snapshot_of(channel)
        options = getattr(config.channel(self._name)[1], "training", None)
        if not isinstance(options, StreamingOptions):
            raise ConfigError(f"the channel {channel!r} does not learn from a stream", "CHANNEL")
        self._options = options
        self._threads = threads
        self._tell = tell
        self._live = LiveLog(store)
        self._log = AssignmentLog(store, self._name)
        release = snapshots.current()
        if release is None:
            raise SnapshotError("no release is in service; run `recall build`", str(snapshots.root))
        for needed in (CATALOGUE, HISTORY, self._name):
            if needed not in release.snapshots:
                raise SnapshotError(f"has no {needed}; run `recall build`", f"release {release.name}")
        self._base = snapshots.open(self._name, release.snapshots[self._name], verify=True)
        self._run = position_of(self._base).run
        self._open_catalogue(release)
        self._files = FollowFiles(self._name, snapshots, self._base, self._run, config.store.keep_releases)
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._said_refused = 0
        self._since = _Since(time.monotonic())
        self._taken = self._unknown = 0
        self._entry_ms = 0

    @property
    def run_name(self) -> str:
        """The run: the version of the snapshot that it began with."""
        return self._run

    def run(self, stop: threading.Event) -> None:
        """Train until told to stop; then keep what was learnt, and let go of the lease.

        Args:
            stop: ends it when set.

        Raises:
            StateError: another trainer has the lease, or has taken it meanwhile; the store cannot be used.
            ConfigError, BuildError: the options do not fit the snapshot, or the training fails.
        """
        self._stop = stop
        with ExitStack() as stack:
            self._prepare(stack)  # seconds, in which the lease of a trainer that was killed runs out
            self._lease = self._log.lease(LEASE_SECONDS)
            self._take(self._lease)
            self._train(self._lease, stop)

    def _train(self, lease: Lease, stop: threading.Event) -> None:
        renewing = threading.Thread(target=self._renew, args=(lease,), name="lease", daemon=True)
        renewing.start()
        try:
            self._begin()
            self._say()
            checkpoint = time.monotonic() + CHECKPOINT_SECONDS
            dump = time.monotonic() + self._options.dump_minutes * 60
            while not stop.is_set():
                self._turn()
                self._check_lease()
                now = time.monotonic()
                if now - self._since.began >= TELL_SECONDS:
                    self._say()
                self._files.look()
                if not self._files.busy and now >= dump:
                    self._files.publish(self._moment(), self._new_trainer)
                    dump, checkpoint = now + self._options.dump_minutes * 60, now + CHECKPOINT_SECONDS
                elif not self._files.busy and now >= checkpoint:
                    self._files.keep(self._moment())
                    checkpoint = now + CHECKPOINT_SECONDS
            self._files.keep(self._moment())
            self._files.look(wait=True)
            self._say()
        finally:
            stop.set()
            renewing.join(LEASE_SECONDS)
            self._files.close()
            try:
                lease.let_go()
            except StateError as error:
                log.warning("the lease of %s runs out by itself: %s", self._name, error)

    # --- the beginning -----------------------------------------------------------------------------------------

    def _open_catalogue(self, release: Release) -> None:
        arrays = self._base.arrays
        snapshot = self._snapshots.open(CATALOGUE, release.snapshots[CATALOGUE])
        catalogue = Catalogue.load(snapshot.arrays)
        history = self._snapshots.open(HISTORY, release.snapshots[HISTORY])
        self._history = SnapshotHistory(history.arrays)
        self._catalogue_offset = snapshot.manifest.log_offset
        self._catalogue_version = release.snapshots[CATALOGUE]
        self._live_catalogue = LiveCatalogue.of(catalogue)
        try:
            self._spec = VqSpec.model_validate_json(bytes(arrays["spec"]))
            self._encoders = (
                Encoder.load("user", self._spec.tower.user_features, arrays),
                Encoder.load("item", self._spec.tower.item_features, arrays),
            )
            self._user_table = load_encoded(arrays, "encoded.user")
            self._item_table = load_encoded(arrays, "encoded.item")
        except (KeyError, ValueError) as error:
            raise SnapshotError(f"no bundle of streaming VQ: {error}", str(self._base.path)) from error
        self._known_users = len(catalogue.users)
        self._users = _table_of(catalogue.users)
        self._user_keys: list[int] = []
        self._items = _table_of(catalogue.items)
        self._base_items = len(catalogue.items)
        self._new_keys: list[int] = []
        self._learnt = IntTable()  # what a trainer before had learnt of items that the build did not know
        if PUBLISHED + "keys" in arrays:
            self._learnt.put(*_numbered(arrays[PUBLISHED + "keys"].tolist(), 0))
        encoder = self._encoders[0]
        self._hashed_user = (-1, 0)
        for feature in encoder.features:
            if feature.name == USER_ID and feature.lookup == "hash":
                self._hashed_user = (encoder.code_column(USER_ID), feature.size)

    def _take(self, lease: Lease) -> None:
        """Take the lease. One that nobody renews is waited for: its trainer was killed."""
        until = time.monotonic() + 2 * LEASE_SECONDS
        left = lease.left()
        while not lease.take():
            time.sleep(0.2)
            before, left = left, lease.left()
            if left > before or time.monotonic() > until:
                raise StateError(
                    f"a trainer of {self._name} runs already: it holds the lease {self._log.key}:lease"
                )

    def _renew(self, lease: Lease) -> None:
        alive = time.monotonic()
        while not self._stop.wait(LEASE_SECONDS / 6):
            try:
                if not lease.renew():
                    break
                alive = time.monotonic()
            except StateError as error:
                log.warning("the lease of %s cannot be renewed: %s", self._name, error)
        else:
            return
        log.error(
            "the lease of %s is lost, %.1f s after it was renewed", self._name, time.monotonic() - alive
        )
        self._lost.set()

    def _check_lease(self) -> None:
        if self._lost.is_set():
            raise LeaseLostError(
                f"the lease {self._log.key}:lease is lost: another trainer has begun, or this one gave no sign of life"
                f" for {LEASE_SECONDS:g} s; start it again to go on from its checkpoint"
            )

    def _prepare(self, stack: ExitStack) -> None:
        """Make what trains. `stack` ends with the training."""
        try:
            from engine.training.trainer import torch_threads
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "torch":
                raise
            raise BuildError(
                "training needs PyTorch, which is not installed: pip install 'recall-engine[train]'"
            ) from error
        stack.enter_context(torch_threads(self._threads))
        self._warm_up()
        self._trainer = self._new_trainer(self._threads)
        self._joiner = Joiner(
            self._options.tasks,
            self._config.interest,
            self._options.label_seconds,
            self._spec.read,
            self._stored_history,
        )
        self._streams = OrderedStreams(self._events, self._live, self._catalogue_offset, self._patiently)
        self._last_written = position_of(self._base).offset

    def _warm_up(self) -> None:
        """Do everything once, and throw away what comes of it: neither the lease nor the first events wait for what that
        loads or compiles."""
        kind = self._live_catalogue.id_type
        change = pb.ItemChange(item_id=0, put=pb.Item(tags=["warm-up"]))
        if kind == "string":
            change.item_key = "warm-up"
        nothing = LiveCatalogue.of(Catalogue.of_nothing(kind))
        nothing.apply(ItemChanges.parse([change.SerializeToString()], kind))
        one = np.zeros(1, np.int32)
        trainer = self._new_trainer()
        trainer.add_items(encode_live(self._encoders[1], self._item_table, self._live_catalogue.columns, one))
        trainer.assign(one)
        no_history, rewards = np.zeros((1, self._spec.read), np.int32), np.ones((1, len(self._options.tasks)))
        zero = np.zeros(1, np.int64)
        due = Impressions(zero, one, rewards.astype(np.float32), zero, no_history, one)
        trainer.step(self._batch(due))
        self._items.get(zero)

    def _begin(self) -> None:
        """Go on from the checkpoint, or from the snapshot."""
        kept = self._files.load(self._identity())
        stored = bytes(self._base.arrays.get("event_position", np.empty(0, np.uint8))).decode()
        if kept is not None and offset_key(stored or START) > offset_key(kept["events"]):
            kept = None  # another machine has trained on, and its bundle says more
        other = self._patiently(lambda: self._log.begin(self._run, self._lease))
        if kept is None:
            self._streams.events_at = stored or self._patiently(self._events.oldest)
            if other:
                log.info("a new run of %s, %s, from its snapshot", self._name, self._run)
        else:
            self._restore(kept)
            log.info(
                "%s goes on from its checkpoint, at %s of the event log", self._name, self._streams.events_at
            )
        self._trimmed_publications()
        unassigned = np.flatnonzero(self._trainer.assignment < 0).astype(np.int32)
        if unassigned.size:
            self._assign(unassigned)

    def _new_trainer(self, threads: int = 1) -> StreamingTrainer:
        """Return a trainer as it is at the beginning of the run."""
        from engine.training.streaming_trainer import StreamingTrainer

        spec, options = self._spec, self._options
        return StreamingTrainer(
            spec, options, self._item_table, self._base.arrays, threads, options.spare_rows
        )

    def _identity(self) -> str:
        """Name what a checkpoint must be of: this run, catalogue, model and training."""
        parts = (
            _FORM,
            self._run,
            self._catalogue_version,
            self._spec.model_dump_json(),
            self._options.model_dump_json(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _restore(self, kept: Mapping[str, Any]) -> None:
        self._trainer.restore(kept["trainer"])
        self._joiner.restore(kept["joiner"])
        self._streams.events_at = kept["events"]
        self._last_written = kept["written"]
        self._user_keys, self._new_keys = kept["users"].tolist(), kept["items"].tolist()
        self._users.put(*_numbered(self._user_keys, self._known_users))
        self._items.put(*_numbered(self._new_keys, self._base_items))
        # The catalogue as it was then: what codes of tags and cities mean depends on what came before.
        until, streams = offset_key(kept["live"]), self._streams
        if not self._patiently(lambda: self._live.missed(streams.news_at)):
            while entries := self._patiently(lambda: self._live.read(streams.news_at, _PUBLICATIONS)):
                mine = [(offset, value) for offset, value in entries if offset_key(offset) <= until]
                if mine:
                    values = [value for _, value in mine]
                    self._live_catalogue.apply(ItemChanges.parse(values, self._live_catalogue.id_type))
                if len(mine) < len(entries):
                    break
                streams.news_at = mine[-1][0]
            streams.news_at = kept["live"]

    def _trimmed_publications(self) -> None:
        """Read the table of items where the live log no longer has what follows."""
        streams = self._streams
        if not self._patiently(lambda: self._live.missed(streams.news_at)):
            return
        end = self._patiently(self._live.end)
        log.warning("the live log no longer has what follows %s: reading the table", streams.news_at)
        for values in self._live.table():
            self._publish(values)
        streams.news_at = end

    def _stored_history(self, user: int) -> tuple[Int64Array, Int32Array]:
        if user >= self._known_users:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        history = self._history.histories(np.array([user], np.int32))
        return history.timestamps[::-1], history.rows[::-1]

    # --- the streams -------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Read what came and take in what is known to be in order, for a while: much may have come meanwhile."""
        streams = self._streams
        streams.read()
        until = time.monotonic() + TURN_SECONDS
        while time.monotonic() < until and not self._stop.is_set() and not self._lost.is_set():
            found = streams.take()
            if isinstance(found, Published):
                self._publish(found.values)
                streams.news_at = found.offset
            elif isinstance(found, Happened):
                self._take_in(found)
                streams.events_at = found.offset
            else:
                return

    def _take_in(self, entry: Happened) -> None:
        """Take in the events of one entry, and learn what is due."""
        records = entry.records
        items = self._items.get(np.ascontiguousarray(records["item"]))
        self._unknown += int((items < 0).sum())
        users = self._user_numbers(np.ascontiguousarray(records["user"]))
        written = np.full(records.size, entry.written_ms // 1000, np.int64)
        self._joiner.take(users, items, records["kind"], records["value"], records["time"], written)
        self._taken += records.size
        self._since.events += records.size
        self._entry_ms = entry.written_ms
        text, refused = self._joiner.refused
        if refused > self._said_refused:
            log.error("%d events are refused so far, the newest one since %s", refused, text)
            self._said_refused = refused * 2  # each time twice as many
        while (due := self._joiner.give(self._options.batch)) is not None:
            self._step(due)

    def _user_numbers(self, keys: Int64Array) -> Int64Array:
        """Return a number per user: the row of one whom the catalogue has, else the next ones behind."""
        numbers = self._users.get(keys).astype(np.int64)
        for at in np.flatnonzero(numbers < 0).tolist():
            key = int(keys[at])
            known = int(self._users.get(keys[at : at + 1])[0])
            if known < 0:
                known = self._known_users + len(self._user_keys)
                self._user_keys.append(key)
                self._users.put(keys[at : at + 1].copy(), np.array([known], np.int32))
            numbers[at] = known
        return numbers

    def _step(self, due: Impressions) -> None:
        result = self._trainer.step(self._batch(due))
        said = [self._keyed(result.items, result.clusters, result.biases)]
        if result.loss == result.loss:
            self._since.loss += result.loss
            self._since.steps += 1
        turn = self._trainer.candidates(round(self._options.candidate_share * len(due)))
        if turn.size:
            before = self._trainer.assignment[turn], self._trainer.biases[turn]
            clusters, biases = self._trainer.assign(turn)
            moved = (clusters != before[0]) | (biases != before[1])
            said.append(self._keyed(turn[moved], clusters[moved], biases[moved]))
        self._write(AssignedItems.join(said))

    def _batch(self, due: Impressions) -> ImpressionBatch:
        """Return impressions as the trainer learns them: with the features of their users."""
        from engine.training.impressions import ImpressionBatch

        rows = np.where(due.users < self._known_users, due.users, -1).astype(np.int32)
        own = take_encoded(self._user_table, rows)
        column, size = self._hashed_user
        if column >= 0 and (rows < 0).any():
            new = np.flatnonzero(rows < 0)
            keys = [self._user_keys[int(due.users[at]) - self._known_users] for at in new]
            own.codes[new, column] = hash_codes(np.array(keys, np.int64), size)
        encoded = EncodedUsers(own.codes, own.multi, own.numbers, due.sequence, due.lengths)
        users = due.users.astype(np.int32)
        return ImpressionBatch(users, encoded, due.items, due.rewards, due.timestamps)

    def _publish(self, values: list[bytes]) -> None:
        """Take in what was published; items that are new get a row and, at once, a cluster."""
        changes = ItemChanges.parse(values, self._live_catalogue.id_type)
        rows = self._live_catalogue.apply(changes)
        rows = rows[rows >= self._base_items]
        keys = self._live_catalogue.columns.keys[rows]
        new = self._items.get(np.ascontiguousarray(keys)) < 0
        rows, keys = rows[new], keys[new]
        if not rows.size:
            return
        columns = self._live_catalogue.columns
        encoded = encode_live(self._encoders[1], self._item_table, columns, rows)
        keys = np.ascontiguousarray(keys)
        added = self._trainer.add_items(encoded, self._learnt.get(keys))
        self._items.put(keys, added)
        self._new_keys += keys.tolist()
        if self._options.spare_rows and 0 < self._crowded_out <= keys.size:  # the first ones
            log.warning(
                "more items were published than the %s spare rows of %s: the others share one until the next build; "
                "set training.spare_rows",
                f"{self._options.spare_rows:,}", self._name,
            )  # fmt: skip
        self._assign(added)

    @property
    def _crowded_out(self) -> int:
        return len(self._new_keys) - self._trainer.learning

    def _assign(self, rows: Int32Array) -> None:
        self._write(self._keyed(rows, *self._trainer.assign(rows)))

    def _keyed(self, rows: Int32Array, clusters: Int32Array, biases: AnyArray) -> AssignedItems:
        keys = self._live_catalogue.columns.keys[np.minimum(rows, self._base_items - 1)].copy()
        late = rows >= self._base_items
        if late.any():
            keys[late] = [self._new_keys[row - self._base_items] for row in rows[late].tolist()]
        return AssignedItems(keys, clusters, biases)

    def _write(self, items: AssignedItems) -> None:
        offset = self._patiently(lambda: self._log.write(items, self._run, self._lease))
        self._last_written = offset or self._last_written
        self._since.assignments += len(items)

    def _patiently(self, ask: Callable[[], Returned]) -> Returned:
        """Ask the store until it answers; what the trainer holds stays right meanwhile."""
        said = False
        while True:
            try:
                return ask()
            except StateUnavailableError as error:
                self._check_lease()
                if self._stop.is_set():
                    raise
                if not said:
                    log.error("the trainer of %s waits for the state store: %s", self._name, error)
                said = True
                time.sleep(_RETRY_SECONDS)

    # --- what is kept ------------------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        """Return all that there is to keep, a copy."""
        return Moment(
            identity=self._identity(),
            trainer=self._trainer.state(),
            joiner=self._joiner.state(),
            events=self._streams.events_at,
            live=self._streams.news_at,
            written=self._last_written,
            users=np.array(self._user_keys, np.int64),
            items=np.array(self._new_keys, np.int64),
        )

    def _say(self) -> None:
        since, now = self._since, time.monotonic()
        seconds = max(now - since.began, 1e-9)
        behind = self._streams.waiting
        self._tell(
            Told(
                events=self._taken,
                events_per_second=since.events / seconds,
                assignments_per_second=since.assignments / seconds,
                waiting=behind,
                lag_seconds=max(0.0, time.time() - self._entry_ms / 1000)
                if behind and self._entry_ms
                else 0.0,
                pending=len(self._joiner),
                steps=self._trainer.steps,
                loss=since.loss / since.steps if since.steps else float("nan"),
                unknown=self._unknown,
                crowded_out=self._crowded_out,
                release=self._files.release,
            )
        )
        self._since = _Since(now)


def _table_of(ids: IdIndex) -> IntTable:
    """Return a table from the key of each id to its row."""
    rows = np.arange(len(ids), dtype=np.int32)
    cells = ids.encoded(rows)
    table = IntTable()
    table.put(np.ascontiguousarray(cells) if cells.ndim == 1 else keys_of_cells(cells), rows)
    return table


def _numbered(keys: list[int], first: int) -> tuple[Int64Array, Int32Array]:
    return np.array(keys, np.int64), np.arange(first, first + len(keys), dtype=np.int32)
