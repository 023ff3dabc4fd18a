"""The limit on requests in flight: what it falls and rises with, and who is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from engine.config import OverloadConfig
from engine.online.admission import Admission

BATCH = 4
LEAST, MOST = 2 * BATCH, 100


def admission(**rules) -> Admission:
    return Admission(OverloadConfig(**{"target_ms": 10.0, **rules}), BATCH, MOST)


def batches(made: Admission, wait: float, number: int, full: bool = True) -> None:
    """Answer full batches at the limit, or one request at a time."""
    for _ in range(number):
        made.in_flight = max(math.ceil(made.limit), BATCH) if full else 1
        made.leave(BATCH if full else 1, wait, 0.004)
    made.in_flight = 0


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What takes the place of the monotonic clock: `now` is what it says."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("engine.online.admission.time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_it_falls_to_two_batches_while_requests_wait_long():
    made = admission()
    batches(made, 1.0, 100)
    assert made.limit == LEAST


def test_while_calls_are_refused_it_falls_to_one_batch_and_rises_to_two_when_no_more_are():
    made = admission()
    for _ in range(100):
        made.in_flight = math.ceil(made.limit)
        assert made.refusal(math.inf, 0.0)
        made.leave(BATCH, 1.0, 0.004)
    assert BATCH <= made.limit < BATCH + 1
    made.in_flight = 1  # however little is asked for then
    made.leave(1, 0.0, 0.004)
    assert made.limit == LEAST


def test_an_overload_is_over_when_no_batch_has_ended_for_a_while(clock):
    made = admission()
    for _ in range(100):
        made.in_flight = math.ceil(made.limit)
        assert made.refusal(math.inf, clock.now)
        made.leave(BATCH, 1.0, 0.004)
    made.in_flight = LEAST - 1
    assert made.refusal(math.inf, clock.now + 0.1)
    assert not made.refusal(math.inf, clock.now + 0.3)
    assert made.limit == LEAST


def test_who_is_refused_for_a_short_deadline_says_nothing_of_overload():
    made = admission()
    batches(made, 1.0, 100)
    made.in_flight = LEAST - 1
    assert "deadline" in made.refusal(0.001, 0.0)
    made.leave(BATCH, 1.0, 0.004)
    assert made.limit == LEAST


def test_it_rises_to_the_queue_while_nobody_waits():
    made = admission()
    batches(made, 0.001, 300)
    assert made.limit == MOST


def test_it_stays_while_less_than_half_is_in_use():
    made = admission()
    before = made.limit
    batches(made, 0.0, 50, full=False)
    assert made.limit == before


def test_it_settles_where_requests_wait_about_as_long_as_wanted():
    made = admission()
    pace = 0.0003
    for _ in range(2000):
        made.in_flight = math.ceil(made.limit)
        made.leave(BATCH, made.limit * pace, BATCH * pace)  # the wait that such a queue makes
    assert 10.0 <= made.limit * pace * 1e3 <= 13.0


def test_one_beyond_the_limit_is_refused_and_counted():
    made = admission()
    refused = []
    made.on_refused = lambda: refused.append(1)
    taken = 0
    while not made.refusal(math.inf, 0.0):
        made.enter()
        taken += 1
    assert taken == made.limit
    assert refused == [1]
    made.leave(1, 0.0, 0.001)
    assert not made.refusal(math.inf, 0.0)


def test_those_whose_requests_are_to_be_read_count_until_they_are_or_all_is_taken_in():
    made = admission()
    for _ in range(int(made.limit)):
        assert not made.refusal(math.inf, 0.0)
        made.expect()
    assert made.refusal(math.inf, 0.0)
    made.arrived()
    assert not made.refusal(math.inf, 0.0)
    made.enter()
    assert made.refusal(math.inf, 0.0)
    made.settle()
    assert not made.refusal(math.inf, 0.0)
    made.arrived()  # one whom nobody expected any more
    assert not made.refusal(math.inf, 0.0)
    assert made.in_flight == 1


def test_who_cannot_be_answered_in_time_is_refused_at_once():
    made = admission()
    for _ in range(50):
        made.enter()
        made.leave(1, 0.0, 0.01)
    assert made.pace == pytest.approx(0.01, rel=0.01)
    assert not made.refusal(100.001, 100.0)  # nothing is in front
    for _ in range(5):
        made.enter()
    assert "deadline" in made.refusal(100.04, 100.0)
    assert not made.refusal(100.06, 100.0)
    assert not made.refusal(99.0, 100.0)  # it is late already, and is told so
    assert made.pushback_ms() == pytest.approx(50, abs=1)


def test_busy_is_the_share_of_time_that_was_computed(clock):
    made = admission()
    clock.now += 10
    made.enter()
    made.leave(1, 0.0, 5.0)
    assert made.busy == pytest.approx(0.5, abs=0.01)


def test_the_load_is_the_most_of_the_limit_that_was_in_use_during_the_last_batch_and_is_forgotten(clock):
    made = admission()
    made.limit = 40.0
    assert made.load == 0.0
    for _ in range(20):
        made.enter()
    made.leave(15, 0.0, 0.01)
    assert made.load == 0.5
    made.leave(5, 0.0, 0.01)
    assert made.load == pytest.approx(5 / made.limit)
    clock.now += 2.0
    assert made.load == 0.0
