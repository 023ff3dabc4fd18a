from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.candidates import (
    CandidateBatch,
    broken_rule,
    check_contract,
    check_distinct,
    largest_trigger,
    own_copy,
    repeats_reference,
)
from engine.core.errors import ContractError
from engine.online.run import Columns


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


ITEMS, ASKED = 6, 3

entries = st.tuples(
    st.integers(0, ITEMS - 1) | st.sampled_from([0, 1, -1, ITEMS]),
    st.sampled_from([2.0] * 9 + [1.0, 3.0, np.inf, np.nan]),
    st.integers(-1, 2) | st.sampled_from([0, -2, 3, 7]),
)
channels_of_answers = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.tuples(st.lists(st.lists(entries, max_size=ASKED + 1), min_size=n, max_size=n), st.booleans()),
        min_size=1,
        max_size=4,
    )
)


def answer_of(lists, falls):
    flat = [entry for mine in lists for entry in mine]
    ends = np.cumsum([0, *map(len, lists)])
    if falls and ends.size > 2:
        ends[1] = ends[-1] + 1
    rows, scores, triggers = zip(*flat, strict=True) if flat else ((), (), ())
    return CandidateBatch(
        np.array(rows, np.int32), np.array(scores, np.float32), np.array(triggers, np.int32), ends
    )


@given(channels=channels_of_answers, indexes=st.lists(st.sampled_from([None, 1, 3]), min_size=4, max_size=4))
@settings(deadline=None)
def test_all_keep_the_contract_where_each_does(channels, indexes):
    answers = [answer_of(*channel) for channel in channels]
    n = len(channels[0][0])
    k = np.full((len(answers), n), ASKED, np.int32)

    def keeps(answer, c):
        try:
            check_contract(answer, k[c], ITEMS, "x", indexes[c])
        except ContractError:
            return False
        return True

    columns = Columns.of(answers, n)
    together = CandidateBatch(columns.fan_out.rows, columns.scores, columns.triggers, columns.fan_out.offsets)
    largest = np.array([largest_trigger(rows) for rows in indexes[: len(answers)]])
    kept = broken_rule(*together, k.reshape(-1), largest, ITEMS) < 0
    assert kept == all(map(keeps, answers, range(len(answers))))
