"""Sorting numbers by their bits, and keys of (score, row)."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.select import sort_digits, sort_key


@given(st.integers(0, 300) | st.integers(500, 700), st.sampled_from((0, 32)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_numbers_are_sorted_by_their_upper_bits_and_equal_ones_stay_in_order(count, lowest, seed):
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 4, count, np.uint64) << np.uint64(random.integers(0, 62))
    numbers |= random.integers(0, 3, count, np.uint64) << np.uint64(32)
    lines = np.zeros((2, count + 3), np.uint64)
    lines[0, :count] = numbers
    order = np.argsort(numbers >> np.uint64(lowest), kind="stable")
    assert lines[sort_digits(lines, count, lowest)][:count].tolist() == numbers[order].tolist()


@given(
    st.integers(0, 40) | st.integers(250, 600),
    st.sampled_from((1, 2, 20, 2**20)),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_keys_are_sorted_by_score_then_row(count, different, seed):
    random = np.random.default_rng(seed)
    scores = (random.integers(0, different, count) - different / 2).astype(np.float32)
    rows = random.permutation(2**20)[:count].astype(np.int32)
    lines = np.zeros((2, count + 3), np.uint64)
    lines[0, :count] = [sort_key(*pair) for pair in zip(scores.view(np.uint32), rows, strict=True)]
    order = np.lexsort((-rows, scores))
    expected = lines[0, :count][order].tolist()
    assert lines[sort_digits(lines, count, 0)][:count].tolist() == expected
    assert expected == sorted(expected)
