"""Events become impressions: each with what its user did soon after, and what the user had done before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.models.streaming_options import Task
from engine.offline.joining import PATIENCE, Impressions, Joiner
from engine.state.events import SHOWN
from engine.state.layout import kind_of

INTEREST = {"click": 1.0, "finish": 2.0, "view": 0.0}
TASKS = (Task(name="click", kinds=("click",)), Task(name="stay", kinds=("finish",), reward="log_value"))
LATER = 10**9


def stored(user: int) -> tuple[Any, Any]:
    if user == 7:
        return np.array([10, 20, 30]), np.array([1, 2, 3], np.int32)
    return np.empty(0, np.int64), np.empty(0, np.int32)


def joiner(tasks=TASKS, length: int = 3) -> Joiner:
    return Joiner(tasks, INTEREST, 60, length, stored)


def take(
    into: Joiner, *events: tuple[int, int, str, int], value: float = math.nan, written: int = LATER
) -> None:
    """Events are (user, item row, kind or "shown", time)."""
    users, items, kinds, times = zip(*events, strict=True)
    into.take(
        np.array(users, np.int64),
        np.array(items, np.int32),
        np.array([SHOWN if kind == "shown" else kind_of(kind) for kind in kinds], np.uint32),
        np.full(len(events), value, np.float32),
        np.array(times, np.int64),
        np.full(len(events), written, np.int64),
    )


def rest(of: Joiner) -> Impressions:
    given_ = of.give(10**6, rest=True)
    assert given_ is not None
    return given_


def test_actions_within_the_time_reward_their_tasks_and_later_ones_do_not():
    join = joiner()
    take(join, (1, 5, "shown", 100), (1, 6, "shown", 100), (1, 7, "shown", 100))
    take(join, (1, 5, "click", 130), (1, 6, "click", 161))
    take(join, (1, 5, "finish", 160), value=math.e - 1)
    found = rest(join)
    assert found.items.tolist() == [5, 6, 7]
    assert found.rewards.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert found.timestamps.tolist() == [100] * 3


def test_an_action_on_what_nobody_reported_as_shown_is_an_impression():
    join = joiner()
    take(join, (1, 5, "click", 100), (1, 5, "finish", 110))
    found = rest(join)
    assert found.items.tolist() == [5]
    assert found.rewards.tolist() == [[1, 0]]  # nobody knows how long


def test_kinds_without_a_task_and_items_that_are_not_known_make_none():
    join = joiner()
    take(join, (1, 5, "view", 100), (1, -1, "shown", 100), (1, -1, "click", 100))
    assert join.give(10, rest=True) is None


def test_a_task_without_kinds_is_rewarded_by_all_that_earns_points():
    join = joiner((Task(name="positive"),))
    take(join, (1, 5, "click", 100), (1, 6, "finish", 101), (1, 7, "view", 102))
    assert rest(join).rewards.tolist() == [[1], [1]]


def test_an_impression_is_given_when_the_stream_is_past_its_time():
    join = joiner()
    take(join, (1, 5, "shown", 100), (2, 6, "shown", 101))
    assert join.give(1) is None
    take(join, (3, 9, "shown", 161))
    first = join.give(1)
    assert first is not None
    assert first.items.tolist() == [5]
    assert join.give(1) is None
    assert len(join) == 2


def test_a_time_ahead_of_the_log_is_not_believed():
    join = joiner()
    take(join, (1, 5, "shown", 100), written=100)
    take(join, (2, 6, "shown", 86_400), written=101)
    assert join.give(1) is None


def test_impressions_that_wait_long_for_others_are_given_by_themselves():
    join = joiner()
    take(join, (1, 5, "shown", 100))
    take(join, (2, 6, "shown", 100 + 60 + PATIENCE - 1))
    assert join.give(10) is None
    take(join, (2, 7, "shown", 100 + 60 + PATIENCE))
    few = join.give(10)
    assert few is not None
    assert few.items.tolist() == [5]


def test_the_history_is_what_was_done_before_and_the_newest_of_it():
    join = joiner()
    take(join, (7, 8, "click", 40), (7, 9, "shown", 50), (7, 9, "click", 55), (7, 2, "click", 70))
    take(join, (7, 4, "shown", 80), (1, 4, "shown", 80))
    found = rest(join)
    at = {
        (int(user), int(item)): n for n, (user, item) in enumerate(zip(found.users, found.items, strict=True))
    }
    # Codes are row + 1. Item 2 was done again later, and is there as it was done last.
    assert found.sequence[at[7, 9]].tolist() == [2, 4, 9]
    assert found.sequence[at[7, 4]].tolist() == [9, 10, 3]
    assert found.sequence[at[1, 4]].tolist() == [0, 0, 0]
    assert found.lengths[[at[7, 9], at[7, 4], at[1, 4]]].tolist() == [3, 3, 0]


def test_a_value_that_cannot_be_is_refused_by_name():
    join = joiner()
    take(join, (1, 5, "finish", 100), value=-3.0)
    assert join.give(10, rest=True) is None
    text, count = join.refused
    assert count == 1
    assert "task 'stay'" in text
    assert "-3.0" in text


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 7]),
        st.integers(-1, 5),
        st.sampled_from(["shown", "click", "finish"]),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(EVENTS, max_size=12), st.integers(0, 12), st.integers(1, 4))
def test_what_goes_on_from_a_state_gives_the_same(entries, kept_at, size):
    whole, broken = joiner(), joiner()
    gave: list[list[Any]] = [[], []]
    for at, entry in enumerate(entries):
        if at == kept_at:
            state = broken.state().packed()
            broken = joiner()
            broken.restore(state)
        for join, mine in zip((whole, broken), gave, strict=True):
            take(join, *entry)
            while (due := join.give(size)) is not None:
                mine.append(
                    [array.tolist() for array in (due.items, due.rewards, due.sequence, due.timestamps)]
                )
    assert gave[0] == gave[1]
    assert len(whole) == len(broken)
