"""One suite for both backends; the bits are written by the reference here, by the store's script in its own tests."""

import sys
import threading

import numpy as np
import pytest

from engine.core.candidates import FanOut
from engine.core.errors import ConfigError
from engine.core.exposure import ExposureBits, ExposureLayout, add
from engine.state.exposure import BitsBackend, PybloomBackend, exposure_backend

DAY = 86_400
NOON = 20_000 * DAY + DAY // 2
PLANNED = 500


class Bits:
    """The bits backend over a dictionary in place of the store."""

    def __init__(self, layout, slice_seconds, slices):
        self.backend = BitsBackend(layout, slice_seconds, slices)
        self.store = {}

    def show(self, user, keys, now):
        at = (user, self.backend.slice_number(now))
        self.store[at] = add(self.store.get(at), keys, self.backend.layout)

    def view(self, users, now):
        numbers = self.backend.slice_numbers(now)
        return self.backend.view(
            users,
            ExposureBits.of(
                [[self.store.get((user, number)) for number in numbers] if user else [] for user in users]
            ),
        )


class Pybloom:
    """The backend in the process's memory."""

    def __init__(self, layout, slice_seconds, slices):
        self.backend = PybloomBackend(layout, slice_seconds, slices)

    def show(self, user, keys, now):
        self.backend.record(user, np.array(keys, np.int64), now)

    def view(self, users, now):
        assert self.backend.slice_numbers(now) == []
        return self.backend.view(users, ExposureBits.of([[] for _ in users]))


@pytest.fixture(params=[Bits, Pybloom])
def kept(request):
    return request.param(ExposureLayout(PLANNED, 10, 7), DAY, 2)


def seen(exposure, keys, queries=1):
    """[queries, keys]: what is said of every key as a candidate of every query."""
    rows = np.tile(np.arange(len(keys), dtype=np.int32), queries)
    offsets = np.arange(queries + 1, dtype=np.int64) * len(keys)
    answer = exposure.seen(FanOut(rows, offsets, queries), np.array(keys, np.int64))
    assert answer.dtype == np.bool_
    return answer.reshape(queries, len(keys))


def test_what_was_shown_is_seen_and_by_nobody_else(kept):
    kept.show(b"u1", [10, 20], NOON)
    kept.show(b"u1", [30], NOON)
    kept.show(b"kanna", [40], NOON)
    exposure = kept.view([b"u1", b"", b"kanna", b"u2"], NOON)
    assert seen(exposure, [10, 20, 30, 40], 4).astype(int).tolist() == [
        [1, 1, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert exposure.shown().tolist() == [3, 0, 1, 0]


def test_there_is_never_a_false_negative(kept):
    rng = np.random.default_rng(0)
    shown = {b"u%d" % u: rng.integers(0, 1 << 62, PLANNED // 10 * (u + 1)).tolist() for u in range(30)}
    for begin in range(0, 1500, 70):
        for user, keys in shown.items():
            if keys[begin : begin + 70]:
                kept.show(user, keys[begin : begin + 70], NOON + begin)
    exposure = kept.view(list(shown), NOON + 1500)
    for q, keys in enumerate(shown.values()):
        assert seen(exposure.alone(q), keys).all()


def test_a_batch_is_answered_as_its_queries_are_alone(kept):
    rng = np.random.default_rng(1)
    for u in range(4):
        kept.show(b"u%d" % u, rng.integers(0, 1000, 300).tolist(), NOON - u * DAY)
    exposure = kept.view([b"u0", b"u1", b"", b"u2", b"u3"], NOON)
    everything = range(2000)
    together = seen(exposure, everything, 5)
    for q in range(5):
        assert seen(exposure.alone(q), everything)[0].tolist() == together[q].tolist()
        assert exposure.alone(q).shown().tolist() == exposure.shown()[q : q + 1].tolist()


def test_an_exposure_lasts_for_its_slice_and_so_many_full_ones_and_then_goes(kept):
    begin = NOON // DAY * DAY
    kept.show(b"u1", [1], begin)
    kept.show(b"u1", [2], begin + DAY - 1)
    kept.show(b"u2", [3], begin + 2 * DAY)
    for later in (0, 1, DAY, 3 * DAY - 1):  # to the end of the second full slice
        assert seen(kept.view([b"u1"], begin + later), [1, 2]).all()
    assert seen(kept.view([b"u2"], begin + 4 * DAY), [3]).all()
    assert not seen(kept.view([b"u1"], begin + 5 * DAY), [1, 2]).any()
    assert kept.view([b"u1"], begin + 5 * DAY).shown().tolist() == [0]


@pytest.mark.parametrize("times", [1, 5])
def test_fewer_than_one_in_a_hundred_strangers_is_taken_for_seen(kept, times):
    rng = np.random.default_rng(times)
    strangers = rng.integers(0, 1 << 62, 4000).tolist()
    users = [b"u%d" % u for u in range(10)]
    for user in users:
        kept.show(user, rng.integers(0, 1 << 62, times * PLANNED).tolist(), NOON)
    assert seen(kept.view(users, NOON), strangers, len(users)).mean() < 0.01


def test_measuring_asks_for_what_nobody_was_shown(kept):
    kept.show(b"u1", range(PLANNED), NOON)
    asked, positives, bits_set, bits = kept.view([b"", b"u1"], NOON).measure(seed=3)
    assert asked == 256
    assert 0 <= positives < 15
    assert 0 <= bits_set <= bits
    assert kept.view([b"", b"u1"], NOON).measure(seed=3) == (asked, positives, bits_set, bits)
    assert kept.view([b""], NOON).measure(seed=3) == (0, 0, 0, 0)


def test_no_candidates_and_no_users(kept):
    empty = FanOut(np.empty(0, np.int32), np.zeros(3, np.int64), 2)
    assert kept.view([b"u1", b""], NOON).seen(empty, np.empty(0, np.int64)).size == 0
    assert kept.view([], NOON).shown().tolist() == []


def test_the_slices_that_are_read_cover_clocks_that_differ():
    backend = BitsBackend(ExposureLayout(PLANNED, 10, 7), DAY, 2)
    number = NOON // DAY
    assert backend.slice_number(NOON) == number
    # Tomorrow's too: another server's clock, or this one's before it was set right, may be a day ahead.
    assert backend.slice_numbers(NOON) == [number + 1, number, number - 1, number - 2]
    backend.record(b"u1", np.array([1], np.int64), NOON)  # the store's script writes; this does nothing


def test_pybloom_may_be_written_while_it_is_read():
    kept = Pybloom(ExposureLayout(100, 10, 7), DAY, 2)
    failures = []

    def write(writer):
        try:
            for turn in range(40):
                kept.show(b"u1", range(writer * 10_000 + turn * 20, writer * 10_000 + turn * 20 + 20), NOON)
                kept.show(b"w%d-%d" % (writer, turn), [1], NOON + turn * DAY // 30)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen(kept.view([b"u1"], NOON), range(50))
    for thread in threads:
        thread.join()
    assert failures == []
    assert seen(kept.view([b"u1"], NOON), [w * 10_000 + k for w in range(3) for k in range(800)]).all()


def test_pybloom_forgets_old_slices_of_every_user():
    kept = Pybloom(ExposureLayout(PLANNED, 10, 7), DAY, 2)
    for user in (b"u1", b"u2"):
        kept.show(user, [1], NOON)
    kept.view([b"u3"], NOON + 10 * DAY)
    assert kept.backend._users == {}


def test_backends_are_made_by_name(monkeypatch):
    layout = ExposureLayout(PLANNED, 10, 7)
    assert exposure_backend("bits", layout, DAY, 2).in_store
    assert not exposure_backend("pybloom", layout, DAY, 2).in_store
    monkeypatch.setitem(sys.modules, "pybloom_live", None)
    with pytest.raises(ConfigError, match=r"state\.exposure\.backend: .*recall-engine\[pybloom\]"):
        exposure_backend("pybloom", layout, DAY, 2)
