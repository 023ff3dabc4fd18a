"""The stored history: one user is read as in a batch, strangers have none, and only so much is kept."""

from __future__ import annotations

import numpy as np
import pytest

from engine.core.memory import MemorySink
from engine.core.query import History
from engine.data.snapshot import SnapshotStore
from engine.state.history import HISTORY, SnapshotHistory, write_history
from engine.testing import interactions_of, tiny_interactions

LIKED = interactions_of([[4, 2, 0], [], [1], [3, 0]], items=5)
NO_IDS = np.empty(0, np.int64)


def stored(keep: int = 100, liked=LIKED) -> SnapshotHistory:
    sink = MemorySink()
    write_history(sink, liked, keep)
    return SnapshotHistory(sink.arrays)


def read(history: SnapshotHistory, *users: int) -> History:
    return history.histories(np.array(users, np.int32))


def columns(history: History, q: int) -> list[bytes]:
    part = slice(int(history.offsets[q]), int(history.offsets[q + 1]))
    return [column[part].tobytes() for column in (history.rows, history.weights, history.timestamps)]


def test_histories_come_newest_first_with_points_and_times():
    one = read(stored(), 0)
    assert one.rows.tolist() == [4, 2, 0]
    assert one.weights.tolist() == [1, 1, 1]
    assert one.timestamps.tolist() == [1_000_000, 999_999, 999_998]
    assert one.offsets.tolist() == [0, 3]


@pytest.mark.parametrize("users", [[0], [-1], [3, -1, 0, 1], [0, 0, 0], [-1, -1], [2, 1, 3]])
def test_a_batch_reads_what_each_user_alone_reads(users):
    together = read(stored(), *users)
    assert together.offsets.size == len(users) + 1
    for q, user in enumerate(users):
        alone = read(stored(), user)
        assert columns(together, q) == columns(alone, 0)
        for name in ("rows", "weights", "timestamps", "offsets"):
            assert getattr(together, name).dtype == getattr(alone, name).dtype


def test_a_batch_reads_what_each_user_alone_reads_of_a_random_world():
    history = stored(7, tiny_interactions(50, 30))
    users = np.random.default_rng(0).integers(-1, 50, 80).tolist()
    together = read(history, *users)
    for q, user in enumerate(users):
        assert columns(together, q) == columns(read(history, user), 0)


def test_strangers_and_users_without_likes_have_no_history():
    for users in ([-1], [1], [-1, 1]):
        found = read(stored(), *users)
        assert found.rows.size == 0
        assert found.offsets.tolist() == [0] * (len(users) + 1)


def test_nobody_has_no_history():
    assert read(stored()).offsets.tolist() == [0]


@pytest.mark.parametrize(("keep", "kept"), [(1, [[4], [], [1], [3]]), (2, [[4, 2], [], [1], [3, 0]])])
def test_only_the_newest_are_kept(keep, kept):
    history = stored(keep)
    assert [read(history, user).rows.tolist() for user in range(4)] == kept


def test_a_world_of_nobody_can_be_written_and_read():
    history = stored(5, interactions_of([[]], items=0))
    assert read(history, 0).rows.size == 0
    assert read(history, 0, -1).offsets.tolist() == [0, 0, 0]


def test_a_snapshot_on_disk_reads_as_one_in_memory(tmp_path):
    store = SnapshotStore(tmp_path)
    with store.begin(HISTORY, parameters={"keep": 2}, dataset="d") as writer:
        write_history(writer, LIKED, 2)
    on_disk = SnapshotHistory(store.open(HISTORY, writer.version).arrays)
    for users in ([0], [3, -1, 0]):
        one, other = read(on_disk, *users), read(stored(2), *users)
        assert all(columns(one, q) == columns(other, q) for q in range(len(users)))


@pytest.mark.parametrize("users", [[1], [1, 0]])
def test_what_is_written_into_a_history_stays_out_of_the_index(users):
    arrays = {
        "indptr": np.array([0, 1, 3], np.int64),
        "rows": np.array([4, 5, 6], np.int32),
        "weights": np.ones(3, np.float32),
        "timestamps": np.array([30, 20, 10], np.int64),
    }
    index = SnapshotHistory(arrays)
    mine = index.histories(np.array(users, np.int32))
    for column in (mine.rows, mine.weights, mine.timestamps):
        column[:] = 0
    assert arrays["rows"].tolist() == [4, 5, 6]
    assert arrays["weights"].tolist() == [1, 1, 1]
    assert arrays["timestamps"].tolist() == [30, 20, 10]
