"""The merge: held to its plain twin, and to conservation laws, over random fan-outs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.merge import Merged, MergeMode, merge, merge_reference


@st.composite
def fan_outs(draw):
    channels, queries = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lists = [draw(st.lists(st.integers(0, 12), max_size=9)) for _ in range(channels * queries)]
    rows = np.array([row for part in lists for row in part], np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in lists]))).astype(np.int64)
    keep = np.array(draw(st.lists(st.booleans(), min_size=rows.size, max_size=rows.size)), np.bool_)
    quotas = np.array([[draw(st.integers(0, 6)) for _ in range(queries)] for _ in range(channels)], np.int32)
    weights = np.array([draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(channels)])
    limits = np.array([draw(st.integers(1, 14)) for _ in range(queries)], np.int32)
    return rows, offsets, keep, quotas, weights, limits


def unpack(merged: Merged, q: int):
    items = []
    for i in range(merged.offsets[q], merged.offsets[q + 1]):
        span = range(merged.proposal_offsets[i], merged.proposal_offsets[i + 1])
        proposals = [
            (int(merged.proposal_channels[p]), int(merged.proposal_ranks[p]), int(merged.proposal_sources[p]))
            for p in span
        ]
        items.append((int(merged.rows[i]), float(merged.scores[i]), proposals))
    return items


@pytest.mark.parametrize("mode", list(MergeMode))
@given(world=fan_outs())
@settings(deadline=None, max_examples=200)
def test_the_kernel_does_what_its_plain_twin_does(mode, world):
    merged = merge(*world, mode, 60.0)
    for q, wanted in enumerate(merge_reference(*world, mode, 60.0)):
        got = unpack(merged, q)
        assert [row for row, _, _ in got] == [row for row, _, _ in wanted]
        assert [proposals for _, _, proposals in got] == [proposals for _, _, proposals in wanted]
        np.testing.assert_allclose([s for _, s, _ in got], [s for _, s, _ in wanted], rtol=1e-6)


@pytest.mark.parametrize("mode", list(MergeMode))
@given(world=fan_outs())
@settings(deadline=None, max_examples=200)
def test_nothing_is_lost_and_nothing_invented(mode, world):
    rows, offsets, keep, quotas, _, limits = world
    channels, queries = quotas.shape
    merged = merge(*world, mode, 60.0)
    for q in range(queries):
        segments = [range(offsets[c * queries + q], offsets[c * queries + q + 1]) for c in range(channels)]
        eligible = [{int(rows[p]) for p in segment if keep[p]} for segment in segments]
        everything = set().union(*eligible)
        got = unpack(merged, q)
        returned = [row for row, _, _ in got]
        assert len(returned) == len(set(returned)) == min(limits[q], len(everything))
        assert set(returned) <= everything
        for row, _, proposals in got:
            # Every channel that proposed the item is named, once, and points at where it did.
            assert [c for c, _, _ in proposals] == [c for c in range(channels) if row in eligible[c]]
            for c, rank, source in proposals:
                assert rows[source] == row
                assert source in segments[c]
                before = {int(rows[p]) for p in segments[c] if p < source and keep[p]}
                assert rank == len(before) + 1
        for c in range(channels):
            assert merged.eligible[c, q] == len(eligible[c])
            assert merged.kept[c, q] == sum(row in eligible[c] for row in returned)


@given(world=fan_outs())
@settings(deadline=None, max_examples=200)
def test_quota_mode_gives_each_channel_its_quota_before_anyone_backfills(world):
    rows, offsets, keep, quotas, weights, _ = world
    channels, queries = quotas.shape
    limits = np.maximum(quotas.sum(axis=0), 1).astype(np.int32)
    merged = merge(rows, offsets, keep, quotas, weights, limits, MergeMode.QUOTA, 60.0)
    for q in range(queries):
        returned = {row for row, _, _ in unpack(merged, q)}
        for c in range(channels):
            segment = range(offsets[c * queries + q], offsets[c * queries + q + 1])
            mine = list(dict.fromkeys(int(rows[p]) for p in segment if keep[p]))
            assert set(mine[: quotas[c, q]]) <= returned


def one_query(lists, quotas, limit, mode, keep=None, weights=None):
    rows = np.array([row for part in lists for row in part], np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in lists]))).astype(np.int64)
    merged = merge(
        rows,
        offsets,
        np.ones(rows.size, np.bool_) if keep is None else np.array(keep, np.bool_),
        np.array(quotas, np.int32)[:, None],
        np.ones(len(lists)) if weights is None else np.array(weights),
        np.array([limit], np.int32),
        mode,
        60.0,
    )
    return merged.rows.tolist()


def test_a_duplicate_costs_the_later_channel_no_quota():
    assert set(one_query([[1, 2], [1, 2, 3, 4]], [2, 2], 4, MergeMode.QUOTA)) == {1, 2, 3, 4}


def test_a_filtered_item_uses_up_no_quota():
    lists = [[1, 2, 3], [4, 5]]
    got = one_query(lists, [2, 1], 3, MergeMode.QUOTA, keep=[False, True, True, True, True])
    assert set(got) == {2, 3, 4}


def test_quotas_above_the_limit_shrink_in_proportion():
    lists = [list(range(0, 10)), list(range(10, 20)), list(range(20, 30))]
    got = one_query(lists, [10, 5, 5], 4, MergeMode.QUOTA)
    assert sum(row < 10 for row in got) == 2
    assert sum(10 <= row < 20 for row in got) == 1


def test_what_a_channel_leaves_over_is_backfilled_in_config_order():
    assert one_query([[1], [2, 3, 4], [5, 6]], [3, 1, 1], 5, MergeMode.QUOTA)[3:] == [3, 4]


def test_snake_takes_turns_there_and_back():
    assert one_query([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [3, 3, 3], 6, MergeMode.SNAKE) == [1, 4, 7, 8, 5, 2]


def test_rank_fusion_puts_first_what_most_channels_rank_high():
    assert one_query([[1, 2, 3], [2, 9, 1]], [3, 3], 4, MergeMode.RANK_FUSION) == [2, 1, 9, 3]


def test_a_weight_moves_the_order():
    assert one_query([[1], [2]], [1, 1], 2, MergeMode.RANK_FUSION, weights=[1.0, 2.0]) == [2, 1]


def test_ties_go_to_the_lower_row():
    assert one_query([[7], [3]], [1, 1], 2, MergeMode.QUOTA) == [3, 7]
