"""Ids of answers: looked up by one kernel, as a dictionary would."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.ids import IdIndex
from engine.data.live import LiveIds
from engine.online.encode import _look_up
from engine.online.response_bytes import NO_TRIGGER, TRIGGER_ID, TRIGGER_KEY


def live(first: int, known: int, new: int) -> LiveIds:
    ids = LiveIds(IdIndex.of(first + 10 * np.arange(known)))
    ids.add(first + 10 * np.arange(known, known + new))
    return ids


@given(data=st.data(), known=st.integers(1, 5), new=st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_ids_of_items_and_triggers_are_those_of_their_indexes(data, known, new):
    items, authors, users = live(1000, known, new), live(2000, known, new), IdIndex.of(3000 + np.arange(9))
    indexes = {1: items, 2: users, 3: authors}
    tables = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    forms = data.draw(
        st.lists(
            st.sampled_from((NO_TRIGGER, TRIGGER_ID, TRIGGER_KEY)), min_size=len(tables), max_size=len(tables)
        )
    )
    rows = data.draw(st.lists(st.integers(0, known + new - 1), max_size=6))
    channels = data.draw(st.lists(st.integers(0, len(tables) - 1), max_size=8))
    given_rows = [data.draw(st.integers(-1, known + new - 1)) for _ in channels]
    sources = data.draw(st.permutations(range(len(channels))))
    trigger_rows = np.empty(len(channels), np.int32)
    trigger_rows[list(sources)] = given_rows
    numbers, triggers = np.empty(len(rows), np.int64), np.empty(len(channels), np.int64)
    written = np.empty(len(channels), np.uint8)
    _look_up(
        np.array(rows, np.int32), trigger_rows, np.array(sources, np.int64), np.array(channels, np.int32),
        np.array(tables, np.uint8), np.array(forms, np.uint8), True, items.keys(np.arange(known + new)), users.numbers,
        *authors.numbers, numbers, triggers, written,
    )  # fmt: skip
    assert numbers.tolist() == items.ids(np.array(rows, np.int32)).tolist()
    for p, (c, row) in enumerate(zip(channels, given_rows, strict=True)):
        index = indexes.get(tables[c])
        there = row >= 0
        assert written[p] == (forms[c] if there else NO_TRIGGER)
        expected = index.ids(np.array([row], np.int32)).item() if there and index is not None else row
        assert triggers[p] == expected
