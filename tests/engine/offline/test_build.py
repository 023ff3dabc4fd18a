"""The build: what is made, what is used again, what is the same, and what is left when it breaks off."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from offline_world import Steps, config_of, dataset_of, log_of, random_likes

import engine
from engine.config import Config, load_config
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError, ConfigError, DatasetError, SnapshotError
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.data.sample import sample_path
from engine.data.snapshot import CATALOGUE, SnapshotStore
from engine.offline.build import (
    Source,
    _reached,
    build_release,
    code_of,
    events_read,
    previous_arrays,
    usable_cores,
    used_channels,
)
from engine.online.replica import Replica
from engine.online.request import Request
from engine.plugins import channel_class
from engine.state.history import HISTORY

CHANNELS = {"itemcf": {}, "swing": {}, "usercf": {}, "popular": {}, "fresh": {}}
CONFIG = config_of(CHANNELS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return dataset_of(folder, [*random_likes(), (10, 100, "view", 2_000_000_000)])


def build(store: Path | SnapshotStore, dataset: Dataset, config: Config = CONFIG, **more):
    """Build; returns component -> version and the source."""
    store = store if isinstance(store, SnapshotStore) else SnapshotStore(store)
    release, source = build_release(config, dataset, store, more.pop("progress", SilentProgress()), **more)
    assert store.current() == release
    return release.snapshots, source


def digests(store: SnapshotStore) -> dict[str, dict[str, str]]:
    release = store.current()
    assert release is not None
    return {
        component: {name: file.sha256 for name, file in store.manifest(component, version).files.items()}
        for component, version in release.snapshots.items()
    }


def tree(root: Path) -> set[str]:
    """What a reader or the next build can see of a store."""
    return {
        str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith(".lock")
    }  # fmt: skip


# --- what is made ------------------------------------------------------------------------------


def test_the_sample_becomes_a_release_that_serves(tmp_path):
    config, store, steps = load_config(), SnapshotStore(tmp_path), Steps()
    versions, source = build(store, Dataset.open(sample_path()), config, progress=steps)
    assert list(versions) == [CATALOGUE, HISTORY, *used_channels(config)]
    assert steps.tasks[0] == "reading"
    assert set(steps.tasks) >= {"itemcf", "swing", "usercf", "popular", "fresh"}
    assert (len(source.catalogue.users), len(source.catalogue.items)) == (2100, 3235)
    manifest = store.manifest("itemcf", versions["itemcf"])
    assert manifest.catalogue == versions[CATALOGUE]
    assert manifest.dataset == source.key == Dataset.open(sample_path()).fingerprint()
    assert manifest.parameters["options"]["neighbours"] == 200
    assert "last_n" not in manifest.parameters["options"]  # of the online half alone
    replica = Replica.open(config, store)
    assert replica.versions == versions
    assert list(replica.pipelines) == ["default", "related"]


def test_events_of_no_interest_are_reported_by_kind(tmp_path, dataset):
    _, source = build(tmp_path, dataset)
    assert source.ignored == {"view": 1}
    assert source.liked.entries == len(random_likes())
    _, strict = build(tmp_path, dataset, config_of(CHANNELS, interest={"like": 1.0}))
    clicks = sum(kind == "click" for _, _, kind, _ in random_likes())
    assert strict.ignored == {"click": clicks, "view": 1}


def test_data_without_interest_is_refused_with_the_kinds_it_has(tmp_path, dataset):
    config = config_of(CHANNELS, interest={"love": 1.0})
    with pytest.raises(BuildError, match=r"kinds of event there: .*view \(1\)") as caught:
        build(tmp_path, dataset, config)
    assert "[interest]" in str(caught.value)
    assert SnapshotStore(tmp_path).current() is None


def test_a_part_of_a_log_is_a_source_of_its_own(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    events = EventLog.read(dataset, catalogue)
    where = events.users == 0
    source = Source.of(CONFIG, events, catalogue, "part", where)
    assert source.liked.user_counts()[1:].sum() == 0
    assert source.liked.entries > 0
    assert source.key == "part"
    with pytest.raises(BuildError, match=r"kinds of event there: like \(\d+\)$"):
        Source.of(config_of(interest={"love": 1.0}), events, catalogue, "part", where & (events.kinds == 0))


def test_now_is_the_last_event_that_counts_and_never_the_clock(tmp_path, dataset):
    _, source = build(tmp_path, dataset)
    assert source.now == max(time for *_, time in random_likes())


def test_only_what_a_scene_uses_is_built(tmp_path, dataset):
    config = config_of(CHANNELS, quotas={"itemcf": 5}, fallback=["popular"])
    assert used_channels(config) == ["itemcf", "popular"]
    versions, _ = build(tmp_path, dataset, config)
    assert set(versions) == {CATALOGUE, HISTORY, "itemcf", "popular"}


def test_a_channel_that_loads_anothers_snapshot_is_not_built_and_answers_as_that_one_does(tmp_path, dataset):
    channels = {"itemcf": {"neighbours": 30}, "also": {"type": "itemcf", "snapshot": "itemcf"}, "popular": {}}
    config = config_of(channels, quotas={"also": 5}, fallback=["popular"])
    assert used_channels(config) == ["itemcf", "popular"]
    store = SnapshotStore(tmp_path)
    versions, _ = build(store, dataset, config, channels=["also"])
    assert set(versions) == {CATALOGUE, HISTORY, "itemcf", "popular"}
    both = config_of(channels, quotas={"also": 5, "itemcf": 5}, fallback=["popular"])
    run = Replica.open(both, store).pipelines["default"].run([Request(user_id=12)])
    lists = np.split(run.columns.fan_out.rows, run.columns.fan_out.offsets[1:-1])
    assert lists[0].size > 0
    assert lists[0].tolist() == lists[1].tolist()


def test_there_is_a_core_to_use():
    assert usable_cores() >= 1


# --- what is the same --------------------------------------------------------------------------


def test_building_twice_gives_the_same_bytes_whatever_the_threads(tmp_path, dataset):
    stores = [SnapshotStore(tmp_path / name) for name in "abc"]
    for store, threads in zip(stores, (1, 2, 3), strict=True):
        build(store, dataset, threads=threads)
    first, *others = [digests(store) for store in stores]
    assert set(first) == {CATALOGUE, HISTORY, *CHANNELS}
    assert all(other == first for other in others)


def test_a_copy_of_the_data_elsewhere_is_the_same_data(tmp_path, dataset):
    store = SnapshotStore(tmp_path / "store")
    first, _ = build(store, dataset)
    copy = dataset_of(tmp_path / "tiny", [*random_likes(), (10, 100, "view", 2_000_000_000)])
    again, _ = build(store, copy)
    assert again == first


# --- what is used again ------------------------------------------------------------------------


def test_a_second_build_uses_everything_again(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    first, _ = build(store, dataset)
    steps = Steps()
    second, _ = build(store, dataset, progress=steps)
    assert second == first
    assert steps.tasks == ["reading"]
    assert all(store.versions(component) == [version] for component, version in first.items())


def rebuilt(store: SnapshotStore, dataset: Dataset, config: Config, **more) -> set[str]:
    before = store.current()
    assert before is not None
    after, _ = build(store, dataset, config, **more)
    return {name for name, version in after.items() if before.snapshots.get(name) != version}


def test_a_changed_option_rebuilds_its_channel_alone(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    build(store, dataset)
    fewer = config_of({**CHANNELS, "itemcf": {"neighbours": 3}})
    assert rebuilt(store, dataset, fewer) == {"itemcf"}
    assert rebuilt(store, dataset, config_of({**CHANNELS, "itemcf": {"neighbours": 3, "top_k": 7}})) == set()
    # What was there before is found again.
    assert rebuilt(store, dataset, CONFIG) == {"itemcf"}
    assert len(store.versions("itemcf")) == 2


def test_a_changed_interest_rebuilds_all_but_the_catalogue(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    build(store, dataset)
    changed = config_of(CHANNELS, interest={"click": 1.0, "like": 5.0})
    assert rebuilt(store, dataset, changed) == {HISTORY, *CHANNELS}


def test_changed_data_rebuilds_everything(tmp_path, dataset):
    store = SnapshotStore(tmp_path / "store")
    build(store, dataset)
    other = dataset_of(tmp_path / "other", random_likes(seed=1))
    assert rebuilt(store, other, CONFIG) == {CATALOGUE, HISTORY, *CHANNELS}


def test_channels_named_are_built_anew_beside_the_others(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    first, _ = build(store, dataset)
    assert rebuilt(store, dataset, CONFIG, channels=["swing"]) == {"swing"}
    second, _ = build(store, dataset)
    assert set(second) == set(first)


def test_the_next_build_makes_good_what_was_damaged(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    versions, _ = build(store, dataset)
    manifest = tmp_path / "swing" / versions["swing"] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:20])
    assert rebuilt(store, dataset, CONFIG) == {"swing"}
    Replica.open(CONFIG, store)


# --- what is left when it breaks off -------------------------------------------------------------


@pytest.fixture(scope="module")
def steps_of_a_build(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> int:
    steps = Steps()
    build(tmp_path_factory.mktemp("counted"), dataset, progress=steps, threads=1)
    assert steps.count > 20
    return steps.count


def test_an_interrupted_first_build_leaves_nothing_in_service(tmp_path, dataset, steps_of_a_build):
    for stop_at in np.linspace(0, steps_of_a_build - 1, 8).astype(int).tolist():
        store = SnapshotStore(tmp_path / str(stop_at))
        with pytest.raises(KeyboardInterrupt):
            build_release(CONFIG, dataset, store, Steps(stop_at), threads=1)
        assert store.current() is None
        assert not list(store.root.rglob(".tmp-*"))
        with pytest.raises(SnapshotError):
            Replica.open(CONFIG, store)


def test_an_interrupted_build_leaves_the_earlier_release_in_service(tmp_path, dataset, steps_of_a_build):
    store = SnapshotStore(tmp_path / "store")
    build(store, dataset)
    before, current = digests(store), store.current()
    other = dataset_of(tmp_path / "other", random_likes(seed=2))
    for stop_at in np.linspace(1, steps_of_a_build // 2, 5).astype(int).tolist():
        with pytest.raises(KeyboardInterrupt):
            build_release(CONFIG, other, store, Steps(stop_at), threads=1)
        assert store.current() == current
        assert not list(store.root.rglob(".tmp-*"))
        # What was finished before is sound, and the rest is not there.
        for component in (CATALOGUE, HISTORY, *CHANNELS):
            for version in store.versions(component):
                store.open(component, version)
    assert digests(store) == before
    assert Replica.open(CONFIG, store).release == current.name
    # The next build takes up what the broken ones finished, and comes to the same.
    build(store, other)
    build(tmp_path / "fresh", other)
    assert digests(store) == digests(SnapshotStore(tmp_path / "fresh"))


def test_a_build_that_fails_publishes_nothing(tmp_path, dataset):
    store = SnapshotStore(tmp_path / "store")
    build(store, dataset)
    current, seen = store.current(), tree(store.root)
    with pytest.raises(BuildError):
        build(store, dataset, config_of(CHANNELS, interest={"love": 1.0}))
    assert (store.current(), tree(store.root)) == (current, seen)


def test_data_that_changes_under_the_build_is_noticed(tmp_path):
    opened = dataset_of(tmp_path / "data", random_likes())
    dataset_of(tmp_path / "data", random_likes()[:-5])
    with pytest.raises(DatasetError, match="has changed since the data set was opened"):
        build(tmp_path / "store", opened)
    assert SnapshotStore(tmp_path / "store").current() is None


def test_old_releases_are_collected(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    raw = CONFIG.model_copy(update={"store": CONFIG.store.model_copy(update={"keep_releases": 2})})
    for neighbours in (3, 4, 5, 6):
        config = raw.with_channel_options({"itemcf": {"neighbours": neighbours}})
        build(store, dataset, config)
    assert len(store.release_names()) == 2


@pytest.mark.parametrize("damage", ["array", "current"])
def test_a_store_that_cannot_serve_is_healed_by_the_next_build(tmp_path, dataset, damage):
    store = SnapshotStore(tmp_path)
    versions, _ = build(store, dataset)
    file = tmp_path / ("current" if damage == "current" else f"swing/{versions['swing']}/neighbours.npy")
    file.write_bytes(file.read_bytes()[:10])
    build(store, dataset)
    assert Replica.open(CONFIG, store).release == store.current().name
    assert store.newest_valid()[2] == []


# --- what channels that learn get ----------------------------------------------------------------


def test_a_channel_in_a_package_is_built_anew_when_any_of_its_modules_changes(tmp_path, monkeypatch):
    folder = tmp_path / "plugins" / "pair"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from plugins.pair.channel import Pair\n")
    (folder / "other.py").write_text("A = 1\n")
    (folder / "channel.py").write_text(
        "from engine.core.channel import Channel\n\n\nclass Pair(Channel):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pair = importlib.import_module("plugins.pair").Pair
    before = code_of(pair)
    assert before == code_of(pair)
    (folder / "other.py").write_text("A = 2\n")
    assert code_of(pair) != before


@pytest.mark.parametrize("changed", ["other.py", "third/module.py"])
def test_a_channel_is_built_anew_when_a_plugin_that_it_imports_changes(tmp_path, monkeypatch, changed):
    folder = tmp_path / f"linked_{changed[:5]}"
    (folder / "third").mkdir(parents=True)
    root = folder.name
    late = f"def late():\n    from {root}.other import A\n"
    (folder / "one.py").write_text(
        f"from engine.core.channel import Channel\n\n\n{late}\n\nclass One(Channel):\n    pass\n"
    )
    (folder / "other.py").write_text(f"from {root}.third.module import B as A\n")
    (folder / "third" / "module.py").write_text("B = 1\n")
    (folder / "alone.py").write_text("C = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    one = importlib.import_module(f"{root}.one").One
    before = code_of(one)
    (folder / "alone.py").write_text("C = 2\n")
    assert code_of(one) == before
    (folder / changed).write_text((folder / changed).read_text() + "D = 2\n")
    assert code_of(one) != before


def test_what_vector_channels_share_is_digested_with_those_that_import_it():
    def packages(channel):
        paths = _reached(channel.__module__, Path(inspect.getsourcefile(channel)))
        return {".".join(path.relative_to(Path(engine.__file__).parents[1]).parts[:2]) for path in paths}

    two_tower, divided, popular = (
        packages(channel_class(name)) for name in ("two_tower", "divide_and_conquer", "popular")
    )
    shared = {"engine.models", "engine.training", "engine.ann"}
    assert two_tower == {"channels.two_tower", *shared}
    assert divided == {"channels.divide_and_conquer", "channels.two_tower", *shared}
    assert popular == {"channels.popular.py"}


def test_events_of_the_kinds_that_are_read_are_kept_up_to_the_time_of_the_cut():
    options = {"training": {"event_weights": {"like": 2.0}}, "rejects": ["reject"]}
    config = config_of({"popular": {}, "two_tower": options})
    log = log_of([(0, 1, "click", 5), (0, 2, "like", 6), (1, 0, "reject", 7), (1, 1, "like", 8)], 2, 3)
    events = events_read(config, ["popular", "two_tower"], log, log.timestamps <= 7)
    assert events.kind_names == ("like", "reject")
    assert events.items.tolist() == [2, 0]
    assert events.kinds.tolist() == [0, 1]
    assert events_read(config, ["popular"], log) is None


def test_an_update_starts_from_what_is_in_service(tmp_path, dataset):
    store = SnapshotStore(tmp_path)
    assert previous_arrays(store, "popular") is None
    versions, _ = build(store, dataset, config_of({"popular": {}}))
    served = store.open("popular", versions["popular"], verify=True).arrays
    assert set(previous_arrays(store, "popular")) == set(served)


def test_an_option_that_does_not_fit_the_data_is_named_by_its_whole_key(tmp_path, dataset):
    wrong = {
        "type": "two_tower",
        "item_features": [{"name": "colour", "kind": "categorical"}],
        "tie_items": False,
    }
    with pytest.raises(ConfigError, match=r"items\.parquet has no column 'colour'; it has none") as caught:
        build(tmp_path, dataset, config_of({"mine": wrong}))
    assert caught.value.field == "channels.mine.item_features.0.name"
