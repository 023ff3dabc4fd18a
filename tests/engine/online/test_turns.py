"""Turns of the thread that takes calls and the one that computes."""

import math
import threading
import time

from engine.config import OverloadConfig
from engine.online.admission import Admission
from engine.online.turns import Turns


def made() -> tuple[Admission, Turns]:
    admission = Admission(OverloadConfig(), 4, 100)
    return admission, Turns(admission)


def test_while_nothing_is_in_flight_the_thread_of_the_calls_waits_for_the_next_one_however_long():
    _, turns = made()
    assert turns.rest()
    turns.batch_ended()  # nobody rests, so that nobody is waited for
    assert turns.rest()


def test_while_something_is_in_flight_it_rests_until_a_batch_ends_and_the_compute_waits_until_all_is_taken_in():
    admission, turns = made()
    admission.enter()
    done: list[str] = []

    def take_calls() -> None:
        while not turns.rest():
            if not admission.in_flight:
                done.append("taken")

    taker = threading.Thread(target=take_calls)
    taker.start()
    while not turns._resting:  # it may rest only for a moment; it looks again all the same
        pass
    admission.leave(1, 0.0, 0.01)
    turns.batch_ended()
    taker.join(10)
    assert done == ["taken"]


def test_it_knows_from_when_on_what_is_taken_in_may_have_waited():
    admission, turns = made()
    assert turns.since == math.inf
    admission.enter()
    began = time.monotonic()
    turns.rest()
    assert began <= turns.since <= time.monotonic()
    admission.leave(1, 0.0, 0.01)
    turns.rest()
    assert turns.since == math.inf


def test_a_batch_that_takes_long_keeps_nobody_from_being_seen():
    admission, turns = made()
    admission.enter()
    assert not turns.rest()  # after a moment, though no batch ended
    assert not turns.rest()


def test_a_thread_of_the_calls_that_takes_long_keeps_no_batch_from_being_drained():
    admission, turns = made()
    admission.enter()
    rested, ended = threading.Event(), threading.Event()

    def take_calls() -> None:
        turns.rest()
        rested.set()
        ended.wait(10)

    taker = threading.Thread(target=take_calls)
    taker.start()
    while not (turns._resting or rested.is_set()):
        pass
    turns.batch_ended()
    ended.set()
    taker.join(10)
    assert rested.is_set()
