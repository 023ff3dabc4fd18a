"""Turns of the thread that waits for calls and the one that computes."""

import threading

from engine.config import OverloadConfig
from engine.online.admission import Admission
from engine.online.turns import Turns


def made() -> tuple[Admission, Turns]:
    admission = Admission(OverloadConfig(), 4, 100)
    return admission, Turns(admission)


def test_while_nothing_is_in_flight_the_thread_of_the_calls_waits_for_the_next_one_however_long():
    _, turns = made()
    assert turns.rest()
    turns.batch_ended()
    assert turns.rest()


def test_between_two_batches_the_compute_takes_in_what_has_come():
    admission, turns = made()
    taken: list[float] = []
    turns.take = taken.append
    admission.enter()
    turns.batch_ended()
    (seconds,) = taken
    assert 0 < seconds < 1


def test_while_something_is_in_flight_the_thread_of_the_calls_rests():
    admission, turns = made()
    admission.enter()
    found: list[bool] = []
    resting = threading.Thread(target=lambda: found.append(turns.rest()))
    entered = threading.Event()
    turns._changed = _Telling(entered)
    resting.start()
    assert entered.wait(10)
    admission.leave(1, 0.0, 0.01)
    turns.batch_ended()
    resting.join(10)
    assert found == [True]


def test_a_batch_that_takes_long_keeps_nobody_from_being_seen():
    admission, turns = made()
    admission.enter()
    assert not turns.rest()  # after a moment, though no batch ended
    assert not turns.rest()


class _Telling(threading.Condition):
    """Says when somebody waits, and lets nobody wait for a moment only: batches end all the time."""

    def __init__(self, waited: threading.Event) -> None:
        super().__init__()
        self._waited = waited

    def wait(self, timeout: float | None = None) -> bool:
        self._waited.set()
        return super().wait(10)
