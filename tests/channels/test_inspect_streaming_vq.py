"""`recall inspect streaming_vq`: what it says of a small model, with and without a trainer, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from inspected_world import inspector, store_with
from recall.v1 import ingest_pb2 as pb
from streaming_vq_world import SMALL, written

from engine.config import load_config
from engine.data.catalogue import Catalogue
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.offline.clusters import PARTS, Moves
from engine.online.state import FOLDER
from engine.state.assignments import AssignedItems, AssignmentLog
from engine.state.embedded import EmbeddedStore
from engine.state.log import LiveLog, LogChange
from engine.state.store import StateStore


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SnapshotStore:
    """The bundled sample with the popular channel and a model of streaming VQ of random weights."""
    return store_with(tmp_path_factory.mktemp("inspect") / "store", "streaming_vq", written, **SMALL)


@pytest.fixture
def inspect(store, capsys, monkeypatch):
    return inspector("streaming_vq", store, capsys, monkeypatch)


@pytest.fixture(scope="module")
def bundle(store):
    return store.newest_valid(verify=False)[1]["streaming_vq"]


def test_it_says_how_full_the_clusters_are(inspect, bundle):
    assignment = bundle.arrays["assignment"]
    sizes = np.bincount(assignment[assignment >= 0], minlength=6)
    code, out, _ = inspect("--json", "--no-live")
    assert code == 0
    found = json.loads(out)
    assert (found["clusters"], found["used"], found["items"]) == (6, 6, assignment.size)
    assert found["placed"] == sizes.sum()
    assert (found["fullest"], found["largest"]) == (sizes.argmax(), sizes.max())
    assert found["largest_share"] == pytest.approx(sizes.max() / sizes.sum())
    assert sum(clusters for _, _, clusters, _ in found["bins"]) == 6
    assert sum(items for *_, items in found["bins"]) == sizes.sum()
    assert found["moves"] is None
    code, out, _ = inspect()
    assert code == 0
    assert f"{sizes.sum():,} of {assignment.size:,}" in out
    assert "There is no state store: the release alone, and nobody says what moved." in out


def test_it_lists_the_items_of_a_cluster_by_bias(inspect, bundle, store):
    code, out, _ = inspect("--cluster", 3, "--json", "--limit", 2)
    assert code == 0
    found = json.loads(out)
    rows = np.flatnonzero(bundle.arrays["assignment"] == 3)
    best = rows[np.argsort(-bundle.arrays["item_bias"][rows], kind="stable")[:2]].astype(np.int32)
    catalogue = Catalogue.load(store.newest_valid(verify=False)[1][CATALOGUE].arrays)
    assert found["size"] == rows.size
    assert [each["item"] for each in found["items"]] == catalogue.items.ids(best).tolist()
    assert sorted([*found["nearest"], 3]) == list(range(6))
    code, out, _ = inspect("--cluster", 3)
    assert code == 0
    assert f"cluster 3: {rows.size:,} items" in out


def test_it_draws_the_clusters(inspect, tmp_path):
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install 'recall-engine[train]'"
    )
    code, out, _ = inspect("--picture", tmp_path / "clusters.png")
    assert code == 0
    assert "clusters.png" in out
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = inspect("--picture", tmp_path / "not-there" / "clusters.png")
    assert code == 2
    assert "cannot be written" in err


def test_it_says_what_a_trainer_moved_since(inspect, bundle, store):
    folder = store.root / FOLDER
    arrays = bundle.arrays
    keys, clusters = arrays["item_keys"], arrays["assignment"]
    there = np.flatnonzero(clusters >= 0)[:3]
    with EmbeddedStore(folder) as embedded:
        state = StateStore.connect(embedded.url, load_config().state.prefix, 1000.0)
        code, out, _ = inspect()
        assert code == 0
        assert "No trainer has written to its assignment log" in out
        log = AssignmentLog(state, "streaming_vq")
        lease = log.lease(60)
        assert lease.take()
        log.begin(bundle.version, lease)
        LiveLog(state).publish([LogChange(999_999_001, 1, pb.Item(title="A new one"))])
        moved = (clusters[there] + [0, 1, 1]) % 6
        log.write(
            AssignedItems(keys[there], moved.astype(np.int32), np.zeros(3, np.float32)), bundle.version, lease
        )
        new = AssignedItems(np.array([999_999_001]), np.array([5], np.int32), np.array([1e9], np.float32))
        log.write(new, bundle.version, lease)
        code, out, _ = inspect("--json")
        assert code == 0
        moves = json.loads(out)["moves"]
        assert (moves["assignments"], moves["items"], moves["first"]) == (4, 4, 1)
        assert (moves["moves"], moves["moved"], moves["away"]) == (2, 2, 2)
        assert json.loads(out)["items"] == clusters.size + 1
        code, out, _ = inspect("--cluster", 5, "--limit", 1)
        assert "A new one" in out
        code, out, _ = inspect()
        assert "2 moves of 2 items, of which 2 are elsewhere now" in out
        _, out, _ = inspect("--minutes", 0.1, "--json", "--no-live")
        assert json.loads(out)["live"] == "the release alone, as --no-live says"
        # Another build's clusters are other clusters.
        log.begin("another", lease)
        code, out, _ = inspect()
        assert code == 0
        assert "The assignment log is of run another: the release alone" in out
        lease.let_go()
        state.close()


def test_what_is_not_there_is_refused_in_one_sentence(inspect, store, tmp_path):
    for arguments, words in (
        (("--cluster", 6, "--no-live"), "--cluster: there is no cluster 6: they are 0 to 5"),
        (("--cluster", -1, "--no-live"), "there is no cluster -1"),
        (("--channel", "popular", "--no-live"), "no model of streaming VQ"),
        (("--channel", "nothing", "--no-live"), "has no snapshot of 'nothing'"),
    ):
        code, _, err = inspect(*arguments)
        assert code == 2, arguments
        assert words in err
        assert err.strip().count("\n") == 0 or len(err.strip().split("\n")) <= 2
    assert inspect(directory=tmp_path / "empty")[0] == 2


def items_of(**where: int) -> AssignedItems:
    keys = [int(name[1:]) for name in where]
    return AssignedItems(
        np.array(keys, np.int64), np.array([*where.values()], np.int32), np.zeros(len(keys), np.float32)
    )


def test_moves_are_counted_from_where_items_were_before():
    minute = 60_000
    known = items_of(i1=0, i2=0, i3=0)
    entries = [
        (1 * minute, items_of(i1=1, i9=4)),  # before the time that is looked at
        (61 * minute, items_of(i1=1, i2=5)),
        (100 * minute, items_of(i2=0, i9=3, i8=2)),
        (110 * minute, items_of(i9=2)),
    ]
    moves = Moves.of(entries, known, 0, 120 * minute, 60)
    assert (moves.assignments, moves.items, moves.first) == (6, 4, 1)
    assert (moves.moves, moves.moved) == (4, 2)  # 2 to 5 and back, 9 to 3 and to 2
    assert moves.away == 1  # 9
    assert [part for part in moves.parts if part != (0, 0)] == [(2, 1), (3, 2), (1, 1)]
    assert len(moves.parts) == PARTS
    assert set(moves.flows) == {(0, 5, 1), (5, 0, 1), (4, 3, 1), (3, 2, 1)}
    assert moves.newest_ms == 110 * minute
    # A snapshot in between says where its items were by then.
    later = Moves.of(entries[:2], items_of(i1=0, i2=5), 30 * minute, 120 * minute, 60)
    assert (later.moves, later.moved) == (1, 1)
    none = Moves.of([], known, 0, 120 * minute, 60)
    assert (none.assignments, none.moves, none.newest_ms) == (0, 0, 0)
