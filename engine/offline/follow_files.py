"""What a trainer that follows writes to disk, on a thread beside the one that trains: checkpoints and releases.

Both are made of one `Moment`, a copy that the training thread makes between two steps and goes on: tables and tensors, so
that it takes as long as copying memory does. Whatever takes longer is done here: packing, the ranking step's vectors of
all items, the lists of the clusters, hashing, writing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.errors import BuildError, RecallError
from engine.core.types import AnyArray, Int64Array
from engine.data.snapshot import Snapshot, SnapshotStore
from engine.models.cluster_lists import as_served
from engine.models.vq_spec import PUBLISHED
from engine.offline.joining import JoinerState
from engine.state.assignments import Position

if TYPE_CHECKING:
    from engine.training.streaming_trainer import StreamingTrainer

log = logging.getLogger(__name__)

OWN_RELEASES = 2
"""Releases of the trainer's own making that stay, the one in service included: the others are those of builds."""


class OtherRunError(BuildError):
    """Somebody has put another training of the channel in service."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What a trainer knew between two steps, all of the same moment; nobody changes it any more.

    Attributes:
        identity: what a checkpoint must be of to be gone on with.
        trainer: `StreamingTrainer.state`.
        joiner: impressions that wait, and histories.
        events, live: up to where the two streams are taken in.
        written: the last entry of the assignment log.
        users, items: int64[n], keys of those that the build did not know, in the order of their numbers.
    """

    identity: str
    trainer: Mapping[str, Any]
    joiner: JoinerState
    events: str
    live: str
    written: str
    users: Int64Array
    items: Int64Array


class FollowFiles:
    """Writes the checkpoints and releases of one run.

    Attributes:
        release: the last one that was published; "" before that.
    """

    def __init__(
        self, name: str, snapshots: SnapshotStore, base: Snapshot, run: str, keep_releases: int
    ) -> None:
        """Write nothing yet.

        Args:
            name: of the channel.
            snapshots: where releases are; the checkpoint lies beside them.
            base: the snapshot that the training began with.
            run: its run.
            keep_releases: releases that stay when one is published.
        """
        self._name, self._snapshots, self._base, self._run = name, snapshots, base, run
        self._keep_releases = keep_releases
        self._folder = snapshots.root / ".work" / f"follow-{name}"
        self._beside = ThreadPoolExecutor(1, "follow-files")
        self._writing: list[Future[None]] = []
        self._releases: list[str] = []

    @property
    def release(self) -> str:
        """The last release that was published; "" before that."""
        return self._releases[-1] if self._releases else ""

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return bool(self._writing)

    def load(self, identity: str) -> Mapping[str, Any] | None:
        """Return what the last checkpoint holds, as `Moment` names it, the joiner packed; None where there is none of
        this identity."""
        from engine.training import checkpoint

        kept = checkpoint.load(self._folder, identity)
        if kept is None:
            return None
        self._releases = list(kept["releases"])
        arrays = {
            name: {part: each.numpy() for part, each in kept[name].items()} for name in ("joiner", "keys")
        }
        return {**kept, "joiner": arrays["joiner"], **arrays["keys"]}

    def keep(self, moment: Moment) -> None:
        """Have a checkpoint written."""
        self._writing.append(self._beside.submit(self._write_checkpoint, moment))

    def publish(self, moment: Moment, twin: Callable[[], StreamingTrainer]) -> None:
        """Have a checkpoint written, and a release published.

        Args:
            moment: what is written.
            twin: makes a trainer of the same model, to become the one of that moment beside the one that goes on.
        """
        self.keep(moment)
        self._writing.append(self._beside.submit(self._write_release, moment, twin))

    def look(self, wait: bool = False) -> None:
        """Say what went wrong with those that are written, or have been where all are waited for.

        Raises:
            OtherRunError: a release is in service that is not of this run.
        """
        while self._writing and (wait or self._writing[0].done()):
            try:
                self._writing.pop(0).result()
            except OtherRunError:
                raise
            except (RecallError, OSError) as error:
                log.error(
                    "%s: what was learnt could not be written, it is tried again: %s", self._name, error
                )

    def close(self) -> None:
        """Wait until all is written."""
        self._beside.shutdown(wait=True)

    def _write_checkpoint(self, moment: Moment) -> None:
        from engine.training import checkpoint

        state = {
            "identity": moment.identity,
            "trainer": moment.trainer,
            "joiner": checkpoint.tensors(moment.joiner.packed()),
            "keys": checkpoint.tensors({"users": moment.users, "items": moment.items}),
            "events": moment.events,
            "live": moment.live,
            "written": moment.written,
            "releases": list(self._releases),
        }
        checkpoint.save(self._folder, state)

    def _write_release(self, moment: Moment, twin: Callable[[], StreamingTrainer]) -> None:
        snapshots, manifest = self._snapshots, self._base.manifest
        current = snapshots.current()
        if current is None or self._name not in current.snapshots:
            raise BuildError(f"no release with {self._name} is in service any more")
        there = snapshots.open(self._name, current.snapshots[self._name])
        if position_of(there).run != self._run:
            raise OtherRunError(
                f"release {current.name} has another {self._name} than the one that is trained here, of run {self._run}:"
                " start the trainer again to go on from it"
            )
        trainer = twin()
        trainer.restore(dict(moment.trainer))
        learnt = trainer.arrays()
        learnt["log_position"] = _text(str(Position(self._run, moment.written)))
        learnt["event_position"] = _text(moment.events)
        learnt[PUBLISHED + "keys"] = moment.items[: trainer.learning]
        if "learnt_until" in self._base.arrays:
            until = max(int(self._base.arrays["learnt_until"][0]), moment.joiner.until)
            learnt["learnt_until"] = np.array([until], np.int64)
        with snapshots.begin(
            self._name,
            parameters=manifest.parameters,
            dataset=manifest.dataset,
            catalogue=manifest.catalogue,
            log_offset=manifest.log_offset,
        ) as writer:
            before = {
                name: array for name, array in self._base.arrays.items() if not name.startswith(PUBLISHED)
            }
            for name, array in {**before, **as_served(trainer.spec, learnt)}.items():
                writer.write(name, np.ascontiguousarray(array))
        release = snapshots.publish({**current.snapshots, self._name: writer.version})
        self._releases.append(release.name)
        if len(self._releases) > OWN_RELEASES:
            snapshots.retire(self._releases[:-OWN_RELEASES])
            del self._releases[:-OWN_RELEASES]
        snapshots.collect(self._keep_releases)
        log.info("release %s is in service, at %s of the event log", release.name, moment.events)


def position_of(snapshot: Snapshot) -> Position:
    """Return how much of the assignment log a snapshot holds; its run always named."""
    text = bytes(np.asarray(snapshot.arrays.get("log_position", np.empty(0, np.uint8)))).decode()
    position = Position.parse(text)
    return position if position.run else Position(snapshot.manifest.version)


def _text(text: str) -> AnyArray:
    return np.frombuffer(text.encode(), np.uint8)
