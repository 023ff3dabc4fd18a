"""The protocols: held to a plain twin over random logs, and to logs drawn by hand."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from offline_world import config_of, likes_of, lists_of, log_of

from engine.core.errors import ConfigError, DatasetError
from engine.offline.protocols import PROTOCOLS, HeldUsers, cut

IN_TIME = tuple(protocol for protocol in PROTOCOLS if protocol != "disjoint-users")
"""The protocols that learn from the users they test."""

USERS, ITEMS = 5, 8
CONFIG = config_of(interest={"click": 1.0, "like": 2.0})


@st.composite
def logs(draw, kinds=("click", "like", "view")):
    event = st.tuples(
        st.integers(0, USERS - 1),
        st.integers(0, ITEMS - 1),
        st.sampled_from(kinds),
        st.integers(0, 40),
        st.sampled_from(["train", "train", "tune", "test"]),
    )
    return draw(st.lists(event, min_size=1, max_size=40))


def liked(events):
    """User -> items liked, newest first; of events at one time the later in the log is the newer."""
    found = defaultdict(list)
    order = sorted(range(len(events)), key=lambda at: (events[at][3], at), reverse=True)
    for at in order:
        user, item, kind, _, _ = events[at]
        if kind != "view" and item not in found[user]:
            found[user].append(item)
    return found


def plain(events, protocol, part):
    """User -> (known, truth): the cut, one user at a time."""
    if protocol == "fixed-split":
        known_names, truth_names = (
            (("train", "tune"), ("test",)) if part == "test" else (("train",), ("tune",))
        )
        known = liked([event for event in events if event[4] in known_names])
        truth = liked([event for event in events if event[4] in truth_names])
    elif protocol == "leave-one-out":
        at = 0 if part == "test" else 1
        known = {user: items[at + 1 :] for user, items in liked(events).items()}
        truth = {user: items[at : at + 1] for user, items in liked(events).items()}
    else:
        begin, end = min(event[3] for event in events), max(event[3] for event in events) + 1
        moment = end - int((end - begin) * 0.1)
        if part == "validation":
            end, moment = moment, moment - int((moment - begin) * 0.1)
        known = liked([event for event in events if event[3] < moment])
        truth = liked([event for event in events if moment <= event[3] < end])
    return {
        user: (
            known.get(user, []),
            [item for item in truth.get(user, []) if item not in known.get(user, [])],
        )
        for user in range(USERS)
    }


def cut_or_none(log, protocol, part):
    try:
        return cut(CONFIG, log, protocol, part)
    except DatasetError as error:
        assert "no user has both history and truth" in str(error)  # noqa: PT017
        return None


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("protocol", IN_TIME)
@given(events=logs())
@settings(deadline=None, max_examples=60)
def test_a_cut_is_what_its_definition_says(protocol, part, events):
    if protocol == "fixed-split" and part == "validation":  # without a tune split a seeded tenth is taken
        assume(any(event[4] == "tune" for event in events))
    wanted = plain(events, protocol, part)
    split = cut_or_none(log_of(events, USERS, ITEMS, split=True), protocol, part)
    tested = [user for user, (known, truth) in wanted.items() if known and truth]
    if split is None:
        assert tested == []
        return
    assert likes_of(split.known) == [wanted[user][0] for user in range(USERS)]
    assert split.users.tolist() == tested
    assert lists_of(split.truth) == [wanted[user][1] for user in tested]
    cold = [user for user, (known, truth) in wanted.items() if truth and not known]
    assert split.cold.tolist() == cold
    assert lists_of(split.cold_truth) == [wanted[user][1] for user in cold]


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("protocol", IN_TIME)
@given(events=logs())
@settings(deadline=None, max_examples=60)
def test_no_event_is_known_that_comes_with_or_after_what_should_be_found(protocol, part, events):
    split = cut_or_none(log_of(events, USERS, ITEMS, split=True), protocol, part)
    if split is None:
        return
    known, truth = pairs_of(split)
    last = {user: max(e[3] for e in events if (e[0], e[1]) == (user, item)) for user, item in truth}
    for event, seen in zip(events, split.seen.tolist(), strict=True):
        user, item, kind, time, name = event
        if protocol == "fixed-split":
            assert not seen or name in ("train", "tune")
        elif user in last:
            assert not seen or time <= last[user]
        if protocol == "leave-one-out":
            assert not (seen and (user, item) in truth)
        if (user, item) in known and kind != "view" and protocol != "fixed-split":
            assert seen or protocol == "temporal"


def pairs_of(split):
    """The (user, item) pairs that are known, and those that should be found."""
    known = {(user, item) for user, mine in enumerate(likes_of(split.known)) for item in mine}
    truth = set()
    for users, lists in ((split.users, split.truth), (split.cold, split.cold_truth)):
        for user, rows in zip(users.tolist(), lists_of(lists), strict=True):
            truth |= {(user, row) for row in rows}
    return known, truth


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("protocol", IN_TIME)
@given(events=logs(kinds=("click",)))
@settings(deadline=None, max_examples=60)
def test_validation_sees_nothing_of_the_test_and_truth_is_never_known(protocol, tuned, events):
    if not tuned:
        events = [(*event[:4], "train" if event[4] == "tune" else event[4]) for event in events]
    log = log_of(events, USERS, ITEMS, split=True)
    test, validation = (cut_or_none(log, protocol, part) for part in ("test", "validation"))
    for split in (test, validation):
        if split is not None:
            known, truth = pairs_of(split)
            assert not known & truth
    if test is not None and validation is not None:
        seen = set.union(*pairs_of(validation))
        assert not seen & pairs_of(test)[1]
        assert seen <= pairs_of(test)[0]


# --- drawn by hand -----------------------------------------------------------------------------

SPLIT = [
    # user 0 knows 0 and 1; the test has 2, and 1 again, which is no news
    (0, 0, "click", 0, "train"),
    (0, 1, "click", 0, "train"),
    (0, 2, "click", 0, "test"),
    (0, 1, "like", 0, "test"),
    # user 1 chose 3 in the tune split and 4 in the test
    (1, 0, "click", 0, "train"),
    (1, 3, "click", 0, "tune"),
    (1, 4, "click", 0, "test"),
    # user 2 comes for the test only
    (2, 5, "click", 0, "test"),
    # user 3 only looks in the test
    (3, 0, "click", 0, "train"),
    (3, 1, "view", 0, "test"),
]


def test_fixed_split_by_hand():
    split = cut(CONFIG, log_of(SPLIT, 4, 6, timed=False, split=True), "fixed-split", "test")
    assert [set(mine) for mine in likes_of(split.known)] == [{0, 1}, {0, 3}, set(), {0}]
    assert split.users.tolist() == [0, 1]
    assert lists_of(split.truth) == [[2], [4]]
    assert (split.cold.tolist(), lists_of(split.cold_truth)) == ([2], [[5]])
    assert split.statement == "train and tune are known, test is the truth"


def test_the_validation_of_a_fixed_split_is_its_tune_split():
    split = cut(CONFIG, log_of(SPLIT, 4, 6, timed=False, split=True), "fixed-split", "validation")
    assert [set(mine) for mine in likes_of(split.known)] == [{0, 1}, {0}, set(), {0}]
    assert (split.users.tolist(), lists_of(split.truth)) == ([1], [[3]])


def test_without_a_tune_split_a_seeded_tenth_of_train_is_the_validation():
    sizes = [3, 5, 6, 20, 34]
    train = [(user, item, "click", 0, "train") for user, size in enumerate(sizes) for item in range(size)]
    test = [(user, 39, "click", 0, "test") for user in range(len(sizes))]
    log = log_of(train + test, len(sizes), 40, timed=False, split=True)
    split = cut(CONFIG, log, "fixed-split", "validation")
    held = dict(zip(split.users.tolist(), lists_of(split.truth), strict=True))
    assert {user: len(rows) for user, rows in held.items()} == {2: 1, 3: 2, 4: 3}
    for user, mine in enumerate(likes_of(split.known)):
        assert sorted(mine + held.get(user, [])) == list(range(sizes[user]))
    again = cut(CONFIG, log, "fixed-split", "validation")
    assert lists_of(again.truth) == lists_of(split.truth)
    assert "10%" in split.statement


TIMED = [
    # user 0 likes 0 and 1, then 2; an earlier like of 2 makes it no older
    (0, 2, "click", 1),
    (0, 0, "click", 10),
    (0, 1, "click", 20),
    (0, 2, "like", 30),
    # user 1: two at one moment, of which the later in the log is the newer
    (1, 3, "click", 50),
    (1, 4, "click", 50),
    # user 2 likes one thing; user 3 only looks
    (2, 5, "click", 100),
    (3, 5, "view", 101),
]


def test_leave_one_out_by_hand():
    log = log_of(TIMED, 4, 6)
    split = cut(CONFIG, log, "leave-one-out", "test")
    assert likes_of(split.known) == [[1, 0], [3], [], []]
    assert (split.users.tolist(), lists_of(split.truth)) == ([0, 1], [[2], [4]])
    assert (split.cold.tolist(), lists_of(split.cold_truth)) == ([2], [[5]])
    validation = cut(CONFIG, log, "leave-one-out", "validation")
    assert likes_of(validation.known) == [[0], [], [], []]
    assert (validation.users.tolist(), lists_of(validation.truth)) == ([0], [[1]])
    assert (validation.cold.tolist(), lists_of(validation.cold_truth)) == ([1], [[3]])


def test_temporal_by_hand():
    # Times 0 to 99: from 90 on is the test; of 0 to 89, from 81 on is the validation.
    events = [
        (0, 0, "click", 0), (0, 1, "click", 80), (0, 2, "click", 81), (0, 3, "click", 89),
        (0, 4, "click", 90), (0, 0, "click", 95), (1, 5, "click", 99),
    ]  # fmt: skip
    log = log_of(events, 2, 6)
    split = cut(CONFIG, log, "temporal", "test")
    assert likes_of(split.known) == [[3, 2, 1, 0], []]
    assert (split.users.tolist(), lists_of(split.truth)) == ([0], [[4]])
    assert (split.cold.tolist(), lists_of(split.cold_truth)) == ([1], [[5]])
    assert split.statement == "before 90 is known, newly liked from then to 100 is the truth"
    validation = cut(CONFIG, log, "temporal", "validation")
    assert likes_of(validation.known) == [[1, 0], []]
    assert lists_of(validation.truth) == [[3, 2]]
    assert validation.cold.size == 0


def test_points_and_times_of_what_is_held_out_do_not_shine_through():
    # The like of item 0 lies in the test; its click before it is known, with a click's points and time.
    events = [(0, 0, "click", 0), (0, 1, "click", 50), (0, 0, "like", 99), (0, 2, "click", 99)]
    known = cut(CONFIG, log_of(events, 1, 3), "temporal", "test").known
    assert dict(zip(known.rows.tolist(), known.weights.tolist(), strict=True)) == {0: 1.0, 1: 1.0}
    assert known.timestamps.max() == 50


def test_cuts_have_names_of_their_own():
    log = log_of([*TIMED, (0, 3, "click", 99, "test")], 4, 6, split=True)
    keys = {cut(CONFIG, log, protocol, "test").key for protocol in PROTOCOLS}
    keys |= {cut(CONFIG, log, "leave-one-out", "validation").key}
    assert len(keys) == len(PROTOCOLS) + 1


# --- users that nothing is learnt from ---------------------------------------------------------


def disjoint(events, part, count=1, seed=3, users=USERS):
    return cut(CONFIG, log_of(events, users, ITEMS), "disjoint-users", part, HeldUsers(count, seed))


@given(events=logs(), count=st.integers(1, 2), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_users_are_learnt_from_or_tested_and_halves_are_cut_by_time(events, count, seed):
    likes = liked(events)
    able = [user for user, items in likes.items() if len(items) >= 2]
    if 2 * count > len(able) or 2 * count == len([user for user, items in likes.items() if items]):
        expected = ConfigError if able else DatasetError
        with pytest.raises(expected, match="leave nobody to learn from" if able else "history and truth"):
            disjoint(events, "test", count, seed)
        return
    test, validation = (disjoint(events, part, count, seed) for part in ("test", "validation"))
    held = {*test.users.tolist(), *validation.users.tolist()}
    assert len(held) == 2 * count
    assert held <= set(able)
    for split in (test, validation):
        assert split.strangers
        assert likes_of(split.learnt) == [[] if u in held else likes[u] for u in range(USERS)]
        assert split.seen.tolist() == [event[0] not in held for event in events]
        assert split.cold.size == 0
        known = likes_of(split.known)
        for user, truth in zip(split.users.tolist(), lists_of(split.truth), strict=True):
            newer = -(-len(likes[user]) // 2)  # of an odd number the newer half is the larger
            assert (truth, known[user]) == (likes[user][:newer], likes[user][newer:])
        assert all(not mine for user, mine in enumerate(known) if user not in split.users)


def test_the_same_seed_draws_the_same_users_and_both_parts_learn_the_same():
    events = [(user, item, "click", item) for user in range(40) for item in range(4)]
    one, again = (disjoint(events, "test", 5, 3, users=40) for _ in range(2))
    assert one.users.tolist() == again.users.tolist()
    assert one.users.tolist() != disjoint(events, "test", 5, 4, users=40).users.tolist()
    assert one.key == disjoint(events, "validation", 5, 3, users=40).key
    assert one.key not in (
        disjoint(events, "test", 6, 3, users=40).key,
        disjoint(events, "test", 5, 4, users=40).key,
    )
    assert one.statement.startswith("5 users drawn with seed 3 bring the older half of what they liked")


def test_without_a_number_a_tenth_of_the_users_is_held_for_each_part():
    events = [(user, item, "click", item) for user in range(40) for item in range(4)]
    assert cut(CONFIG, log_of(events, 40, ITEMS), "disjoint-users", "test").users.size == 4


@pytest.mark.parametrize("protocol", IN_TIME)
def test_of_the_others_the_same_is_learnt_and_known(protocol):
    log = log_of([*TIMED, (0, 3, "click", 99, "test")], 4, 6, split=True)
    split = cut(CONFIG, log, protocol, "test")
    assert split.learnt is split.known
    assert not split.strangers


# --- what is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_fixed_split_needs_the_split(part):
    with pytest.raises(DatasetError, match="fixed-split") as caught:
        cut(CONFIG, log_of(TIMED, 4, 6), "fixed-split", part)
    assert (caught.value.file, caught.value.column) == ("interactions.parquet", "split")


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("protocol", ["leave-one-out", "temporal", "disjoint-users"])
def test_the_others_need_timestamps(protocol, part):
    with pytest.raises(DatasetError, match=protocol) as caught:
        cut(CONFIG, log_of(SPLIT, 4, 6, timed=False, split=True), protocol, part)
    assert (caught.value.file, caught.value.column) == ("interactions.parquet", "timestamp")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_log_that_tests_nobody_is_refused(protocol):
    # Nobody likes two things, nobody comes back: there is no history for anything that could be found.
    log = log_of([(user, user, "click", 7, "train") for user in range(3)], 3, 3, split=True)
    with pytest.raises(DatasetError, match=f"{protocol}: no user has both history and truth"):
        cut(CONFIG, log, protocol, "test")


def test_ratings_below_the_bar_are_neither_known_nor_truth():
    log = log_of([(0, 0, "click", 1), (0, 1, "click", 2), (0, 2, "click", 3), (0, 3, "click", 4)], 1, 4)
    rated = log.__class__(
        **{name: getattr(log, name) for name in log.__slots__ if name != "ratings"},
        ratings=np.array([5, 2, 4, 1], np.float32),
    )
    split = cut(config_of(min_rating=4.0), rated, "leave-one-out", "test")
    assert likes_of(split.known) == [[0]]
    assert lists_of(split.truth) == [[2]]
