"""The live log on a real store: the later change wins, nothing is entered twice, and who missed something knows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from recall.v1 import ingest_pb2 as pb

from engine.core.errors import StateUnavailableError
from engine.state.embedded import EmbeddedStore
from engine.state.log import START, LiveLog, LogChange, offset_key
from engine.state.store import StateStore

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("state")) as store:
        yield store


@pytest.fixture
def store(embedded: EmbeddedStore) -> Iterator[StateStore]:
    """A connection whose prefix nobody else has."""
    connected = StateStore.connect(embedded.url, f"log{next(_NUMBERS)}", 1000)
    yield connected
    connected.close()


@pytest.fixture
def log(store: StateStore) -> LiveLog:
    return LiveLog(store)


def put(id_: int | str, time: int, title: str = "") -> LogChange:
    return LogChange(id_, time, pb.Item(title=title))


def titles(values: list[bytes]) -> list[tuple[int | str, str | None]]:
    found = []
    for change in map(pb.ItemChange.FromString, values):
        id_ = change.item_key or change.item_id
        found.append((id_, change.put.title if change.HasField("put") else None))
    return found


def entries(log: LiveLog, after: str = START) -> list[tuple[int | str, str | None]]:
    return titles([value for _, value in log.read(after, 10_000)])


def table(log: LiveLog) -> list[tuple[int | str, str | None]]:
    return sorted(titles([value for part in log.table() for value in part]), key=repr)


def test_a_log_begins_empty(log: LiveLog) -> None:
    assert (log.first(), log.end(), log.read(START, 10), table(log)) == (None, START, [], [])
    assert not log.missed(START)
    assert log.trim(START) == 0


def test_what_is_published_is_read_in_order(log: LiveLog) -> None:
    result = log.publish([put(1, 10, "a"), put("two", 10, "b"), LogChange(3, 10, None)])
    assert result.stale == 0
    assert result.offset == log.end()
    assert entries(log) == [(1, "a"), ("two", "b"), (3, None)]
    assert table(log) == [("two", "b"), (1, "a"), (3, None)]
    first, second, third = (offset for offset, _ in log.read(START, 10))
    assert log.first() == first
    assert third == result.offset
    assert entries(log, second) == [(3, None)]
    assert [offset for offset, _ in log.read(first, 1)] == [second]
    change = pb.ItemChange.FromString(log.read(START, 1)[0][1])
    assert (change.item_id, change.updated_at_ms, change.put.title) == (1, 10, "a")


def test_the_later_change_wins_whichever_comes_first(log: LiveLog) -> None:
    log.publish([put(1, 20, "new")])
    result = log.publish([put(1, 10, "old"), put(2, 10, "other")])
    assert result.stale == 1
    assert log.publish([LogChange(2, 9, None)]).stale == 1
    assert entries(log) == [(1, "new"), (2, "other")]
    log.publish([LogChange(1, 30, None)])
    assert log.publish([put(1, 29, "too late")]).stale == 1
    assert table(log) == [(1, None), (2, "other")]
    log.publish([put(1, 31, "back")])
    assert table(log) == [(1, "back"), (2, "other")]


def test_times_beyond_32_bits_are_compared_as_numbers(log: LiveLog) -> None:
    log.publish([put(1, 1_725_000_000_256, "new")])
    assert log.publish([put(1, 1_725_000_000_255, "old")]).stale == 1
    assert log.publish([put(1, 2_000_000_000_000, "newest")]).stale == 0


def test_sending_again_makes_no_entry(log: LiveLog) -> None:
    changes = [put(n, 10, str(n)) for n in range(1200)]
    first = log.publish(changes)
    again = log.publish(changes)
    assert (again.offset, again.stale) == (first.offset, 0)
    assert len(entries(log)) == len(table(log)) == 1200
    # Of one time the one that comes last holds.
    log.publish([put(5, 10, "corrected")])
    assert entries(log)[1200:] == [(5, "corrected")]


def test_a_reader_waits_for_the_first_entry(log: LiveLog) -> None:
    assert log.follow(START, 10, block_ms=20) == ([], False)
    end = log.publish([put(1, 10)]).offset
    found, missed = log.follow(START, 10, block_ms=5000)
    assert ([offset for offset, _ in found], missed) == ([end], False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(log.follow, end, 10, 10_000)
        time.sleep(0.05)
        later = log.publish([put(2, 10)]).offset
        assert [offset for offset, _ in waiting.result()[0]] == [later]


def test_who_is_behind_what_was_trimmed_knows(log: LiveLog) -> None:
    offsets = [log.publish([put(n, 10)]).offset for n in range(5)]
    assert log.trim(offsets[3]) == 3
    assert log.first() == offsets[3]
    assert [log.missed(offset) for offset in [START, *offsets]] == [True, True, True, False, False, False]
    assert len(table(log)) == 5
    assert log.trim(offsets[3]) == 0
    assert not log.missed(offsets[2])


def test_who_is_ahead_of_the_store_knows(log: LiveLog) -> None:
    end = log.publish([put(1, 10)]).offset
    assert not log.missed(end)
    assert log.missed(f"{offset_key(end)[0] + 1}-0")


def test_offsets_compare_as_numbers() -> None:
    assert offset_key("9-10") > offset_key("9-9") > offset_key("8-11")


def test_a_store_that_is_away_is_an_error(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as embedded:
        store = StateStore.connect(embedded.url, "recall", 1000)
    log = LiveLog(store)
    for ask in (
        log.end,
        log.first,
        lambda: log.publish([put(1, 1)]),
        lambda: log.read(START, 1),
        lambda: log.follow(START, 1, 10),
    ):
        with pytest.raises(StateUnavailableError):
            ask()
    store.close()
