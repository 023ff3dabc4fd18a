"""The circuit breaker: tables of what happens when, and properties over random histories."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BreakerConfig
from engine.online.breaker import Breaker, BreakerState

CLOSED, HALF_OPEN, OPEN = BreakerState.CLOSED, BreakerState.HALF_OPEN, BreakerState.OPEN


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker(draw: float = 0.5, **rules) -> tuple[Breaker, Clock]:
    clock = Clock()
    defaults = {
        "failures": 3,
        "rate": 0.5,
        "calls": 8,
        "window_seconds": 10,
        "open_seconds": 1,
        "most_seconds": 5,
    }
    return Breaker(BreakerConfig(**{**defaults, **rules}), clock, lambda: draw), clock


def opened(**rules) -> tuple[Breaker, Clock]:
    made, clock = breaker(**rules)
    for _ in range(3):
        made.record(1.0, "no")
    assert made.state is OPEN
    return made, clock


@pytest.mark.parametrize(
    ("calls", "state"),
    [
        ([1, 1], CLOSED),
        ([1, 1, 1], OPEN),
        ([0, 0, 0, 0, 1, 1, 1], OPEN),  # what went well before the first failure does not count
        ([1, 0, 1, 0, 1], OPEN),
        ([1, 0, 0, 0, 1, 0, 0, 1], CLOSED),  # three of eight
        (
            [1, 0, 0, 0, 1, 0, 0, 1, 1],
            OPEN,
        ),  # the first has left the window: three of the five since the next
        ([0.5] * 5, CLOSED),
        ([0.5] * 6, OPEN),
        ([0.4] * 30, CLOSED),
    ],
)
def test_it_opens_by_number_and_rate(calls, state):
    made, _ = breaker()
    for share in calls:
        if made.state is CLOSED:
            made.record(share, "no")
    assert made.state is state


def test_old_calls_are_forgotten():
    made, clock = breaker()
    for _ in range(20):
        made.record(1.0, "no")
        clock.now += 6
    assert made.state is CLOSED


def test_nothing_need_be_asked_or_told_while_nothing_fails():
    made, _ = breaker()
    assert made.quiet
    made.record(1.0, "no")
    assert not made.quiet
    for _ in range(8):
        made.record(0.0)
    assert made.quiet


def test_an_open_circuit_lets_one_probe_through_when_its_time_is_over():
    made, clock = opened()
    clock.now += 0.99
    assert not made.allows()
    clock.now += 0.02
    assert made.allows()
    assert made.state is HALF_OPEN
    assert not made.allows()  # one at a time
    made.forgo()
    assert made.allows()
    made.record(0.0)
    assert made.state is CLOSED
    assert made.quiet
    assert made.allows()


def test_each_probe_that_fails_doubles_the_time_up_to_a_bound_and_success_begins_anew():
    made, clock = opened()
    for seconds in (1, 2, 4, 5, 5):
        clock.now += seconds - 0.01
        assert not made.allows()
        clock.now += 0.02
        assert made.allows()
        made.record(1.0, "still no")
        assert made.state is OPEN
        assert made.last_error == "still no"
    clock.now += 5.01
    assert made.allows()
    made.record(0.4)  # less than the rate
    assert made.state is CLOSED
    for _ in range(3):
        made.record(1.0, "no")
    clock.now += 1.01
    assert made.allows()


@pytest.mark.parametrize(("draw", "seconds"), [(0.0, 0.8), (0.5, 1.0), (0.999999, 1.2)])
def test_the_time_is_spread(draw, seconds):
    made, clock = opened(draw=draw, jitter=0.2)
    clock.now += seconds - 0.01
    assert not made.allows()
    clock.now += 0.02
    assert made.allows()


def test_a_success_opens_nothing_though_others_leave_the_window():
    made, clock = breaker()
    for share in (0.2, 0.0, 0.0, 0.0):
        made.record(share, "no")
    clock.now += 9
    for _ in range(3):
        made.record(1.0, "no")
    assert made.state is CLOSED  # 3.2 of 7
    clock.now += 2
    made.record(0.0)
    assert made.state is CLOSED
    made.record(1.0, "no")
    assert made.state is OPEN


@given(
    steps=st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 3)), max_size=60),
    draw=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_over_any_history(steps, draw):
    made, clock = breaker(draw=draw)
    failed_in_a_row = 0
    open_since = 0.0
    for share, passed in steps:
        clock.now += passed
        before = made.state
        if not made.allows():
            assert before is OPEN
            assert clock.now - open_since < 5 * 1.2
            continue
        if before is OPEN:
            assert clock.now - open_since >= 1 * 0.8
            assert made.state is HALF_OPEN
        made.record(share, "no")
        failed_in_a_row = failed_in_a_row + 1 if share == 1.0 else 0
        if before is CLOSED and made.state is OPEN:
            assert share > 0  # a success opens nothing
        if made.state is OPEN:
            open_since = clock.now
            failed_in_a_row = 0
        assert failed_in_a_row < 4 or passed > 0  # four are half of all the calls that count
        assert made.quiet <= (made.state is CLOSED)
        assert made.state is not HALF_OPEN
