"""The users as they were at an earlier moment."""

import numpy as np
from offline_world import config_of, dataset_of

from engine.core.channel import SilentProgress
from engine.core.items import ItemColumns
from engine.core.memory import MemorySink
from engine.data.snapshot import SnapshotStore
from engine.offline.evaluate import evaluate
from engine.offline.past import PastLeftovers, PastState, Places
from engine.state.history import SnapshotHistory, write_history
from engine.testing import interactions_of

LIKES = [[3, 1], [], [2]]


def histories():
    sink = MemorySink()
    write_history(sink, interactions_of(LIKES, 5), 10)
    return SnapshotHistory(sink.arrays)


def read(state, users):
    rows = np.array(users, np.int32)
    answer = state.ask(rows.astype(np.int64))
    return answer(rows, np.zeros(rows.size, np.int64), np.full(rows.size, -1, np.int32))


def test_follows_are_those_of_each_user_and_strangers_have_none():
    state = PastState(histories(), follows=interactions_of([[1], [2, 0], []], 3))
    live = read(state, [1, -1, 0, 2]).live
    lists = np.split(live.follows.rows, live.follows.offsets[1:-1])
    assert [part.tolist() for part in lists] == [[2, 0], [], [1], []]


def test_leftovers_come_best_first_with_falling_scores_and_the_moment_of_the_ranking():
    left = PastLeftovers(np.array([0, 2, 2, 3]), np.array([4, 0, 1], np.int32), 1234)
    live = read(PastState(histories(), leftovers=left), [2, 0]).live
    assert live.leftovers.rows.tolist() == [1, 4, 0]
    assert live.leftovers.offsets.tolist() == [0, 1, 3]
    assert live.leftovers.scores.tolist() == [1.0, 1.0, 0.5]
    assert live.leftovers.timestamps.tolist() == [1234] * 3
    assert live.leftovers.recalls.tolist() == [0] * 3


def test_histories_are_those_of_the_snapshot():
    assert read(PastState(histories()), [0]).history.rows.tolist() == [3, 1]


def test_users_were_last_where_their_newest_placed_item_is():
    columns = ItemColumns(5)
    columns.latitude[[1, 2]] = 10.0, 20.0
    columns.longitude[[1, 2]] = 11.0, 21.0
    columns.cities[3], columns.cities[1] = 7, 6
    places = Places.of(interactions_of(LIKES, 5), columns)
    assert places.latitude[0] == 10.0  # item 3, the newest, has no coordinates
    assert places.longitude[2] == 21.0
    assert np.isnan(places.latitude[1])
    assert places.cities.tolist() == [7, -1, -1]


def test_what_an_earlier_ranking_left_over_feeds_the_cache_but_for_what_was_met_since(tmp_path):
    day = 86_400
    begin = 1_700_000_000
    # Everybody likes item 1 first, so that "popular" ranks by how many liked an item before the rehearsal.
    rows = [(user, 1, "click", begin) for user in (1, 2, 3, 4)]
    rows += [(user, 2, "click", begin + 1) for user in (2, 3, 4)]
    rows += [(user, 3, "click", begin + 2) for user in (3, 4)] + [(4, 4, "click", begin + 3)]
    # Within the day before the cut user 1 meets item 2; after the cut user 1 likes item 3.
    rows += [(1, 2, "click", begin + 17 * day), (2, 1, "click", begin + 17 * day)]
    rows += [(1, 3, "click", begin + 20 * day)]
    dataset = dataset_of(tmp_path / "data", rows)
    config = config_of({"popular": {}, "cache": {}}, limit=3)
    report = evaluate(
        config,
        dataset,
        "temporal",
        ["popular", "cache"],
        [2],
        SnapshotStore(tmp_path / "store"),
        SilentProgress(),
    )
    assert report.users == 1
    # The rehearsal ranked 2, 3, 4 for user 1, who had only item 1; item 2 was met since: 3 and 4 are left over.
    assert report.channels["cache"]["candidates"] == 2.0
    assert report.channels["cache"]["recall@2"] == 1.0
