"""The evaluation: metrics worked out on paper, and on real data what the serving pipeline gives by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from offline_world import Steps, config_of, dataset_of, lists_of, random_likes

from engine.config import Config, SceneConfig, load_config
from engine.core.channel import BuildContext, LoadContext, SilentProgress
from engine.core.errors import ConfigError, DatasetError
from engine.core.memory import MemorySink
from engine.core.merge import MergeMode
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset, write_dataset
from engine.data.events import EventLog
from engine.data.live import columns_of
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.evaluate import Report, evaluate, restricted, scene_of
from engine.offline.protocols import HeldUsers, Split, cut
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.request import Request
from engine.state.history import SnapshotHistory, write_history
from filters.excluded import Excluded

LOG3 = math.log2(3)

# Item ids 0 to 5, of which the popular channel thinks 0 1 2 3 4 5 and the fresh one 5 4 3 2 1 0.
TRAIN = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
TEST = [(1, 1), (2, 5), (3, 3), (3, 5), (4, 0)]
CHANNELS = {"popular": {}, "fresh": {}, "again": {"type": "popular"}}
CONFIG = config_of(CHANNELS, quotas={"popular": 1, "fresh": 1}, limit=2, fallback=["again"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = [(*pair, "click", "train") for pair in TRAIN] + [(*pair, "click", "test") for pair in TEST]
    return dataset_of(
        tmp_path_factory.mktemp("hand") / "hand",
        rows,
        items={"item_id": list(range(6)), "published_at": [1_000_000 * at for at in range(1, 7)]},
        columns=("user_id", "item_id", "event", "split"),
    )


def run(
    dataset: Dataset, store: Path, channels: list[str], cuts=(1, 2), config: Config = CONFIG, **more
) -> Report:
    progress = more.pop("progress", SilentProgress())
    protocol = more.pop("protocol", "fixed-split")
    return evaluate(config, dataset, protocol, channels, cuts, SnapshotStore(store), progress, **more)


@pytest.fixture(scope="module")
def report(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(dataset, tmp_path_factory.mktemp("store"), ["popular", "fresh"])


def test_each_channel_alone_by_hand(report):
    # What they know is masked: popular gives 1 2 | 2 3 | 3 4, fresh gives 5 4 to all three.
    assert (report.users, report.items) == (3, 6)
    assert report.channels["popular"] == pytest.approx(
        {
            "recall@1": (1 + 0 + 1 / 2) / 3,
            "tail@1": (1 + 0 + 1 / 2) / 3,
            "ndcg@1": 2 / 3,
            "hit@1": 2 / 3,
            "precision@1": 2 / 3,
            "f@1": (1 + 0 + 2 / 3) / 3,
            "coverage@1": 3 / 6,
            "recall@2": (1 + 0 + 1 / 2) / 3,
            "tail@2": (1 + 0 + 1 / 2) / 3,
            "ndcg@2": (1 + 0 + 1 / (1 + 1 / LOG3)) / 3,
            "hit@2": 2 / 3,
            "precision@2": 1 / 3,
            "f@2": (2 / 3 + 0 + 1 / 2) / 3,
            "coverage@2": 4 / 6,
            "candidates": 2,
        }
    )
    assert report.channels["fresh"]["recall@2"] == pytest.approx((0 + 1 + 1 / 2) / 3)
    assert report.channels["fresh"]["coverage@2"] == pytest.approx(2 / 6)


def test_the_merged_list_by_hand(report):
    # One each: 1 5 | 2 5 | 3 5, the first of each because of its lower row or the other channel's word for it.
    assert report.merged == pytest.approx(
        {
            "recall@1": (1 + 0 + 1 / 2) / 3,
            "tail@1": (1 + 0 + 1 / 2) / 3,
            "ndcg@1": 2 / 3,
            "hit@1": 2 / 3,
            "precision@1": 2 / 3,
            "f@1": (1 + 0 + 2 / 3) / 3,
            "coverage@1": 3 / 6,
            "recall@2": 1,
            "tail@2": 1,
            "ndcg@2": (1 + 1 / LOG3 + 1) / 3,
            "hit@2": 1,
            "precision@2": 2 / 3,
            "f@2": (2 / 3 + 2 / 3 + 1) / 3,
            "coverage@2": 4 / 6,
            "candidates": 2,
        }
    )


def test_overlap_and_unique_share_by_hand(report):
    # Of six entries each, the third user's 4 is in both lists; no hit is.
    assert report.overlap == {
        "popular": {"fresh": pytest.approx(1 / 6)},
        "fresh": {"popular": pytest.approx(1 / 6)},
    }
    assert report.unique_share == {"popular": 1.0, "fresh": 1.0}


def test_of_two_channels_each_without_the_other_is_the_other(report):
    assert report.without == {"popular": report.channels["fresh"], "fresh": report.channels["popular"]}


def test_users_without_history_are_measured_apart_on_the_fallback(report):
    # The fourth user gets 0 1 and wants 0.
    assert report.cold is not None
    assert report.cold["users"] == 1
    assert (report.cold["recall@1"], report.cold["ndcg@2"], report.cold["coverage@2"]) == (1, 1, 2 / 6)


def test_of_three_channels_each_is_left_out_in_turn(dataset, report, tmp_path):
    config = config_of(CHANNELS, quotas={"popular": 1, "fresh": 1, "again": 1}, limit=3)
    steps = Steps()
    three = run(dataset, tmp_path, ["popular", "fresh", "again"], config=config, progress=steps)
    assert three.channels["popular"] == three.channels["again"] == report.channels["popular"]
    assert three.without["fresh"]["recall@2"] == three.channels["popular"]["recall@2"]
    assert three.without["popular"] == three.without["again"] == report.merged
    assert three.overlap["popular"] == {"fresh": pytest.approx(1 / 6), "again": 1.0}
    # The hits of popular are again's too, those of fresh nobody else's.
    assert three.unique_share == {"popular": 0.0, "fresh": 1.0, "again": 0.0}
    assert three.cold is None
    assert steps.tasks[-1] == "evaluating"


def test_one_channel_is_not_compared_with_anything(dataset, report, tmp_path):
    one = run(dataset, tmp_path, ["popular"])
    assert one.channels["popular"] == report.channels["popular"]
    assert (one.merged, one.without, one.overlap) == (None, {}, {"popular": {}})
    assert one.unique_share == {"popular": 1.0}


def test_the_report_is_one_json_object(report):
    read = json.loads(json.dumps(report.to_json()))
    assert read["protocol"] == "fixed-split"
    assert read["users"] == 3
    assert read["channels"]["popular"]["recall@2"] == report.channels["popular"]["recall@2"]
    assert read["merged"] == report.merged


def test_again_is_the_same_and_builds_nothing(dataset, report, tmp_path):
    first = run(dataset, tmp_path, ["popular", "fresh"])
    store = SnapshotStore(tmp_path)
    before = {name: store.versions(name) for name in ("catalogue", "history", "popular", "fresh", "again")}
    again = run(dataset, tmp_path, ["popular", "fresh"], threads=1)
    assert again == first
    assert (again.channels, again.merged) == (report.channels, report.merged)
    assert {name: store.versions(name) for name in before} == before
    assert store.current() is None  # nothing that was built to be measured goes into service


def test_names_that_nobody_has_are_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="no channel is called 'nope'; declared: popular, fresh, again"):
        run(dataset, tmp_path, ["popular", "nope"])
    with pytest.raises(ConfigError, match="no scene is called 'nope'; known: default"):
        run(dataset, tmp_path, ["popular"], scene="nope")
    with pytest.raises(DatasetError, match="temporal"):
        run(dataset, tmp_path, ["popular"], protocol="temporal")
    assert not list(tmp_path.iterdir())


def test_a_channel_that_fails_is_not_measured_as_if_it_found_nothing(dataset, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("on fire")

    monkeypatch.setattr("channels.fresh.Fresh.recall_batch", broken)
    with pytest.raises(ConfigError, match=r"a channel failed: .*on fire"):
        run(dataset, tmp_path, ["popular", "fresh"])


def test_the_scene_that_is_measured_keeps_the_merge_and_leaves_the_rest():
    base = SceneConfig(quotas={"a": 3, "b": 2}, limit=5, weights={"a": 2.0, "c": 3.0}, fallback=("c",))
    both = scene_of(base, ["b", "a"], 50)
    assert list(both.quotas.items()) == [("b", 2), ("a", 3)]
    assert (both.limit, both.filters, both.fallback) == (50, ("excluded",), ())
    assert both.weights == {"a": 2.0}
    assert scene_of(base, ["a"], 50).quotas == {"a": 50}
    assert scene_of(base, ["a", "c"], 50).quotas == {"a": 50, "c": 50}
    fused = base.model_copy(update={"merge": MergeMode.RANK_FUSION})
    assert scene_of(fused, ["a", "b"], 50).quotas == {"a": 50, "b": 50}


def test_a_restricted_split_keeps_some_users_and_their_truth(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    split = cut(CONFIG, EventLog.read(dataset, catalogue), "fixed-split", "test")
    assert restricted(split, 3) is split
    fewer = restricted(split, 2)
    assert lists_of(fewer.truth) == lists_of(restricted(split, 2).truth)
    whole = dict(zip(split.users.tolist(), lists_of(split.truth), strict=True))
    assert dict(zip(fewer.users.tolist(), lists_of(fewer.truth), strict=True)).items() <= whole.items()
    assert fewer.users.size == 2


def test_what_users_know_is_in_the_lists_if_it_is_asked_for(dataset, tmp_path):
    got = run(dataset, tmp_path, ["popular"], repeats=True)
    # All three get 0 1, which they know but for the first user's 1.
    assert got.channels["popular"]["precision@2"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert got.statement.endswith("what users know is not masked")


def test_users_who_were_not_learnt_from_are_answered_by_what_they_bring(tmp_path):
    data = dataset_of(tmp_path / "data", random_likes(60))
    config = load_config()
    report = run(
        data,
        tmp_path / "store",
        ["itemcf", "usercf"],
        (5,),
        config,
        protocol="disjoint-users",
        held=HeldUsers(8, 5),
    )
    events = EventLog.read(data, Catalogue.from_dataset(data))
    split = cut(config, events, "disjoint-users", "test", HeldUsers(8, 5))
    lists = lists_by_hand(config, data, split, ["itemcf"], 5)
    hits = [
        sum(row in mine for row in ranked) for ranked, mine in zip(lists, lists_of(split.truth), strict=True)
    ]
    assert report.users == 8
    assert report.channels["itemcf"]["precision@5"] == pytest.approx(np.mean(hits) / 5)
    assert report.channels["itemcf"]["precision@5"] > 0
    # UserCF has no neighbours for those it was not built from.
    assert report.channels["usercf"]["candidates"] == 0


def test_both_parts_of_disjoint_users_ask_what_was_built_once(tmp_path):
    data = dataset_of(tmp_path / "data", random_likes(60))
    parts = [
        run(data, tmp_path / "store", ["popular"], (5,), protocol="disjoint-users", part=part)
        for part in ("validation", "test")
    ]
    assert parts[0].snapshots == parts[1].snapshots


# --- on real data --------------------------------------------------------------------------------


def lists_by_hand(
    config: Config, dataset: Dataset, split: Split, names: list[str], limit: int
) -> list[list[int]]:
    """What the scene's pipeline, put together from its parts, answers each user when asked alone."""
    catalogue = Catalogue.from_dataset(dataset)
    channels = {}
    for name in names:
        kind, options = config.channel(name)
        sink = MemorySink()
        now = int(split.learnt.timestamps.max())
        columns = catalogue.item_columns()
        kind.build(options, BuildContext(split.learnt, columns, now, sink, SilentProgress(), 1))
        channels[name] = kind.load(
            options,
            LoadContext(sink.arrays, len(catalogue.items), len(catalogue.users), columns_of(catalogue)),
        )
    history = MemorySink()
    write_history(history, split.known, config.history.keep)
    hydrator = Hydrator(catalogue.items, catalogue.users, SnapshotHistory(history.arrays))
    scene = SceneConfig(
        quotas={name: limit if len(names) == 1 else config.scenes["default"].quotas[name] for name in names},
        limit=limit,
        filters=("excluded",),
        fallback=(),
    )
    pipeline = Pipeline(scene, channels, {"excluded": Excluded(None)}, hydrator)
    found = []
    for user in split.users.tolist():
        mine = split.known.rows[split.known.indptr[user] : split.known.indptr[user + 1]]
        request = Request(
            user_id=int(catalogue.users.ids(np.array([user]))[0]), excluded=catalogue.items.ids(mine)
        )
        found.append(pipeline.run([request]).merged.rows.tolist())
    return found


def compare(config: Config, dataset: Dataset, protocol, store: Path) -> Report:
    names = ["itemcf", "swing", "usercf"]
    report = run(dataset, store, names, (5, 20), config, protocol=protocol)
    split = cut(config, EventLog.read(dataset, Catalogue.from_dataset(dataset)), protocol, "test")
    truth = lists_of(split.truth)
    assert report.users == len(truth)
    for wanted, asked in ((report.channels["itemcf"], ["itemcf"]), (report.merged, names)):
        lists = lists_by_hand(config, dataset, split, asked, 20)
        for k in (5, 20):
            hits = [sum(row in mine for row in ranked[:k]) for ranked, mine in zip(lists, truth, strict=True)]
            shares = [hit / len(mine) for hit, mine in zip(hits, truth, strict=True)]
            assert wanted[f"recall@{k}"] == pytest.approx(np.mean(shares))
            assert wanted[f"hit@{k}"] == pytest.approx(np.mean(np.array(hits) > 0))
        assert wanted["candidates"] == pytest.approx(np.mean([len(ranked) for ranked in lists]))
    return report


def subset(source: Path, folder: Path, users: int) -> Dataset:
    """The events of the first users of a data set."""
    table = pq.read_table(source / "interactions.parquet")
    chosen = np.sort(pc.unique(table["user_id"]).to_numpy())[:users]
    events = table.filter(pc.is_in(table["user_id"], pc.cast(list(chosen), table["user_id"].type)))
    return write_dataset(folder, events, meta={"name": "subset"})


def test_on_the_sample_it_is_what_the_pipeline_gives_by_hand(tmp_path):
    dataset = subset(sample_path(), tmp_path / "subset", 300)
    report = compare(load_config(), dataset, "temporal", tmp_path / "store")
    assert report.users > 100


def test_on_movies_it_is_what_the_pipeline_gives_by_hand(real_data, tmp_path):
    dataset = subset(real_data / "ml-1m-positives", tmp_path / "subset", 400)
    report = compare(load_config(), dataset, "leave-one-out", tmp_path / "store")
    assert report.users == 400
    assert report.channels["itemcf"]["hit@20"] > 0.1
    assert report.merged["coverage@20"] > report.merged["coverage@5"]


def test_lists_come_back_in_the_order_of_the_users(tmp_path):
    # More users than go down the pipeline together: whoever comes in another batch keeps their own list.
    rows = [(user, user % 50, "click", "train") for user in range(200)]
    rows += [(user, (user + 1) % 50, "click", "test") for user in range(200)]
    chain = dataset_of(tmp_path / "chain", rows, columns=("user_id", "item_id", "event", "split"))
    report = run(chain, tmp_path / "store", ["popular"], (50,))
    assert report.channels["popular"]["recall@50"] == 1.0
    assert report.channels["popular"]["candidates"] == 49
