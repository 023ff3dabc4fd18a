"""Evaluation protocols: how a data set is cut into what a system may know and what it should have found.

    fixed-split     the data's own `split` column: train (and tune) is known, test is the truth
    leave-one-out   each user's newest item is the truth, everything before it is known
    temporal        a moment cuts time: before it is known, what users newly liked after it is the truth
    disjoint-users  users are drawn to be tested and never learnt from: the older half of what each liked comes with the
                    query, the newer half is the truth (Zhu et al. 2018, TDM; Gao et al. 2021, Deep Retrieval, 4.1)

The validation part of the first three is carved from what the test protocol knows, so choosing on it never sees a test
event: fixed-split takes the `tune` split where there is one and a seeded tenth of each user's train items where not;
leave-one-out takes the second-newest item; temporal cuts the known part again. That of disjoint-users is as many other
users, and both parts learn from the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from engine.config import Config
from engine.core.errors import ConfigError, DatasetError
from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Int32Array, Int64Array, RaggedRows
from engine.data.events import EventLog, interest_matrix
from engine.data.form import SPLITS

Protocol = Literal["fixed-split", "leave-one-out", "temporal", "disjoint-users"]
PROTOCOLS: tuple[Protocol, ...] = ("fixed-split", "leave-one-out", "temporal", "disjoint-users")
Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")

TEMPORAL_SHARE = 0.1
VALIDATION_SHARE = 0.1
VALIDATION_SEED = 20_240_229
HELD_USERS = 1_000
HELD_SHARE = 0.1
"""Without a number of its own each part of disjoint-users has so many users, and at most this share of those that can
be tested."""


@dataclass(frozen=True)
class HeldUsers:
    """Whom disjoint-users keeps out of the training.

    Attributes:
        count: users of each part; None for `HELD_USERS`, or `HELD_SHARE` of those that can be tested where that is less.
        seed: of the drawing.
    """

    count: int | None = None
    seed: int = VALIDATION_SEED


@dataclass(frozen=True)
class Split:
    """One cut of a data set.

    Attributes:
        learnt: the interest matrix that channels are built from.
        known: what the users that are tested did before: their histories. Of the same users as `learnt`, the same matrix.
        users: int32[n], rows of the users that are tested: those with both history and truth.
        truth: for each of them the rows that should be found; none of them is in the user's known items.
        cold: int32[c], rows of users with truth but no history.
        cold_truth: for each of them the rows that should be found.
        key: names what is learnt from, for caches.
        statement: one sentence that says what was cut how.
        seen: bool[events]: which events of the log are learnt from; none comes after what should be found of its user.
        strangers: nothing is learnt from the users that are tested: they ask as guests, and bring their history.
    """

    learnt: Interactions
    known: Interactions
    users: Int32Array
    truth: RaggedRows
    cold: Int32Array
    cold_truth: RaggedRows
    key: str
    statement: str
    seen: BoolArray
    strangers: bool = False


def cut(
    config: Config, events: EventLog, protocol: Protocol, part: Part, held: HeldUsers | None = None
) -> Split:
    """Cut an event log.

    Args:
        config: says which events mean interest.
        events: the log.
        protocol: which cut.
        part: "test", or "validation" for choosing hyper-parameters.
        held: whom disjoint-users tests; None for its defaults. The others have no use for it.

    Raises:
        ConfigError: `held` leaves nobody to learn from.
        DatasetError: if the data lacks what the protocol needs (a split column, timestamps), or nobody can be tested.
    """
    learnt: Interactions | None = None
    key = f"{protocol}.{part}"
    if protocol == "disjoint-users":
        learnt, known, truth, seen, statement, key = _disjoint_users(
            config, events, part, held or HeldUsers()
        )
    elif protocol == "fixed-split":
        known, truth, seen, statement = _fixed_split(config, events, part)
    elif protocol == "leave-one-out":
        known, truth, seen, statement = _leave_one_out(config, events, part)
    else:
        known, truth, seen, statement = _temporal(config, events, part)
    truth = _without(truth, known)
    has_truth = truth.user_counts() > 0
    has_history = known.user_counts() > 0
    users = np.flatnonzero(has_truth & has_history).astype(np.int32)
    cold = np.flatnonzero(has_truth & ~has_history).astype(np.int32)
    if users.size == 0:
        raise DatasetError(f"{protocol}: no user has both history and truth", "interactions.parquet")
    return Split(
        learnt=known if learnt is None else learnt,
        known=known,
        users=users,
        truth=_lists(truth, users),
        cold=cold,
        cold_truth=_lists(truth, cold),
        key=key,
        statement=statement,
        seen=seen,
        strangers=learnt is not None,
    )


_Cut: TypeAlias = tuple[Interactions, Interactions, BoolArray, str]
"""What is known, what should be found, which events are known, and the statement."""


def _fixed_split(config: Config, events: EventLog, part: Part) -> _Cut:
    if events.splits is None:
        text = "is needed by the protocol fixed-split and is not there"
        raise DatasetError(text, "interactions.parquet", "split")
    train, tune, test = (events.splits == SPLITS.index(name) for name in ("train", "tune", "test"))
    if part == "test":
        seen = train | tune
        truth = _matrix(config, events, test)
        return _matrix(config, events, seen), truth, seen, "train and tune are known, test is the truth"
    if tune.any():
        truth = _matrix(config, events, tune)
        return _matrix(config, events, train), truth, train, "train is known, tune is the truth"
    whole = _matrix(config, events, train)
    held = _seeded_tenth(whole)
    statement = (
        f"a seeded {VALIDATION_SHARE:.0%} of each user's train items is the truth, the rest of train is known"
    )
    truth = pick(whole, held)
    return pick(whole, ~held), truth, train & ~_of_pairs(events, truth), statement


def _leave_one_out(config: Config, events: EventLog, part: Part) -> _Cut:
    if not events.timed:
        text = "is needed by the protocol leave-one-out and is not there"
        raise DatasetError(text, "interactions.parquet", "timestamp")
    whole = _matrix(config, events, None)
    place = np.arange(whole.entries) - np.repeat(whole.indptr[:-1], whole.user_counts())
    at = 0 if part == "test" else 1
    which = "newest" if part == "test" else "second-newest"
    known, truth = pick(whole, place > at), pick(whole, place == at)
    # Time ends for each user with the truth; of the events of its very second those of known pairs count.
    ends = np.full(whole.users, np.iinfo(np.int64).max)
    tested = truth.user_counts() > 0
    ends[tested] = truth.timestamps[truth.indptr[:-1][tested]]
    until = ends[events.users]
    seen = (events.timestamps < until) & ~_of_pairs(events, truth)
    seen |= _of_pairs(events, known, events.timestamps == until)
    return known, truth, seen, f"each user's {which} item is the truth, older ones are known"


def _temporal(config: Config, events: EventLog, part: Part) -> _Cut:
    if not events.timed:
        text = "is needed by the protocol temporal and is not there"
        raise DatasetError(text, "interactions.parquet", "timestamp")
    begin, end = int(events.timestamps.min()), int(events.timestamps.max()) + 1
    moment = end - int((end - begin) * TEMPORAL_SHARE)
    if part == "validation":
        end, moment = moment, moment - int((moment - begin) * TEMPORAL_SHARE)
    before = events.timestamps < moment
    after = ~before & (events.timestamps < end)
    statement = f"before {moment} is known, newly liked from then to {end} is the truth"
    return _matrix(config, events, before), _matrix(config, events, after), before, statement


def _disjoint_users(
    config: Config, events: EventLog, part: Part, held: HeldUsers
) -> tuple[Interactions, Interactions, Interactions, BoolArray, str, str]:
    """Return what is learnt from, the rest as `_Cut` has it, and the key: both parts have one."""
    if not events.timed:
        text = "is needed by the protocol disjoint-users and is not there"
        raise DatasetError(text, "interactions.parquet", "timestamp")
    whole = _matrix(config, events, None)
    counts = whole.user_counts()
    able = np.flatnonzero(counts >= 2)
    count = min(HELD_USERS, max(int(able.size * HELD_SHARE), 1)) if held.count is None else held.count
    drawn = np.random.default_rng(held.seed).permutation(able)[: 2 * count]
    kept_out = np.zeros(whole.users, np.bool_)
    kept_out[drawn] = True
    owner = np.repeat(np.arange(whole.users), counts)
    learnt = pick(whole, ~kept_out[owner])
    if able.size and (drawn.size < 2 * count or learnt.entries == 0):
        text = (
            f"{count:,} users each for validation and test, of {able.size:,} with two likes or more, leave nobody to "
            "learn from"
        )
        raise ConfigError(text, "--held-users")
    tested = np.zeros(whole.users, np.bool_)
    tested[drawn[:count] if part == "test" else drawn[count:]] = True
    place = np.arange(whole.entries) - np.repeat(whole.indptr[:-1], counts)  # 0 is a user's newest
    older = place >= (counts - counts // 2)[owner]
    statement = (
        f"{count:,} users drawn with seed {held.seed} bring the older half of what they liked, the newer half is the "
        f"truth; nothing is learnt from them, nor from {count:,} others for "
        f"{'validation' if part == 'test' else 'the test'}"
    )
    known, truth = (pick(whole, tested[owner] & half) for half in (older, ~older))
    return learnt, known, truth, ~kept_out[events.users], statement, f"disjoint-users.{count}.{held.seed}"


def _matrix(config: Config, events: EventLog, where: BoolArray | None) -> Interactions:
    return interest_matrix(events, config.interest, where, config.min_rating)


def _seeded_tenth(matrix: Interactions) -> BoolArray:
    """bool[entries]: a tenth of each user's entries, rounded half to even; users of up to five entries give none."""
    generator = np.random.default_rng(VALIDATION_SEED)
    owner = np.repeat(np.arange(matrix.users), matrix.user_counts())
    shuffled = np.lexsort((generator.random(matrix.entries), owner))
    place = np.empty(matrix.entries, np.int64)
    place[shuffled] = np.arange(matrix.entries) - np.repeat(matrix.indptr[:-1], matrix.user_counts())
    held: BoolArray = place < np.rint(matrix.user_counts() * VALIDATION_SHARE)[owner]
    return held


def pick(matrix: Interactions, where: BoolArray) -> Interactions:
    """Return the entries of a matrix where bool[entries] is true."""
    running = np.concatenate((np.zeros(1, np.int64), np.cumsum(where, dtype=np.int64)))
    return Interactions(
        matrix.users,
        matrix.items,
        running[matrix.indptr].astype(np.int64),
        matrix.rows[where],
        matrix.weights[where],
        matrix.timestamps[where],
    )


def _without(matrix: Interactions, other: Interactions) -> Interactions:
    """Return the entries whose (user, item) pair the other matrix does not have."""

    return pick(matrix, ~np.isin(_pairs(matrix), _pairs(other)))


def _pairs(matrix: Interactions) -> Int64Array:
    """int64[entries]: a number for each pair."""
    owners = np.repeat(np.arange(matrix.users, dtype=np.int64), matrix.user_counts())
    return owners * matrix.items + matrix.rows


def _of_pairs(events: EventLog, matrix: Interactions, where: BoolArray | None = None) -> BoolArray:
    """bool[events]: whether an event's user and item are a pair of the matrix; only asked of some events."""
    found = np.zeros(len(events), np.bool_)
    asked = slice(None) if where is None else where
    numbers = events.users[asked].astype(np.int64) * matrix.items + events.items[asked]
    found[asked] = np.isin(numbers, _pairs(matrix))
    return found


def _lists(matrix: Interactions, users: Int32Array) -> RaggedRows:
    return RaggedRows.of([matrix.rows[matrix.indptr[u] : matrix.indptr[u + 1]] for u in users.tolist()])
