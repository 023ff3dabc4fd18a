"""What a history adds up to: the kernel is held to its plain twin, and to an answer drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.query import History
from engine.core.totals import heaviest_codes, heaviest_codes_reference
from engine.core.types import RaggedRows

NOW = 1_000_000


def history_of(lists):
    """Lists of (row, interest, age)."""
    flat = [entry for part in lists for entry in part]
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in lists]))).astype(np.int64)
    return History(
        np.array([row for row, _, _ in flat], np.int32),
        np.array([interest for _, interest, _ in flat], np.float32),
        np.array([NOW - age for _, _, age in flat], np.int64),
        offsets,
    )


@st.composite
def calls(draw):
    items, n = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    entry = st.tuples(
        st.integers(0, items - 1), st.integers(1, 8).map(lambda x: x / 4), st.sampled_from([0, 5, 64, NOW])
    )
    known = [draw(st.lists(st.integers(0, 5), max_size=3)) for _ in range(n)]
    single = draw(st.booleans())
    counts = draw(st.lists(st.integers(0, 3), min_size=items, max_size=items))
    total = items if single else sum(counts)
    return {
        "history": history_of([draw(st.lists(entry, max_size=6)) for _ in range(n)]),
        "now": np.full(n, NOW, np.int64),
        "starts": None if single else np.cumsum([0, *counts])[:-1].astype(np.int64),
        "counts": None if single else np.array(counts, np.int32),
        "codes": np.array(draw(st.lists(st.integers(-1, 6), min_size=total, max_size=total)), np.int32),
        "most": draw(st.integers(1, 5)),
        "half_life": draw(st.sampled_from([0.0, 64.0])),
        "max_age": draw(st.sampled_from([0.0, 64.0])),
        "known": draw(st.sampled_from([None, RaggedRows.of([np.array(part, np.int32) for part in known])])),
        "known_weight": 0.75,
    }


@given(call=calls())
@settings(deadline=None, max_examples=200)
def test_the_kernel_does_what_its_plain_twin_does(call):
    codes, weights = heaviest_codes(**call)
    wanted = heaviest_codes_reference(**call)
    assert codes.lengths.tolist() == [len(part) for part in wanted]
    assert codes.rows.tolist() == [code for part in wanted for code, _ in part]
    assert weights.tolist() == pytest.approx([weight for part in wanted for _, weight in part])


def test_recent_interest_weighs_more_and_what_is_known_besides_adds_up():
    authors = np.array([7, 8, 7], np.int32)
    history = history_of([[(0, 1.0, 0), (1, 3.0, 100), (2, 1.0, 100), (1, 9.0, 201)]])
    known = RaggedRows.of([np.array([9, 7], np.int32)])
    codes, weights = heaviest_codes(
        history, np.array([NOW]), None, None, authors, 2, half_life=100.0, max_age=200.0, known=known, known_weight=0.25
    )  # fmt: skip
    # Author 7: 1 now, 1/2 and a follow of 1/4; author 8: 3/2, what is older than 200 does not count; author 9: 1/4.
    assert codes.rows.tolist() == [7, 8]
    assert weights.tolist() == [1.75, 1.5]
