"""Looking out for a reply before sleeping."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from engine.state.lookout import Lookout

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def looks(lookout: Lookout, here: socket.socket, times: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Say of so many replies whether they were looked for."""
    asked: list[float] = []

    class Clock:
        def perf_counter(self) -> float:
            asked.append(1.0)
            return float(len(asked))  # each look takes a second

    found = []
    with monkeypatch.context() as patch:
        patch.setattr("engine.state.lookout.time", Clock())
        for _ in range(times):
            before = len(asked)
            lookout.look(here)
            found.append(len(asked) > before)
    return found


def test_what_is_there_is_seen_and_left_there(pair):
    here, there = pair
    there.sendall(b"x")
    lookout = Lookout()
    assert lookout.look(here)
    assert lookout.look(here)
    assert here.recv(10) == b"x"


def test_who_has_hung_up_is_seen(pair):
    here, there = pair
    there.close()
    assert Lookout().look(here)


def test_after_a_reply_that_did_not_come_in_time_ever_more_are_passed_over(pair, monkeypatch):
    here, there = pair
    lookout = Lookout()
    found = looks(lookout, here, 1200, monkeypatch)
    at = [n for n, looked in enumerate(found) if looked]
    assert at[:6] == [0, 2, 5, 10, 19, 36]
    assert at[-1] - at[-2] == 257
    there.sendall(b"x")
    found = looks(lookout, here, 600, monkeypatch)
    first = found.index(True)
    assert all(found[first:])  # one that came in time: all are looked for again
    here.recv(10)
    assert [n for n, looked in enumerate(looks(lookout, here, 7, monkeypatch)) if looked] == [0, 2, 5]
