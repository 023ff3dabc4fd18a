"""`recall inspect deep_retrieval`: what it says of a small model in a store, and what it refuses."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from deep_retrieval_world import SMALL, written
from inspected_world import inspector, store_with

from engine.cli.inspected import batch_of, sampled
from engine.core.errors import ConfigError, SnapshotError
from engine.core.types import RaggedRows
from engine.data.catalogue import Catalogue
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.offline.lattice import Lattice, PathSizes, TopPath
from engine.testing import interactions_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SnapshotStore:
    """The bundled sample with the popular channel and a Deep Retrieval model of random weights."""
    return store_with(tmp_path_factory.mktemp("inspect") / "store", "deep_retrieval", written, **SMALL)


@pytest.fixture
def inspect(store, capsys, monkeypatch):
    return inspector("deep_retrieval", store, capsys, monkeypatch)


@pytest.fixture(scope="module")
def arrays(store):
    return store.newest_valid(verify=False)[1]["deep_retrieval"].arrays


def test_it_says_how_full_the_paths_are(inspect, arrays):
    assignment = arrays["assignment"]
    codes, sizes = np.unique(assignment[assignment >= 0], return_counts=True)
    code, out, _ = inspect("--sample", 40, "--beam", 10, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["width"], found["depth"], found["paths"]) == (5, 3, 125)
    assert (found["used"], found["entries"]) == (codes.size, sizes.sum())
    assert found["largest"] == sizes.max()
    placed = (assignment >= 0).any(1).sum()
    assert found["placed"] == placed
    assert found["largest_share"] == pytest.approx(sizes.max() / placed)
    fullest = codes[np.argmax(sizes)]
    assert found["fullest"] == f"{fullest // 25}-{fullest // 5 % 5}-{fullest % 5}"
    assert sum(paths for _, _, paths, _ in found["bins"]) == codes.size
    assert sum(items for *_, items in found["bins"]) == sizes.sum()
    assert found["top_path"]["users"] == 40
    assert 1 / 125 < found["top_path"]["share"] < 1
    code, out, _ = inspect("--sample", 40)
    assert code == 0
    assert "5^3 = 125" in out
    assert re.search(rf"the fullest +{found['fullest']}: {sizes.max()}, ", out)
    assert "40 users with a beam of 50" in out


def test_it_draws_the_sizes(inspect, tmp_path):
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install 'recall-engine[train]'"
    )
    code, out, _ = inspect("--sample", 0, "--picture", tmp_path / "sizes.png")
    assert code == 0
    assert "sizes.png" in out
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = inspect("--sample", 0, "--picture", tmp_path / "not-there" / "sizes.png")
    assert code == 2
    assert "cannot be written" in err


def test_it_lists_the_items_of_a_path(inspect, arrays, store):
    lattice = Lattice(arrays)
    name = lattice.spec.name(int(lattice.codes[3]))
    code, out, _ = inspect("--path", name, "--json", "--limit", 2)
    assert code == 0
    found = json.loads(out)
    rows = np.flatnonzero((arrays["assignment"] == lattice.codes[3]).any(1))
    assert found["size"] == rows.size
    catalogue = Catalogue.load(store.newest_valid(verify=False)[1][CATALOGUE].arrays)
    best = rows[np.argsort(-arrays["rank.bias"][rows], kind="stable")[:2]].astype(np.int32)
    assert [each["item"] for each in found["items"]] == catalogue.items.ids(best).tolist()
    assert [each["title"] for each in found["items"]] == [
        each.title for each in catalogue.describe_items(best)
    ]
    assert all(name in each["paths"] and len(each["paths"]) <= 2 for each in found["items"])
    code, out, _ = inspect("--path", name)
    assert code == 0
    assert found["items"][0]["title"] in out


def test_it_shows_where_a_user_is_led(inspect, arrays, store):
    catalogue = Catalogue.load(store.newest_valid(verify=False)[1][CATALOGUE].arrays)
    user = catalogue.users.ids(np.array([7], np.int32))[0]
    code, out, _ = inspect("--user", user, "--beam", 30, "--json")
    assert code == 0
    found = json.loads(out)
    probabilities = [each["probability"] for each in found["paths"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert (found["beam"], len(found["paths"])) == (30, 20)
    assert sum(probabilities) < found["probability"] <= 1 + 1e-5
    assert found["history"]
    assert all(len(each["titles"]) == min(3, each["size"]) for each in found["paths"])
    # A beam of all paths has all probability.
    code, out, _ = inspect("--user", user, "--beam", 10_000, "--json")
    assert json.loads(out)["probability"] == pytest.approx(1, abs=1e-4)
    code, out, _ = inspect("--user", user)
    assert code == 0
    assert found["paths"][0]["path"] in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--path", "1-2"), "--path: expected a path as N-N-N, each N a node from 0 to 4, got '1-2'"),
        (("--path", "1-2-5"), "got '1-2-5'"),
        (("--path", "1-2-x"), "got '1-2-x'"),
        (("--path", "1-2-3", "--user", "1"), "expected one of --path and --user"),
        (
            ("--user", "999999999999999999999999"),
            "--user: the release knows no user '999999999999999999999999'",
        ),
        (("--user", "nobody"), "--user: the release knows no user 'nobody'"),
        (("--user", "-1"), "--user: the release knows no user '-1'"),
        (("--channel", "two_tower"), "has no snapshot of 'two_tower'; it has "),
        (("--channel", "popular"), "no model of Deep Retrieval"),
    ],
)
def test_it_refuses_with_one_sentence(inspect, options, says):
    code, out, err = inspect(*options)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_it_refuses_a_folder_without_a_release(inspect, tmp_path):
    code, _, err = inspect(directory=tmp_path)
    assert code == 2
    assert "no release has been published here" in err


# --- the model itself ----------------------------------------------------------------------------


def small(items=30, **options):
    rng = np.random.default_rng(0)
    liked = interactions_of([rng.permutation(items)[:6].tolist() for _ in range(40)], items)
    return Lattice(written(liked, {}, **SMALL | {"item_features": []} | options))


def test_a_path_without_items_is_not_shown():
    lattice = small()
    free = next(code for code in range(125) if code not in lattice.codes)
    assert lattice.places(np.array([free, lattice.codes[0]], np.int64)).tolist() == [-1, 0]
    assert lattice.code_of(lattice.spec.name(free)) == free
    with pytest.raises(ConfigError, match="expected a path"):
        lattice.code_of("")


def test_what_is_reached_is_on_the_beam_and_once_on_its_likeliest_path():
    lattice = small()
    users = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    codes, _ = lattice.beam(users, 12)
    found, places = lattice.reached(users, 12)
    for q in range(5):
        wanted = {}
        for code in codes[q].tolist():
            for row in np.flatnonzero((lattice.assignment == code).any(1)).tolist():
                wanted.setdefault(row, code)
        mine = slice(found.offsets[q], found.offsets[q + 1])
        assert (
            dict(zip(found.rows[mine].tolist(), lattice.codes[places[mine]].tolist(), strict=True)) == wanted
        )
    top = TopPath.of(lattice, users, 12, 4)
    counts = np.unique(places, return_counts=True)[1]
    assert top.share == pytest.approx(counts.max() / places.size)
    assert (top.users, top.kept) == (5, 4)


def test_brute_force_is_the_softmax_over_all_placed_items():
    lattice = small()
    users = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    without = RaggedRows.of([np.array([q % 30], np.int32) for q in range(300)])
    got = lattice.best_of_all(users, 7, without)
    placed = (lattice.assignment >= 0).any(1)
    for q in (0, 17, 299):
        scores = np.where(placed, lattice.vectors @ users[q] + lattice.bias, -np.inf)
        scores[q % 30] = -np.inf
        assert got.rows[got.offsets[q] : got.offsets[q + 1]].tolist() == np.argsort(-scores)[:7].tolist()
    whole = lattice.best_of_all(users[:1], 100)
    assert whole.rows.size == placed.sum()


def test_sizes_of_a_model_with_one_path_each():
    sizes = PathSizes.of(small(paths=1))
    assert sizes.entries == sizes.placed
    assert sizes.mean == pytest.approx(sizes.entries / sizes.used)
    assert sizes.bins[0][:2] == (1, 1)


def test_what_is_no_model_of_it_is_refused():
    with pytest.raises(SnapshotError, match="no model of Deep Retrieval"):
        Lattice({"spec": np.frombuffer(b"{}", np.uint8)})


def test_the_users_of_the_sample_have_histories_and_are_always_the_same(store):
    _, snapshots, _ = store.newest_valid(verify=False)
    users = sampled(snapshots, 30)
    assert users.tolist() == sampled(snapshots, 30).tolist()
    batch = batch_of(Catalogue.load(snapshots[CATALOGUE].arrays), snapshots, users)
    assert batch.users.tolist() == users.tolist()
    assert (np.diff(batch.history.offsets) > 0).all()
