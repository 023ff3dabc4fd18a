"""Which numbers reach a bound, and bounds that so many reach, held to their plain twins."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.bounds import bound_of, reaching, reaching_reference

NUMBERS = st.lists(
    st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from((-1.0, -0.0, 0.0, 2.0)),
    min_size=1,
    max_size=90,
)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.data())
def test_the_places_of_what_reaches_a_bound_are_those_of_the_plain_twin(numbers, data):
    values = np.array(numbers, np.float32)
    begin = data.draw(st.integers(0, values.size))
    end = data.draw(st.integers(begin, values.size))
    least = data.draw(st.sampled_from(numbers) | st.just(float("-inf")))
    out = np.full(end - begin + 1, -7, np.int32)
    found = reaching(values, begin, end, np.float32(least), out)
    assert out[:found].tolist() == reaching_reference(values, begin, end, np.float32(least)).tolist()
    assert (out[found:] == -7).all()


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.data())
def test_a_bound_is_reached_by_as_many_as_are_wanted_whatever_the_numbers(numbers, data):
    values = np.array(numbers, np.float32)
    wanted = data.draw(st.integers(1, values.size))
    assert (values >= bound_of(values, values.size, wanted)).sum() >= wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000), st.floats(0.001, 1), st.integers(0, 99))
def test_not_many_more_reach_it(count, share, seed):
    values = np.random.default_rng(seed).standard_normal(count, np.float32)
    wanted = max(1, int(count * share))
    reached = (values >= bound_of(values, count, wanted)).sum()
    assert wanted <= reached <= wanted + wanted // 8
