"""Products of small blocks, held to their plain twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from engine.models.tiles import in_wide_bytes, multiply, multiply_reference, product, soften, wide, widened


@given(
    st.integers(1, 21),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from((np.float32, np.int8)),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_product_is_that_of_the_plain_twin_and_no_row_depends_on_the_others(n, terms, blocks, kind, seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, terms)).astype(np.float32)
    weight = (20 * random.standard_normal((terms, 16 * blocks))).astype(kind)
    start = random.standard_normal(16 * blocks).astype(np.float32)
    out = np.full((n, 16 * blocks), np.nan, np.float32)
    multiply(x, weight, start, out)
    np.testing.assert_allclose(out, multiply_reference(x, weight, start), rtol=1e-5, atol=1e-3)
    alone = np.empty((1, 16 * blocks), np.float32)
    multiply(x[-1:].copy(), weight, start, alone)
    assert alone.tobytes() == out[-1:].tobytes()


@njit
def _products(numbers, table, out):
    for row in range(out.size):
        out[row] = product(numbers, table, row)


@pytest.mark.parametrize("kind", [np.float32, np.int8])
@pytest.mark.parametrize("e", [16, 32, 80])
def test_inner_products_with_rows_are_what_numpy_says(kind, e):
    random = np.random.default_rng(e)
    table = (20 * random.standard_normal((9, e))).astype(kind)
    numbers = random.standard_normal(e).astype(np.float32)
    out = np.empty(9, np.float32)
    _products(numbers, table, out)
    np.testing.assert_allclose(out, table.astype(np.float64) @ numbers, rtol=1e-5, atol=1e-3)


@njit
def _softened(x, totals):
    for row in range(totals.size):
        totals[row] = soften(x, row)


@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
def test_what_a_log_softmax_takes_away_is_what_numpy_says(spread):
    random = np.random.default_rng(3)
    x = wide((spread * random.standard_normal((9, 37))).astype(np.float32), -np.inf)
    shifted, totals = x.copy(), np.empty(9, np.float32)
    _softened(shifted, totals)
    assert (shifted == x - x.max(1, keepdims=True)).all()
    np.testing.assert_allclose(totals, np.exp(shifted.astype(np.float64)).sum(1), rtol=1e-6)


def test_columns_are_filled_up_with_zeros():
    assert [widened(columns) for columns in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert wide(np.ones((2, 3), np.float32)).tolist() == [[1.0] * 3 + [0.0] * 13] * 2
    vectors = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    rows = np.array([4, 4, 49], np.int32)
    codes, scales = in_wide_bytes(vectors, rows)
    assert codes.shape == (3, 32)
    assert not codes[:, 20:].any()
    np.testing.assert_allclose(codes[:, :20] * scales[:, None], vectors[rows], atol=scales.max() / 2 * 1.01)
