import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import FanOut
from engine.core.members import drop, not_members, not_members_reference


@st.composite
def masks(draw):
    channels, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    segments = [draw(st.lists(st.integers(0, 9), max_size=6)) for _ in range(channels * queries)]
    blocked = [draw(st.lists(st.integers(0, 9), max_size=6)) for _ in range(queries)]
    fan_out = FanOut(
        np.array([row for part in segments for row in part], np.int32),
        np.concatenate(([0], np.cumsum([len(part) for part in segments]))).astype(np.int64),
        queries,
    )
    rows = np.array([row for part in blocked for row in part], np.int32)
    return fan_out, rows, np.concatenate(([0], np.cumsum([len(part) for part in blocked]))).astype(np.int64)


@given(mask=masks())
@settings(deadline=None, max_examples=200)
def test_the_kernel_does_what_its_plain_twin_does(mask):
    assert not_members(*mask).tolist() == not_members_reference(*mask).tolist()


@given(mask=masks())
@settings(deadline=None, max_examples=100)
def test_what_is_dropped_is_counted_once_per_query(mask):
    fan_out, rows, offsets = mask
    stays = not_members(fan_out, rows, offsets)
    keep = np.ones(stays.size, np.bool_)
    removed_by = np.full(stays.size, -1, np.int8)
    removed = np.zeros((2, fan_out.queries), np.int32)
    drop(keep, removed_by, stays, fan_out, 0, removed)
    drop(keep, removed_by, stays, fan_out, 1, removed)
    assert keep.tolist() == stays.tolist()
    assert removed_by.tolist() == np.where(stays, -1, 0).tolist()
    assert (
        removed[0].tolist()
        == np.bincount(fan_out.query_of_candidate()[~stays], minlength=fan_out.queries).tolist()
    )
    assert not removed[1].any()
