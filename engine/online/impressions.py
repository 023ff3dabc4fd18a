"""Impression ratio: of the items that users were shown, how many did each channel recall?

The streaming-VQ paper calls the share of impressions that come from a retriever its most sensitive online metric: a
channel whose candidates the rankers drop recalls nothing that is shown. Of a fixed share of the users, chosen by a hash
of the id, each answer is kept in the state store for a while, with the channels that proposed each item. An exposure
that is reported back, to whichever worker, is credited to all channels that proposed the item.

This is only ever counted: no request waits for it and none fails by it. What cannot be kept in time is dropped.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from engine.core.errors import StateError
from engine.core.types import AnyArray, Int64Array
from engine.online.answered import Answered
from engine.online.metrics import Metrics
from engine.online.notes import Notes
from engine.state.layout import ANSWERS, user_prefix, user_tag
from engine.state.store import StateStore

log = logging.getLogger(__name__)

ANSWERS_KEPT = 4
"""Newest answers kept per user: what is shown now may have been recalled some screens ago."""

KEPT_SECONDS = 6 * 3600

_Answer = tuple[bytes, bytes]
_Exposed = tuple[bytes, Int64Array]


class Impressions:
    """Keeps the answers of some users and credits exposures to channels, on a thread of its own."""

    def __init__(self, store: StateStore, share: float, metrics: Metrics) -> None:
        """Begin.

        Args:
            store: where answers are kept.
            share: of the users.
            metrics: where exposures and credits are counted.
        """
        self._store = store
        self._bound = round(share * 2**32)
        self._metrics = metrics
        self._failing = False
        self._notes: Notes[_Answer | _Exposed] = Notes(
            "impressions", self._handle, metrics.impressions_dropped.inc
        )

    def chosen(self, user: bytes) -> bool:
        """Whether a user, named by its tag, belongs to the share."""
        return zlib.crc32(user) < self._bound

    def answered(self, answered: Answered, keys: Int64Array) -> None:
        """Take note of a batch's answers; on the compute thread.

        Args:
            answered: the batch.
            keys: int64[items], the key of each row.
        """
        run = answered.run
        for q, request in enumerate(run.requests):
            if request.user_id is None or q in run.refused:
                continue
            user = user_tag(request.user_id)
            if self.chosen(user):
                merged = run.merged
                mine = slice(int(merged.offsets[q]), int(merged.offsets[q + 1]))
                proposals = merged.proposal_offsets[mine.start : mine.stop + 1]
                channels = merged.proposal_channels[proposals[0] : proposals[-1]]
                self._notes.put(
                    (
                        user,
                        pack(
                            answered.pipeline.channel_names,
                            keys[merged.rows[mine]],
                            np.diff(proposals),
                            channels,
                        ),
                    )
                )

    def exposed(self, exposures: Sequence[tuple[bytes, Sequence[int] | Int64Array]]) -> None:
        """Take note of reported exposures, (user's tag, keys of the items); from any thread."""
        for user, keys in exposures:
            if self.chosen(user):
                self._notes.put((user, np.array(keys, np.int64)))

    def close(self, patience: float | None = None) -> None:
        """Handle what waits, at most `patience` seconds long, and stop."""
        self._notes.close(patience)

    def _handle(self, notes: Sequence[_Answer | _Exposed]) -> None:
        try:
            self._look_up(notes)
            self._failing = False
        except StateError as error:
            self._metrics.impressions_dropped.inc(len(notes))
            if not self._failing:
                log.warning("impressions are not credited for now: %s", error)
            self._failing = True

    def _look_up(self, notes: Sequence[_Answer | _Exposed]) -> None:
        """Keep answers and look exposures up, in their order."""
        commands: list[tuple[bytes | int, ...]] = []
        asked: list[tuple[int, Int64Array]] = []
        for user, what in notes:
            key = user_prefix(self._store.prefix, user) + b":" + ANSWERS
            if isinstance(what, bytes):
                commands.append((b"LPUSH", key, what))
                commands.append((b"LTRIM", key, 0, ANSWERS_KEPT - 1))
                commands.append((b"EXPIRE", key, KEPT_SECONDS))
            else:
                asked.append((len(commands), what))
                commands.append((b"LRANGE", key, 0, -1))
        replies = self._store.pipeline(commands)
        for at, keys in asked:
            answers = replies[at]
            if isinstance(answers, Exception):
                raise StateError(f"an answer that was kept cannot be read: {answers}")
            self._credit(keys, answers)

    def _credit(self, keys: Int64Array, answers: Sequence[bytes]) -> None:
        """Credit each item to the channels of the newest answer that holds it."""
        left = dict.fromkeys(keys.tolist())
        self._metrics.impressions.inc(len(left))
        for answer in answers:
            names, known = unpack(answer)
            for key in left.keys() & known.keys():
                del left[key]
                for channel in known[key]:
                    self._metrics.impressions_credited.labels(names[channel]).inc()
        self._metrics.impressions_unknown.inc(len(left))


def pack(names: Sequence[str], keys: Int64Array, counts: Int64Array, channels: AnyArray) -> bytes:
    """Return an answer as it is kept: the channels' names, then per item its key, and its channels.

    Args:
        names: of the channels.
        keys: int64[m], of the items.
        counts: int64[m], how many channels proposed each; channels: [sum of counts], their numbers.
    """
    head = "\n".join(names).encode()
    return b"".join(
        (
            struct.pack("<II", len(head), keys.size),
            head,
            keys.astype("<i8").tobytes(),
            counts.astype("<u2").tobytes(),
            channels.astype("<u2").tobytes(),
        )
    )


def unpack(answer: bytes) -> tuple[list[str], dict[int, list[int]]]:
    """Return the names of the channels, and the numbers of each item's; what `pack` was given."""
    size, count = struct.unpack_from("<II", answer)
    names = answer[8 : 8 + size].decode().split("\n")
    at = 8 + size
    keys = np.frombuffer(answer, "<i8", count, at)
    counts = np.frombuffer(answer, "<u2", count, at + 8 * count)
    channels = np.frombuffer(answer, "<u2", -1, at + 10 * count).tolist()
    ends = np.cumsum(counts).tolist()
    return names, {
        key: channels[end - own : end]
        for key, own, end in zip(keys.tolist(), counts.tolist(), ends, strict=True)
    }
