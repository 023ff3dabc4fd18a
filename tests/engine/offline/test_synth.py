"""The synthetic world: what is planted is there by its law, channels find it, and the same plan makes the same bytes."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_config
from engine.core.channel import BuildContext, SilentProgress
from engine.core.errors import ConfigError, DatasetError
from engine.core.memory import MemorySink
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog, interest_matrix
from engine.data.snapshot import SnapshotStore
from engine.offline.evaluate import evaluate
from engine.offline.synth import PLANTED, Plan, synthesize
from engine.offline.synth import events as laws
from engine.offline.synth.draws import cumulated, pick, pick_many
from engine.offline.synth.events import EXPOSE, KINDS, stream
from engine.offline.synth.world import POPULARITY_EXPONENT, SHOWN_EXPONENT, World, plant

DAY = 86_400
PLAN = Plan.of(3_000, 2_000, 400_000)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return synthesize(tmp_path_factory.mktemp("synth") / "world", PLAN, SilentProgress())


@pytest.fixture(scope="module")
def world() -> World:
    return plant(PLAN)


@pytest.fixture(scope="module")
def log(dataset: Dataset) -> EventLog:
    return EventLog.read(dataset, Catalogue.from_dataset(dataset))


@pytest.fixture(scope="module")
def arrays(log: EventLog) -> dict[str, dict[str, Any]]:
    """What ItemCF, Swing and UserCF write when they are built from the world."""
    config = load_config()
    liked = interest_matrix(log, config.interest)
    built = {}
    for name in ("itemcf", "swing", "usercf"):
        channel, options = config.channel(name)
        sink = MemorySink()
        now = int(liked.timestamps.max())
        channel.build(options, BuildContext(liked, {}, now, sink, SilentProgress(), 2))
        built[name] = sink.arrays
    return built


def planted(dataset: Dataset, name: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(dataset.path / PLANTED / f"{name}.parquet").to_pydict()
    return columns


def digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def of_kind(log: EventLog, kind: str) -> Any:
    return log.kinds == log.kind_names.index(kind)


def first(arrays: dict[str, Any], most: int) -> tuple[Any, Any]:
    """(row, neighbour) pairs of the first few neighbours of each row."""
    indptr, neighbours = arrays["indptr"], arrays["neighbours"]
    lengths = np.minimum(np.diff(indptr), most)
    owners = np.repeat(np.arange(lengths.size), lengths)
    place = np.arange(owners.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return owners, neighbours[indptr[owners] + place]


# --- the form of what is written ------------------------------------------------------------------


def test_bytes_are_the_same_whatever_the_step_and_others_with_another_seed(tmp_path: Path) -> None:
    sizes = (500, 200, 300_000)
    made = {}
    for name, seed, step in (("one", 1, 1 << 17), ("same", 1, 777), ("other", 2, 1 << 17)):
        synthesize(tmp_path / name, Plan.of(*sizes, seed=seed), SilentProgress(), step)
        made[name] = digests(tmp_path / name)
    assert made["one"] == made["same"]
    assert made["one"]["interactions.parquet"] != made["other"]["interactions.parquet"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_rows_are_as_many_as_asked_for_in_order_of_time_within_the_days(
    dataset: Dataset, log: EventLog
) -> None:
    assert len(log) == dataset.rows["interactions"] == PLAN.events
    assert (dataset.rows["items"], dataset.rows["users"]) == (PLAN.items, PLAN.users)
    assert (np.diff(log.timestamps) >= 0).all()
    assert PLAN.start <= log.timestamps[0] < PLAN.start + DAY
    assert PLAN.end - DAY < log.timestamps[-1] < PLAN.end
    published = dataset.column("items", "published_at").to_numpy()
    assert (log.timestamps >= published[log.items]).all()  # rows are ids here


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 500), (2, 3, 5_000), (40, 1, 5_000), (9, 50, 3_000)])
def test_the_smallest_worlds_are_made_too(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    made = synthesize(tmp_path / "small", Plan.of(*sizes, days=1), SilentProgress())
    assert made.rows["interactions"] == sizes[2]


@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=40),
    share=st.floats(0, 0.999),
    cut=st.tuples(st.integers(0, 39), st.integers(0, 39)),
)
def test_the_kernel_picks_as_numpy_does(weights: list[float], share: float, cut: tuple[int, int]) -> None:
    sums = cumulated(np.array(weights))
    begin, end = min(cut) % len(weights), max(max(cut) % len(weights), min(cut) % len(weights)) + 1
    assert pick(sums, begin, end, share) == pick_many(sums, begin, end, np.array([share]))[0]


# --- the laws -------------------------------------------------------------------------------------


def test_popularity_falls_by_the_planted_power() -> None:
    plan = Plan.of(20_000, 5_000, 1_500_000)
    made = plant(plan)
    shown = np.zeros(plan.items)
    for part in stream(made, 1 << 18):
        shown += np.bincount(part.items[part.kinds == EXPOSE], minlength=plan.items)
    ranks = np.empty(plan.items, np.int64)
    ranks[made.items.ids] = made.items.ranks
    by_rank = np.empty(plan.items)
    by_rank[ranks] = shown
    # Bins of equal width in the logarithm; ages are drawn evenly, so their attention levels out in a bin.
    edges = np.unique(np.rint(np.logspace(1, 4, 13)).astype(int))
    means = [by_rank[low:high].mean() for low, high in pairwise(edges)]
    middles = np.sqrt(edges[:-1] * edges[1:])
    slope = np.polyfit(np.log(middles), np.log(means), 1)[0]
    assert slope == pytest.approx(-SHOWN_EXPONENT, abs=0.04)


def test_kinds_of_event_come_at_the_planted_rates(log: EventLog) -> None:
    counts = {kind: int(of_kind(log, kind).sum()) for kind in KINDS}
    for kind, rate in zip(("like", "collect", "share"), laws.RATES, strict=True):
        assert counts[kind] / counts["click"] == pytest.approx(rate, rel=0.06)
    mean_rate = sum(share * rate for share, rate in zip(laws.ROUTE_SHARES, laws.CLICK_RATES, strict=False))
    assert counts["click"] / counts["expose"] == pytest.approx(mean_rate, rel=0.15)
    # Clicked items are the better ones, so the finished are a little more than at quality 1/2.
    assert 0.35 <= counts["finish"] / counts["click"] <= 0.40
    assert counts["dislike"] / (counts["expose"] - counts["click"]) == pytest.approx(
        laws.DISLIKE_RATE, rel=0.15
    )


def test_users_click_what_they_are_interested_in(dataset: Dataset, log: EventLog) -> None:
    items, users = planted(dataset, "items"), planted(dataset, "users")
    wants = np.zeros((PLAN.users, PLAN.interests), bool)
    for user, interests in enumerate(users["interests"]):
        wants[user, interests] = True
    main = np.array(items["interest"])
    clicked = of_kind(log, "click")
    share = wants[log.users[clicked], main[log.items[clicked]]].mean()
    chance = wants[np.random.default_rng(1).permutation(log.users[clicked]), main[log.items[clicked]]].mean()
    assert share > 0.7
    assert share > 3 * chance


def test_attention_falls_with_age(dataset: Dataset, log: EventLog, world: World) -> None:
    published = dataset.column("items", "published_at").to_numpy()
    weights = np.empty(PLAN.items)
    weights[world.items.ids] = (world.items.ranks + 1.0) ** -POPULARITY_EXPONENT
    last = log.timestamps >= PLAN.end - 5 * DAY
    shown = np.bincount(log.items[last & of_kind(log, "expose")], minlength=PLAN.items)
    age = PLAN.end - 5 * DAY - published
    young, old = (age > 0) & (age < 5 * DAY), age > 60 * DAY
    ratio = (shown[young].sum() / weights[young].sum()) / (shown[old].sum() / weights[old].sum())
    assert 2 < ratio < 5


def test_visits_follow_the_hours_of_the_day(log: EventLog) -> None:
    hours = np.bincount(log.timestamps % DAY // 3600, minlength=24)
    peak = laws.RHYTHM_PEAK_HOUR
    expected = 1 + laws.RHYTHM_AMPLITUDE * np.cos(2 * np.pi * (np.arange(24) + 0.5 - peak) / 24)
    assert hours / hours.mean() == pytest.approx(expected, abs=0.1)


def test_users_see_more_of_the_city_they_live_in(dataset: Dataset, log: EventLog, world: World) -> None:
    cities = np.empty(PLAN.items, np.int64)
    cities[world.items.ids] = world.items.cities
    shown = of_kind(log, "expose")
    here = cities[log.items[shown]] == world.users.cities[log.users[shown]]
    elsewhere = cities[log.items[shown]] == np.random.default_rng(1).permutation(
        world.users.cities[log.users[shown]]
    )
    assert here.mean() > 1.8 * elsewhere.mean()
    names = dataset.column("users", "city").to_pylist()
    assert len(set(names)) > 1


def test_follows_are_the_planted_ones_and_authors_have_few_interests(dataset: Dataset, world: World) -> None:
    authors = planted(dataset, "authors")
    own = [{one, two} for one, two in zip(authors["interest"], authors["second_interest"], strict=True)]
    main = np.empty(PLAN.items, np.int64)
    main[world.items.ids] = world.items.interests
    makers = dataset.column("items", "author_id").to_pylist()
    assert all(interest in own[author] for author, interest in zip(makers, main.tolist(), strict=True))
    follows = list(
        zip(
            dataset.column("follows", "user_id").to_pylist(),
            dataset.column("follows", "author_id").to_pylist(),
            strict=True,
        )
    )
    assert len(set(follows)) == len(follows)
    wanted = planted(dataset, "users")["interests"]
    share = np.mean([bool(own[author] & set(wanted[user])) for user, author in follows])
    assert share > 0.65


# --- channels find it -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["itemcf", "swing"])
def test_neighbours_of_items_are_substitutes_or_of_one_interest(
    name: str, dataset: Dataset, arrays: dict[str, dict[str, Any]]
) -> None:
    items = planted(dataset, "items")
    group, main = np.array(items["group"]), np.array(items["interest"])
    second = np.array([-2 if value is None else value for value in items["second_interest"]])
    owner, other = first(arrays[name], 3)
    same_group = (group[owner] == group[other]).mean()
    same = (main[owner] == main[other]) | (main[owner] == second[other]) | (second[owner] == main[other])
    assert same_group > 0.1  # by chance 8 of 3,000, 0.3 %
    assert same.mean() > 0.5  # by chance under a tenth


def test_neighbours_of_users_share_interests_or_a_circle(
    dataset: Dataset, arrays: dict[str, dict[str, Any]]
) -> None:
    users = planted(dataset, "users")
    owner, other = first(arrays["usercf"], 3)
    wants = [set(interests) for interests in users["interests"]]

    def sharing(pairs: Any) -> float:
        return float(np.mean([bool(wants[a] & wants[b]) for a, b in pairs]))

    found, chance = (
        sharing(zip(owner, other, strict=True)),
        sharing(zip(owner, np.random.default_rng(1).permutation(other), strict=True)),
    )
    circles = users["circle"]
    members = [a for a in range(PLAN.users) if circles[a] is not None]
    nearest: dict[int, list[bool]] = {a: [] for a in members}
    for a, b in zip(*first(arrays["usercf"], 3), strict=True):
        if a in nearest:
            nearest[a].append(circles[b] == circles[a])
    assert found > 0.85
    assert found > chance + 0.25
    assert np.mean([np.mean(hits) for hits in nearest.values() if hits]) > 0.6


def test_swing_holds_circles_back_where_itemcf_does_not(
    dataset: Dataset, arrays: dict[str, dict[str, Any]]
) -> None:
    items = planted(dataset, "items")
    main = np.array(items["interest"])

    def purity(name: str) -> float:
        owner, other = first(arrays[name], 10)
        return float((main[owner] == main[other]).mean())

    assert purity("swing") > purity("itemcf")


def test_channels_find_later_likes_far_above_popularity(dataset: Dataset, tmp_path: Path) -> None:
    names = [
        "itemcf",
        "swing",
        "usercf",
        "followed_authors",
        "interacted_authors",
        "same_city",
        "geo",
        "popular",
    ]
    store = SnapshotStore(tmp_path / "store")
    report = evaluate(load_config(), dataset, "temporal", names, [20], store, SilentProgress())
    recall = {name: metrics["recall@20"] for name, metrics in report.channels.items()}
    assert report.users > 1_000
    chance = 20 / PLAN.items
    least = {"itemcf": 1.2, "swing": 1.4, "usercf": 1.4, "followed_authors": 1.1, "interacted_authors": 1.3}
    for name, times in least.items():
        assert recall[name] > times * recall["popular"]
    assert recall["geo"] > 1.3 * chance
    assert recall["same_city"] > 2 * chance


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"items": 0}, "--items: expected a whole number from 1 "),
        ({"users": -1}, "--users: expected a whole number from 1 "),
        ({"events": 0}, "--events: expected a whole number from 1 "),
        ({"days": 0}, "--days: expected a whole number from 1 "),
        ({"interests": 0}, "--interests: expected a whole number from 1 "),
        ({"interests": 101}, "--interests: there cannot be more interests than items"),
        ({"authors": 101}, "--authors: there cannot be more authors than items"),
        ({"cities": 0}, "--cities: expected a whole number from 1 "),
        ({"seed": -1}, "--seed: expected a whole number from 0 "),
        ({"end": 10}, "--end: expected a whole number from "),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan.of(**{"items": 100, "users": 10, "events": 100, **change})


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="is there already and not empty"):
        synthesize(tmp_path, Plan.of(10, 10, 100), SilentProgress())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    synthesize(tmp_path / "empty", Plan.of(10, 10, 100), SilentProgress())
    assert Dataset.open(tmp_path / "empty").rows["items"] == 10


def test_what_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(SilentProgress):
        def advance(self, amount: int = 1) -> None:
            if amount > 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "world", Plan.of(10, 10, 1000), Broken())
    assert list(tmp_path.iterdir()) == []
