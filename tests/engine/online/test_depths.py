"""How deep channels are asked, first and again: the kernels beside their twins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import ChannelStatus
from engine.online.pipeline import _may_have_more, depths, depths_reference, may_have_more_reference


def table(draw, channels, n, least, most):
    values = draw(st.lists(st.integers(least, most), min_size=channels * n, max_size=channels * n))
    return np.array(values, np.int32).reshape(channels, n)


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.5]))
@settings(max_examples=200, deadline=None)
def test_depths_are_those_of_the_twin(data, channels, n, factor):
    quotas, limits, extra = (
        table(data.draw, channels, n, 0, 9),
        table(data.draw, 1, n, 1, 30)[0],
        table(data.draw, 1, n, 0, 50)[0],
    )
    asked = np.array(data.draw(st.lists(st.booleans(), min_size=channels, max_size=channels)))
    found = depths(quotas, limits, extra, asked, factor)
    for mine, wanted in zip(found, depths_reference(quotas, limits, extra, asked, factor), strict=True):
        assert mine.dtype == np.int32
        assert mine.tolist() == wanted.tolist()
    assert (found[0] <= found[1]).all()


@given(st.data(), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_who_may_have_more_is_who_the_twin_says(data, channels, n):
    status = np.array(
        [ChannelStatus.OK, ChannelStatus.EMPTY, ChannelStatus.ERROR, ChannelStatus.SKIPPED], np.int32
    )
    lengths, limits = table(data.draw, 1, n, 0, 6)[0], table(data.draw, 1, n, 1, 6)[0]
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    eligible, quotas, returned, depth, whole = (table(data.draw, channels, n, 0, 4) for _ in range(5))
    columns = (
        offsets,
        eligible,
        limits,
        quotas,
        status[table(data.draw, channels, n, 0, 3)],
        returned,
        depth,
        whole,
    )
    again = np.empty((channels, n), np.bool_)
    assert _may_have_more(*columns, again) == again.any()
    assert again.tolist() == may_have_more_reference(*columns).tolist()


def test_where_channels_are_left_out_the_others_are_asked_for_their_share():
    quotas, limits, extra = (np.array(values, np.int32) for values in ([[2], [6]], [8], [0]))
    both, alone = (
        depths(quotas, limits, extra, np.array(asked), 1.0)[0].T.tolist()[0]
        for asked in ([True, True], [True, False])
    )
    assert both == [2, 6]
    assert alone[0] == pytest.approx(8)
