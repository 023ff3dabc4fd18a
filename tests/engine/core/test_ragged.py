from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.ragged import put_first
from engine.core.types import RaggedRows

LISTS = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=6, unique=True), st.integers(-1, 5)), max_size=5
)


@settings(deadline=None)
@given(LISTS)
def test_a_row_is_put_first_and_stands_nowhere_else(given_lists: list[tuple[list[int], int]]) -> None:
    lists = RaggedRows.of([np.array(rows, np.int32) for rows, _ in given_lists])
    found = put_first(lists, np.array([first for _, first in given_lists], np.int32))
    expected = [
        rows if first < 0 else [first, *(row for row in rows if row != first)] for rows, first in given_lists
    ]
    assert [found.rows[a:b].tolist() for a, b in pairwise(found.offsets.tolist())] == expected
