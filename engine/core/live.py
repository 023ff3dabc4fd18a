"""What the state store knows of the users of a batch, beside their histories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from engine.core.candidates import FanOut
from engine.core.types import BoolArray, Float32Array, Int32Array, Int64Array, RaggedRows


class Exposure(Protocol):
    """What the users of a batch were shown."""

    def seen(self, candidates: FanOut, keys: Int64Array) -> BoolArray:
        """Return bool[m]: True where the user of the candidate's query was shown it; never False if they were.

        Args:
            candidates: the fan-out.
            keys: int64[items], the key of each row (`ItemColumns.keys`).

        Raises:
            StateUnavailableError: what is kept of a user cannot be read.
        """

    def shown(self) -> Int64Array:
        """int64[n]: how many items each user was shown, about; for `Filter.overfetch`."""

    def alone(self, q: int) -> Exposure:
        """Return query q's part as that of a batch of one."""

    def measure(self, seed: int) -> tuple[int, int, int, int]:
        """Ask for random keys that nobody was ever shown, the same for every user of whom there are bits.

        Returns:
            How many were asked for, how many of them are said to be seen (false positives), and how many bits are
            set of how many (0 of 0 where the exposures are not kept as bits in the state store).
        """


class Leftovers(NamedTuple):
    """What an earlier fine ranking of each user left over, newest first; query q owns [offsets[q], offsets[q + 1]).

    Attributes:
        rows: int32[m], catalogue rows, each at most once per query.
        scores: float32[m], the ranker's own.
        timestamps: int64[m], when it was reported, seconds since the epoch.
        recalls: int32[m], how often it was recalled since.
        offsets: int64[n + 1].
    """

    rows: Int32Array
    scores: Float32Array
    timestamps: Int64Array
    recalls: Int32Array
    offsets: Int64Array

    @classmethod
    def empty(cls, size: int) -> Leftovers:
        """Return nothing for `size` queries."""
        return cls(
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            np.empty(0, np.int64),
            np.empty(0, np.int32),
            np.zeros(size + 1, np.int64),
        )

    def alone(self, q: int) -> Leftovers:
        """Return query q's part, without copying columns."""
        part = slice(int(self.offsets[q]), int(self.offsets[q + 1]))
        return Leftovers(
            self.rows[part],
            self.scores[part],
            self.timestamps[part],
            self.recalls[part],
            np.array([0, part.stop - part.start], np.int64),
        )


@dataclass(frozen=True, slots=True)
class LiveState:
    """The state of the users of a batch as columns.

    Attributes:
        follows: author rows that the user follows, newest first.
        disliked_items: catalogue rows.
        disliked_authors: author rows.
        disliked_tags: codes of `ItemColumns.tag_vocabulary`.
        cities: codes of `ItemColumns.city_codes`: where the user is, if that is known, then where they were, the
            latest first; each once.
        leftovers: of earlier fine rankings.
        exposure: what they were shown; None where nothing keeps it.
        available: whether the state store answered; where it did not, all of the above is empty.
    """

    follows: RaggedRows
    disliked_items: RaggedRows
    disliked_authors: RaggedRows
    disliked_tags: RaggedRows
    cities: RaggedRows
    leftovers: Leftovers
    exposure: Exposure | None
    available: bool

    @classmethod
    def empty(cls, size: int, available: bool = True, cities: RaggedRows | None = None) -> LiveState:
        """Return the state of `size` users of whom nothing is known, but for where they are perhaps."""
        nothing = RaggedRows.empty(size)
        return cls(
            nothing, nothing, nothing, nothing, cities or nothing, Leftovers.empty(size), None, available
        )

    def alone(self, q: int) -> LiveState:
        """Return query q's part as that of a batch of one."""
        return LiveState(
            self.follows.alone(q),
            self.disliked_items.alone(q),
            self.disliked_authors.alone(q),
            self.disliked_tags.alone(q),
            self.cities.alone(q),
            self.leftovers.alone(q),
            None if self.exposure is None else self.exposure.alone(q),
            self.available,
        )
