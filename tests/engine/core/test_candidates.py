from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import CandidateBatch, check_distinct, own_copy, repeats_reference
from engine.core.errors import ContractError


def batch(lists: list[list[int]]) -> CandidateBatch:
    rows = np.array([row for mine in lists for row in mine], np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(mine) for mine in lists]))).astype(np.int64)
    return CandidateBatch(rows, np.ones(rows.size, np.float32), np.full(rows.size, -1, np.int32), offsets)


@given(lists=st.lists(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 20), max_size=12), max_size=5))
@settings(deadline=None)
def test_repeats_are_found_as_the_twin_finds_them(lists):
    answer = batch(lists)
    if repeats_reference(answer.rows, answer.offsets):
        with pytest.raises(ContractError, match="channel 'x': returned a row twice in one query"):
            check_distinct(answer, "x")
    else:
        check_distinct(answer, "x")


def test_a_copy_shares_nothing_and_is_contiguous():
    answer = batch([[1, 2, 3], [4]])
    strided = CandidateBatch(
        np.repeat(answer.rows, 2)[::2], answer.scores, answer.triggers, answer.offsets[::-1][::-1]
    )
    copy = own_copy(strided, np.full(2, 3, np.int32), "x")
    for name in ("rows", "scores", "triggers", "offsets"):
        own, given_ = getattr(copy, name), getattr(strided, name)
        assert own.tolist() == given_.tolist()
        assert own.flags.c_contiguous
        assert own.flags.writeable
        assert not np.shares_memory(own, given_)
