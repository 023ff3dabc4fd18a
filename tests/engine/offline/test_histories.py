"""The newest items of users, in tables, while events pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.offline.histories import Done, Histories, done_before, inserted

STORED = {7: ([10, 20, 30], [1, 2, 3])}


def stored(user: int) -> tuple[Any, Any]:
    times, rows = STORED.get(user, ([], []))
    return np.array(times, np.int64), np.array(rows, np.int32)


DID = st.lists(st.tuples(st.sampled_from([1, 2, 7]), st.integers(0, 6), st.integers(0, 40)), max_size=8)


@settings(deadline=None)
@given(st.lists(DID, max_size=6), st.integers(1, 5), st.integers(0, 5), st.integers(0, 6))
def test_the_tables_hold_what_plain_lists_would(parts, length, asked, kept_at):
    mine = Histories(length, stored)
    theirs: dict[int, Done] = {}
    for at, part in enumerate(parts):
        if at == kept_at:
            state = mine.state()
            mine.remember([1], [5], [99])  # what comes after the copy is not in it
            mine = Histories(length, stored)
            mine.restore(state)
        mine.remember(*([each[column] for each in part] for column in range(3)))
        for user, item, time in part:
            times, rows = STORED.get(user, ([], []))
            before = theirs.setdefault(user, (times[-length:], rows[-length:]))
            theirs[user] = inserted(before, item, time, length)
        users, moments = [1, 2, 7, 1], [20, 30, 41, 0]
        sequence, lengths = mine.before(users, moments, asked)
        for user, moment, codes, many in zip(users, moments, sequence, lengths, strict=True):
            times, rows = STORED.get(user, ([], []))
            wanted = done_before(theirs.get(user, (times[-length:], rows[-length:])), moment, asked)
            wanted = wanted if asked else []
            assert codes.tolist() == [0] * (asked - len(wanted)) + wanted
            assert many == len(wanted)


def test_there_is_room_for_whoever_comes():
    many = Histories(2, stored)
    many.remember(range(1000), range(1000), [50] * 1000)
    sequence, _ = many.before(range(1000), [99] * 1000, 2)
    assert sequence[:, 1].tolist() == list(range(1, 1001))


def test_where_nothing_is_kept_nothing_is_known():
    none = Histories(0, stored)
    none.remember([7], [1], [5])
    assert none.before([7], [99], 3)[0].tolist() == [[0, 0, 0]]


def test_tables_of_another_length_are_refused():
    with pytest.raises(ValueError, match="histories of 3 items, and 2 are kept"):
        Histories(2, stored).restore(Histories(3, stored).state())
