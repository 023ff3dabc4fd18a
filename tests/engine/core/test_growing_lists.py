"""Lists that are replaced one by one hold what a dict of lists holds, packed or not."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.growing_lists import GrowingLists

_LISTS = st.dictionaries(st.integers(0, 30), st.lists(st.integers(0, 9), max_size=40), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(_LISTS, max_size=60))
def test_every_row_has_its_last_list(steps: list[dict[int, list[int]]]) -> None:
    lists = GrowingLists(3, np.int32)
    known: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in steps:
        lists.grow(max(step, default=0) + 1)
        counts = np.array([len(each) for each in step.values()], np.int32)
        data = np.array([code for each in step.values() for code in each], np.int32)
        lists.put(np.array(list(step), np.int32), counts, data)
        known |= step
    assert len(lists) == lists.counts.size == max(known) + 1
    for row in range(len(lists)):
        assert lists.take(row).tolist() == known.get(row, [])
        start = lists.starts[row]
        assert lists.data[start : start + lists.counts[row]].tolist() == known.get(row, [])


def test_lists_that_none_has_any_more_do_not_pile_up() -> None:
    lists = GrowingLists(10, np.uint8)
    for step in range(1000):
        lists.put(
            np.array([step % 10], np.int32), np.array([100], np.int32), np.full(100, step % 256, np.uint8)
        )
    assert lists.data.size < 4000
    assert [int(lists.take(row)[0]) for row in range(10)] == [(990 + row) % 256 for row in range(10)]
