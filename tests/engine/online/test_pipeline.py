"""The pipeline: quotas, over-fetch, fallback, failures, deadlines; a batch is its queries one by one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.fresh import Fresh
from channels.itemcf import ItemCF
from channels.popular import Popular
from channels.swing import Swing
from channels.usercf import UserCF
from engine.config import DegradeStep, SceneConfig
from engine.core.candidates import CandidateBatch, Candidates, ChannelStatus, TriggerKind
from engine.core.channel import Channel
from engine.core.errors import ContractError
from engine.core.filter import Filter
from engine.core.merge import MergeMode
from engine.core.options import Options
from engine.data.ids import IdIndex
from engine.online.hydrate import Hydrator
from engine.online.pipeline import Pipeline
from engine.online.request import RecentItems, Request
from engine.online.run import Run
from engine.state.history import SnapshotHistory
from engine.testing import built_channel, interactions_of, tiny_interactions
from filters.excluded import Excluded
from filters.seen import Seen

OK, EMPTY, TIMEOUT, ERROR, SKIPPED, GATED = (
    int(status)
    for status in (
        ChannelStatus.OK,
        ChannelStatus.EMPTY,
        ChannelStatus.TIMEOUT,
        ChannelStatus.ERROR,
        ChannelStatus.SKIPPED,
        ChannelStatus.GATED,
    )
)
ITEMS, USERS = 24, 5


class Listed(Channel):
    """Gives each user (row; -1 is the last list) a list that was thought up before."""

    trigger_kind = TriggerKind.ITEM

    def __init__(self, lists: list[list[int]]) -> None:
        super().__init__(Options())
        self.lists = lists
        self.asked: list[list[int]] = []

    def recall(self, query, k):
        rows = self.lists[query.user][:k]
        scores = 100.0 - np.arange(len(rows))
        triggers = query.history[0] if query.history.size else -1
        return Candidates(
            np.array(rows, np.int32), scores.astype(np.float32), np.full(len(rows), triggers, np.int32)
        )

    def recall_batch(self, batch, k):
        self.asked.append(k.tolist())
        return super().recall_batch(batch, k)


def everybody(rows) -> Listed:
    return Listed([list(rows)] * (USERS + 1))


@dataclass
class World:
    """Channels over a catalogue of rows whose ids are row + 100, users 0 to 4 with ids from 1, and their likes."""

    channels: dict[str, Channel]
    quotas: dict[str, int]
    limit: int = 10
    fallback: tuple[str, ...] = ()
    merge: MergeMode = MergeMode.QUOTA
    weights: dict[str, float] = field(default_factory=dict)
    filters: tuple[str, ...] = ("seen", "excluded")
    likes: list[list[int]] = field(default_factory=lambda: [[]] * USERS)
    items: int = ITEMS
    reserve_ms: float = 0.0
    depth: float = 2.0
    degrade: tuple[DegradeStep, ...] = ()
    more_filters: dict[str, Filter] = field(default_factory=dict)

    def pipeline(self) -> Pipeline:
        liked = interactions_of(self.likes, self.items)
        history = SnapshotHistory(
            {
                "indptr": liked.indptr,
                "rows": liked.rows,
                "weights": liked.weights,
                "timestamps": liked.timestamps,
            }
        )
        hydrator = Hydrator(
            IdIndex.of(np.arange(self.items) + 100), IdIndex.of(np.arange(len(self.likes)) + 1), history
        )
        scene = SceneConfig(
            quotas=self.quotas,
            limit=self.limit,
            depth=self.depth,
            fallback=self.fallback,
            weights=self.weights,
            filters=self.filters,
            merge=self.merge.name.lower(),
            degrade=self.degrade,
        )
        filters = {"seen": Seen(Options()), "excluded": Excluded(Options()), **self.more_filters}
        return Pipeline(scene, self.channels, filters, hydrator, self.reserve_ms)


def ids(rows) -> np.ndarray:
    return np.array([100 + row for row in rows], np.int64)


def answer(run: Run, q: int = 0) -> list[int]:
    return run.merged.rows[run.merged.offsets[q] : run.merged.offsets[q + 1]].tolist()


def proposers(run: Run, q: int = 0) -> list[list[int]]:
    """Item -> the numbers of the channels that proposed it."""
    merged = run.merged
    return [
        merged.proposal_channels[merged.proposal_offsets[i] : merged.proposal_offsets[i + 1]].tolist()
        for i in range(merged.offsets[q], merged.offsets[q + 1])
    ]


def everything(run: Run, q: int) -> dict[str, object]:
    """All that a run says of one query, but for times."""
    merged = run.merged
    items = slice(int(merged.offsets[q]), int(merged.offsets[q + 1]))
    proposals = slice(int(merged.proposal_offsets[items.start]), int(merged.proposal_offsets[items.stop]))
    sources = merged.proposal_sources[proposals]
    # A run whose fallback was asked for another query has rows for it, in which this query has nothing.
    eligible, kept = (np.zeros(len(run.status), np.int32) for _ in range(2))
    eligible[: len(merged.eligible)], kept[: len(merged.kept)] = merged.eligible[:, q], merged.kept[:, q]
    return {
        "rows": merged.rows[items].tobytes(),
        "scores": merged.scores[items].tobytes(),
        "proposals": np.diff(merged.proposal_offsets[items.start : items.stop + 1]).tolist(),
        "channels": merged.proposal_channels[proposals].tobytes(),
        "ranks": merged.proposal_ranks[proposals].tobytes(),
        "raw": run.columns.scores[sources].tobytes(),
        "triggers": run.columns.triggers[sources].tobytes(),
        "status": run.status[:, q].tolist(),
        "returned": run.returned[:, q].tolist(),
        "removed": run.removed[:, q].tolist(),
        "eligible": eligible.tolist(),
        "kept": kept.tolist(),
        "unknown": tuple(run.hydrated.unknown[1:3, q].tolist()),
    }


# --- a batch is its queries ----------------------------------------------------------------------


def some(rng, most: int, below: int = ITEMS) -> list[int]:
    """Some rows in some order, each once."""
    return rng.permutation(below)[: rng.integers(0, most + 1)].tolist()


def random_request(rng, names) -> Request:
    recent, excluded = None, None
    if rng.random() < 0.4:
        rows = rng.integers(0, ITEMS + 3, rng.integers(0, 7))
        recent = RecentItems(
            ids=ids(rows),
            points=rng.integers(0, 3, rows.size).astype(np.float32),
            timestamps=np.arange(rows.size, dtype=np.int64),
            kinds=rng.integers(0, 3, rows.size),
            override=bool(rng.integers(2)),
        )
    if rng.random() < 0.7:
        excluded = ids(some(rng, ITEMS + 3, ITEMS + 3) + some(rng, 2))
    return Request(
        user_id=None if rng.random() < 0.2 else int(rng.integers(1, USERS + 2)),
        limit=None if rng.random() < 0.3 else int(rng.integers(1, 31)),
        recent=recent,
        excluded=excluded,
        quotas={name: int(rng.integers(0, 9)) for name in names if rng.random() < 0.2},
    )


@st.composite
def batches(draw):
    """A random world and requests to it; most of it comes from a seed, which is fast to draw."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    split = draw(st.integers(1, len(names)))
    world = World(
        channels={name: Listed([some(rng, ITEMS) for _ in range(USERS + 1)]) for name in names},
        quotas={name: int(rng.integers(0, 7)) for name in names[:split]},
        fallback=tuple(names[split:]),
        limit=draw(st.integers(1, 12)),
        merge=draw(st.sampled_from(MergeMode)),
        weights={name: float(rng.choice([0.5, 1.0, 2.0])) for name in names[:split]},
        filters=draw(
            st.sampled_from([(), ("seen",), ("excluded",), ("seen", "excluded"), ("excluded", "seen")])
        ),
        likes=[some(rng, 5) for _ in range(USERS)],
    )
    return world, [random_request(rng, names) for _ in range(draw(st.integers(1, 6)))]


@given(drawn=batches())
@settings(deadline=None, max_examples=200)
def test_a_batch_answers_as_its_queries_do_alone_bit_for_bit(drawn):
    world, requests = drawn
    pipeline = world.pipeline()
    together = pipeline.run(requests)
    for q, request in enumerate(requests):
        assert everything(together, q) == everything(pipeline.run([request]), 0)


@given(drawn=batches())
@settings(deadline=None, max_examples=50)
def test_the_same_requests_have_the_same_answers_bit_for_bit(drawn):
    world, requests = drawn
    runs = [world.pipeline().run(requests) for _ in range(2)]
    for q in range(len(requests)):
        assert everything(runs[0], q) == everything(runs[1], q)


@given(drawn=batches())
@settings(deadline=None, max_examples=200)
def test_nothing_forbidden_repeated_or_lost_and_the_counts_add_up(drawn):
    world, requests = drawn
    run = world.pipeline().run(requests)
    for q, request in enumerate(requests):
        got = answer(run, q)
        user = request.user_id - 1 if request.user_id is not None and request.user_id <= USERS else -1
        forbidden = set()
        if "excluded" in world.filters and request.excluded is not None:
            forbidden |= set((request.excluded - 100).tolist())
        if "seen" in world.filters:
            forbidden |= set(run.batch.query(q).history.tolist())
        offered = set()
        for name, channel in world.channels.items():
            if request.quotas.get(name) != 0:
                offered |= set(channel.lists[user])
        limit = world.limit if request.limit is None else request.limit
        assert len(got) == len(set(got)) == min(limit, len(offered - forbidden))
        assert set(got) <= offered - forbidden
        # Every candidate that came is eligible or was removed, by one filter; these channels repeat nothing.
        assert run.returned[:, q].sum() == run.merged.eligible[:, q].sum() + run.removed[:, q].sum()
        assert (run.merged.kept[:, q] <= run.merged.eligible[:, q]).all()
        for c, name in enumerate((*world.quotas, *world.fallback)):
            if request.quotas.get(name) == 0:
                assert run.status[c, q] == SKIPPED
            elif c < len(world.quotas) and request.quotas.get(name, world.quotas[name]) > 0:
                assert run.status[c, q] == (OK if run.returned[c, q] else EMPTY)
            else:
                assert run.status[c, q] in (OK, EMPTY, SKIPPED)
    assert not run.messages


def test_channels_are_asked_deeper_only_where_the_answer_is_short():
    few = Listed([[0]] + [list(range(6))] * USERS)  # the first user's quota goes to what others have
    world = World(
        {"few": few, "half": everybody(range(12, 24)), "spare": everybody(range(6, 12))},
        {"few": 3, "half": 2, "spare": 0},
        limit=5,
    )
    run = world.pipeline().run([Request(user_id=1), Request(user_id=2)])
    asked = [channel.asked for channel in world.channels.values()]
    assert asked == [[[5, 5]], [[4, 4]], []]  # five is the whole depth, and one and four make five
    assert run.status.tolist() == [[OK, OK], [OK, OK], [SKIPPED, SKIPPED]]
    few.asked.clear()
    world.channels["half"].asked.clear()
    world.limit = 10  # twice what the quotas sum to: they are stretched
    run = world.pipeline().run([Request(user_id=1), Request(user_id=2, limit=5)])
    asked = [channel.asked for channel in world.channels.values()]
    assert asked == [[[10, 5]], [[8, 4], [10, 0]], [[10, 0]]]
    assert run.status.tolist() == [[OK, OK], [OK, OK], [OK, SKIPPED]]
    assert run.returned.tolist() == [[1, 5], [10, 4], [6, 0]]
    world.depth = 0.0
    assert answer(run, 0) == answer(world.pipeline().run([Request(user_id=1)]))
    assert world.channels["spare"].asked[-1] == [10]


def test_at_a_step_of_degrading_nobody_is_asked_twice_and_those_that_are_left_stand_in_for_the_others():
    steps = (DegradeStep(at=0.5), DegradeStep(at=0.9, without=("half",)))
    few = Listed([[0]] + [list(range(6))] * USERS)
    world = World(
        {"few": few, "half": everybody(range(12, 24))},
        {"few": 3, "half": 2},
        limit=5,
        depth=1.0,
        degrade=steps,
    )
    asked = []
    for step in range(3):
        run = world.pipeline().run([Request(user_id=1)], step)
        asked.append([channel.asked for channel in world.channels.values()])
        few.asked, world.channels["half"].asked = [], []
        assert answer(run) == [[0, 12, 13, 14, 15], [0, 12, 13], [0]][step]
    assert asked == [[[[3]], [[2], [5]]], [[[3]], [[2]]], [[[5]], []]]


def test_a_channel_that_fails_when_asked_for_more_keeps_what_it_had():
    class Once(Listed):
        def recall_batch(self, batch, k):
            if self.asked:
                raise RuntimeError("no more")
            return super().recall_batch(batch, k)

    once = Once([list(range(24))] * (USERS + 1))
    world = World({"nothing": everybody([]), "once": once}, {"nothing": 8, "once": 2})
    run = world.pipeline().run([Request(user_id=1)])
    assert answer(run) == [0, 1, 2, 3]
    assert (run.status.tolist(), run.returned.tolist()) == ([[EMPTY], [ERROR]], [[0], [4]])
    assert run.messages == {(1, 0): "RuntimeError('no more')"}


@pytest.mark.parametrize("mode", list(MergeMode))
def test_the_channels_that_ship_answer_a_batch_as_its_queries_alone(mode):
    users, items = 40, 60
    liked = tiny_interactions(users, items)
    likes = [liked.rows[liked.indptr[u] : liked.indptr[u + 1]].tolist() for u in range(users)]
    published = {"published_at": np.arange(items, dtype=np.int64) * 1000}
    kinds = {"itemcf": ItemCF, "swing": Swing, "usercf": UserCF, "popular": Popular, "fresh": Fresh}
    world = World(
        {name: built_channel(kind, liked, published) for name, kind in kinds.items()},
        {"itemcf": 5, "swing": 5, "usercf": 5},
        limit=12,
        fallback=("popular", "fresh"),
        merge=mode,
        likes=likes,
        items=items,
    )
    pipeline = world.pipeline()
    rng = np.random.default_rng(0)
    requests = [
        Request(
            user_id=int(user),
            limit=int(rng.integers(1, items)),
            excluded=ids(rng.choice(items, rng.integers(0, 30), replace=False)) if user % 3 else None,
        )
        for user in rng.integers(1, users + 4, 40)
    ]
    together = pipeline.run(requests)
    assert {OK, EMPTY} <= set(together.status[:3].ravel().tolist())
    for q, request in enumerate(requests):
        assert everything(together, q) == everything(pipeline.run([request]), 0)
        assert len(answer(together, q)) > 0


# --- quotas and over-fetch -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(MergeMode))
@pytest.mark.parametrize("forbidden", [0, 1, 4, 6])
def test_what_was_seen_or_is_excluded_uses_up_no_quota(mode, forbidden):
    # Two channels of their own halves of the catalogue; what may not be shown stands in front of both.
    seen = [*range(forbidden // 2), *range(12, 12 + forbidden // 2)]
    excluded = [row + 1 + forbidden // 2 for row in seen] + [11, 23]
    world = World(
        {"low": everybody(range(12)), "high": everybody(range(12, 24))},
        {"low": 3, "high": 2},
        limit=5,
        merge=mode,
        likes=[seen],
    )
    run = world.pipeline().run([Request(user_id=1, excluded=ids(excluded))])
    eligible = [row for row in range(12) if row not in seen + excluded]
    low = [row for row in answer(run) if row < 12]
    assert sorted(low) == eligible[:3]
    assert run.merged.kept.ravel().tolist() == [3, 2]


def test_every_channel_reaches_its_quota_where_it_has_enough():
    rng = np.random.default_rng(5)
    quotas = {"a": 4, "b": 3, "c": 3}
    for _ in range(50):
        lists = {name: [rng.permutation(ITEMS).tolist() for _ in range(USERS + 1)] for name in quotas}
        likes = [rng.choice(ITEMS, rng.integers(0, 8), replace=False).tolist() for _ in range(USERS)]
        world = World({name: Listed(part) for name, part in lists.items()}, quotas, likes=likes)
        excluded = ids(rng.choice(ITEMS, rng.integers(0, 6), replace=False))
        run = world.pipeline().run([Request(user_id=user, excluded=excluded) for user in range(1, USERS + 1)])
        for q in range(USERS):
            assert len(answer(run, q)) == 10
            assert (run.merged.kept[:, q] >= list(quotas.values())).all()


def test_where_the_answer_is_short_channels_are_asked_for_the_limit_and_for_what_filters_may_remove():
    channel = everybody(range(ITEMS))
    world = World({"a": channel, "b": everybody([])}, {"a": 2, "b": 2}, limit=4, likes=[[0, 1, 2], []])
    world.pipeline().run([Request(user_id=1, excluded=ids([5, 6])), Request(user_id=2), Request()])
    assert channel.asked == [[4, 4, 4], [4 + 3 + 2, 0, 0]]


def test_a_channel_that_filters_left_less_than_its_quota_is_asked_for_more_though_the_answer_is_long_enough():
    first, second = everybody(range(ITEMS)), everybody(range(6, ITEMS))
    world = World({"a": first, "b": second}, {"a": 2, "b": 2}, limit=4, likes=[[0, 1, 2], []])
    run = world.pipeline().run([Request(user_id=1), Request(user_id=2)])
    assert (first.asked, second.asked) == ([[4, 4], [7, 0]], [[4, 4]])
    assert (run.merged.kept[:, 0] >= 2).all()


def test_a_filter_that_asks_for_nothing_more_gets_nothing_more():
    channel = everybody(range(ITEMS))
    world = World({"a": channel}, {"a": 4}, limit=4, filters=("excluded",), likes=[[0, 1, 2]])
    run = world.pipeline().run([Request(user_id=1)])
    assert channel.asked == [[4]]
    assert answer(run) == [0, 1, 2, 3]


def test_a_quota_above_the_limit_is_reached_behind_what_is_removed_too():
    # In rank fusion whatever stands within the quota competes, removed items aside. Row 5, ninth of both, is
    # the only one that both propose.
    first = [0, 1, 2, 3, 6, 7, 8, 9, 5, 10]
    second = [0, 1, 2, 3, 16, 17, 18, 19, 5, 20]
    world = World(
        {"a": everybody(first), "b": everybody(second)},
        {"a": 5, "b": 5},
        limit=1,
        merge=MergeMode.RANK_FUSION,
        filters=("excluded",),
    )
    excluded = ids([0, 1, 2, 3])
    run = world.pipeline().run([Request(excluded=excluded)])
    assert answer(run) == [5]
    assert proposers(run) == [[0, 1]]


# --- overrides -----------------------------------------------------------------------------------


def two_halves(**more) -> World:
    return World(
        {"low": everybody(range(12)), "high": everybody(range(12, 24)), "rest": everybody(range(24))},
        {"low": 3, "high": 2},
        limit=5,
        fallback=("rest",),
        **more,
    )


@pytest.mark.parametrize("mode", list(MergeMode))
def test_a_quota_of_the_request_replaces_the_scenes(mode):
    pipeline = two_halves(merge=mode).pipeline()
    run = pipeline.run(
        [Request(), Request(quotas={"high": 4, "low": 1}), Request(quotas={"high": 20}, limit=23)]
    )
    assert [sum(row < 12 for row in answer(run, q)) for q in range(2)] == [3, 1]
    assert sum(row >= 12 for row in answer(run, 2)) == 12
    # What the request says stays with the request.
    assert sum(row < 12 for row in answer(pipeline.run([Request()]))) == 3


def test_a_channel_that_is_off_is_not_asked_and_the_others_fill_in():
    world = two_halves()
    run = world.pipeline().run([Request(quotas={"low": 0}), Request()])
    assert run.status[:, 0].tolist() == [SKIPPED, OK, SKIPPED]
    assert sorted(answer(run, 0)) == [12, 13, 14, 15, 16]
    assert world.channels["low"].asked == [[0, 5]]


def test_everything_off_is_an_empty_answer():
    run = two_halves().pipeline().run([Request(quotas={"low": 0, "high": 0, "rest": 0})])
    assert answer(run) == []
    assert run.status[:, 0].tolist() == [SKIPPED] * 3
    only = two_halves().pipeline().run([Request(quotas={"low": 0, "high": 0})])
    assert answer(only) == [0, 1, 2, 3, 4]
    assert only.status[:, 0].tolist() == [SKIPPED, SKIPPED, OK]


def test_a_channel_of_quota_none_in_the_scene_only_fills_in():
    world = World({"a": everybody([0, 1]), "b": everybody(range(5, 15))}, {"a": 5, "b": 0}, limit=4)
    run = world.pipeline().run([Request()])
    assert answer(run) == [0, 1, 5, 6]
    assert run.status[:, 0].tolist() == [OK, OK]


# --- fallback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(MergeMode))
def test_the_fallback_fills_short_answers_in_order_and_repeats_nothing(mode):
    world = World(
        {"a": everybody([7, 3]), "first": everybody([3, 7, 8, 9]), "second": everybody([9, 7, 1, 0])},
        {"a": 4},
        limit=6,
        fallback=("first", "second"),
        merge=mode,
    )
    run = world.pipeline().run([Request()])
    assert set(answer(run)[:2]) == {7, 3}
    assert answer(run)[2:] == [8, 9, 1, 0]
    assert run.status[:, 0].tolist() == [OK, OK, OK]
    # The fallback's word for what stood there already is kept as provenance.
    assert {tuple(sorted(each)) for each in proposers(run)[:2]} == {(0, 1, 2), (0, 1)}


def test_a_full_answer_does_not_ask_the_fallback():
    world = two_halves()
    run = world.pipeline().run([Request(limit=5), Request(limit=24), Request(limit=3)])
    assert run.status[2].tolist() == [SKIPPED, SKIPPED, SKIPPED]
    assert world.channels["rest"].asked == []


def test_the_fallback_is_asked_for_the_short_queries_alone():
    world = two_halves()
    run = world.pipeline().run([Request(), Request(quotas={"low": 0, "high": 0}), Request()])
    assert run.status[2].tolist() == [SKIPPED, OK, SKIPPED]
    (asked,) = world.channels["rest"].asked
    assert [k > 0 for k in asked] == [False, True, False]


def test_unknown_users_and_guests_are_answered_by_the_fallback():
    known = Listed([[0, 1, 2]] * USERS + [[]])
    world = World({"known": known, "rest": everybody(range(24))}, {"known": 3}, limit=3, fallback=("rest",))
    run = world.pipeline().run([Request(user_id=1), Request(user_id=999), Request(), Request(user_id=-1)])
    assert run.status.tolist() == [[OK, EMPTY, EMPTY, EMPTY], [SKIPPED, OK, OK, OK]]
    assert [answer(run, q) for q in range(4)] == [[0, 1, 2]] * 4
    assert run.batch.users.tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("last", range(0, ITEMS, 5))
@pytest.mark.parametrize("mode", list(MergeMode))
def test_the_one_item_that_is_left_is_found(mode, last):
    world = two_halves(merge=mode, likes=[[0, 1, 2], []])
    excluded = ids(row for row in range(ITEMS) if row != last)
    for request in (Request(user_id=2, excluded=excluded), Request(excluded=excluded, limit=1)):
        assert answer(world.pipeline().run([request])) == [last]
    # With popular alone behind a channel that finds nothing, too.
    popular = built_channel(Popular, interactions_of([[3, 4], [4]], ITEMS))
    behind = World({"none": everybody([]), "popular": popular}, {"none": 5}, limit=5, fallback=("popular",))
    assert answer(behind.pipeline().run([Request(excluded=excluded)])) == [last]


def test_an_answer_is_empty_only_where_everything_is_forbidden():
    world = two_halves(likes=[list(range(10)), []])
    run = world.pipeline().run(
        [
            Request(user_id=1, excluded=ids(range(10, ITEMS))),
            Request(user_id=1, excluded=ids(range(11, ITEMS))),
            Request(user_id=2, excluded=ids(range(ITEMS))),
        ]
    )
    assert [answer(run, q) for q in range(3)] == [[], [10], []]


def test_no_requests_are_no_answers_and_no_candidates_no_failure():
    run = two_halves().pipeline().run([])
    assert run.merged.offsets.tolist() == [0]
    nothing = World({"none": everybody([])}, {"none": 5}).pipeline().run([Request(), Request(user_id=1)])
    assert nothing.status.tolist() == [[EMPTY, EMPTY]]
    assert nothing.merged.rows.size == 0


# --- channels that break -------------------------------------------------------------------------


class Broken(Channel):
    """Answers every query, or the poisoned user alone, with what the contract forbids."""

    trigger_kind = TriggerKind.ITEM

    def __init__(self, how: str, poisoned: int | None = None) -> None:
        super().__init__(Options())
        self.how = how
        self.poisoned = poisoned

    def recall(self, query, k):
        rows, scores, triggers = list(range(min(k, 6))), [9.0, 8.0, 7.0, 6.0, 5.0, 4.0][:k], [-1] * min(k, 6)
        if self.poisoned is None or query.user == self.poisoned:
            if self.how == "raises":
                raise RuntimeError("on fire")
            if self.how == "nan":
                scores[-1] = np.nan
            elif self.how == "infinite":
                scores[0] = np.inf
            elif self.how == "row too large":
                rows[0] = ITEMS
            elif self.how == "row negative":
                rows[0] = -1
            elif self.how == "trigger too large":
                triggers[0] = ITEMS
            elif self.how == "trigger negative":
                triggers[0] = -2
            elif self.how == "unsorted":
                scores = scores[::-1]
            elif self.how == "too many":
                rows, scores, triggers = [0] * (k + 1), [1.0] * (k + 1), [-1] * (k + 1)
        return Candidates(
            np.array(rows, np.int32), np.array(scores, np.float32), np.array(triggers, np.int32)
        )


BREACHES = {
    "raises": "on fire",
    "nan": "not finite",
    "infinite": "not finite",
    "row too large": "outside the catalogue",
    "row negative": "outside the catalogue",
    "trigger too large": "trigger outside",
    "trigger negative": "negative trigger",
    "unsorted": "must not increase",
    "too many": "more candidates than it was asked for",
}


@pytest.mark.parametrize("how", BREACHES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_broken_channel_is_an_error_of_its_own_and_the_others_answer(how, size, caplog):
    world = World(
        {"broken": Broken(how), "sound": everybody(range(12, 24))}, {"broken": 4, "sound": 4}, limit=8
    )
    run = world.pipeline().run([Request(user_id=user + 1) for user in range(size)])
    assert run.status.tolist() == [[ERROR] * size, [OK] * size]
    assert run.returned.tolist() == [[0] * size, [8] * size]
    assert [answer(run, q) for q in range(size)] == [list(range(12, 20))] * size
    assert set(run.messages) == {(0, q) for q in range(size)}
    assert all(BREACHES[how] in message for message in run.messages.values())
    assert any("channel broken failed" in record.message for record in caplog.records)


@pytest.mark.parametrize("how", BREACHES)
def test_one_poisonous_query_fails_alone(how, caplog):
    caplog.set_level(logging.CRITICAL)
    world = World(
        {"broken": Broken(how, poisoned=2), "sound": everybody(range(12, 24))},
        {"broken": 4, "sound": 4},
        limit=8,
    )
    pipeline = world.pipeline()
    requests = [Request(user_id=user + 1) for user in range(USERS)]
    run = pipeline.run(requests)
    assert run.status[0].tolist() == [OK, OK, ERROR, OK, OK]
    assert set(run.messages) == {(0, 2)}
    assert answer(run, 2) == list(range(12, 20))
    for q, request in enumerate(requests):
        assert everything(run, q) == everything(pipeline.run([request]), 0)


class Columns(Channel):
    """A batch channel whose columns are wrong as a whole."""

    def __init__(self, answer) -> None:
        super().__init__(Options())
        self.answer = answer

    def recall_batch(self, batch, k):
        return self.answer(len(batch))


def columns(rows=2, scores=2, triggers=2, offsets=None, dtype=np.int32):
    return CandidateBatch(
        np.zeros(rows, dtype),
        np.ones(scores, np.float32),
        np.full(triggers, -1, np.int32),
        np.array([0, rows] if offsets is None else offsets, np.int64),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: None,
        lambda n: tuple(columns()),
        lambda n: columns()._replace(rows=[1, 2]),
        lambda n: columns()._replace(rows=np.int32(1)),
        lambda n: CandidateBatch(*(part.reshape(-1, 1) for part in columns())),
        lambda n: columns(dtype=np.int64),
        lambda n: columns(dtype=">i4"),
        lambda n: columns(scores=1),
        lambda n: columns(triggers=3),
        lambda n: columns(offsets=[0, 1]),
        lambda n: columns(offsets=[0, 1, 2]),
        lambda n: columns(offsets=[1, 2]),
    ],
)
def test_columns_that_do_not_fit_together_are_an_error(wrong, caplog):
    caplog.set_level(logging.CRITICAL)
    world = World({"broken": Columns(wrong), "sound": everybody([5])}, {"broken": 4, "sound": 4})
    run = world.pipeline().run([Request()])
    assert run.status.tolist() == [[ERROR], [OK]]
    assert answer(run) == [5]


def test_two_channels_whose_columns_do_not_fit_are_both_at_fault_though_the_sums_do(caplog):
    caplog.set_level(logging.CRITICAL)
    one, other = columns(), columns()
    short, long = (
        one._replace(scores=one.scores[:1]),
        other._replace(scores=np.append(other.scores, other.scores[-1:])),
    )
    world = World(
        {"short": Columns(lambda n: short), "long": Columns(lambda n: long), "sound": everybody([5])},
        {"short": 4, "long": 4, "sound": 4},
    )
    run = world.pipeline().run([Request()])
    assert run.status.tolist() == [[ERROR], [ERROR], [OK]]
    assert answer(run) == [5]


def test_columns_that_are_mapped_are_held_to_the_contract_too(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    rows = np.memmap(tmp_path / "rows", np.int32, "w+", shape=2)
    world = World(
        {"mapped": Columns(lambda n: columns()._replace(rows=rows)), "sound": everybody([5])},
        {"mapped": 4, "sound": 4},
    )
    rows[:] = 7, 6
    run = world.pipeline().run([Request()])
    assert run.status.tolist() == [[OK], [OK]]
    assert sorted(answer(run)) == [5, 6, 7]
    rows[:] = 7, ITEMS
    run = world.pipeline().run([Request()])
    assert run.status.tolist() == [[ERROR], [OK]]
    assert "outside the catalogue" in run.messages[0, 0]
    assert answer(run) == [5]


def test_an_item_that_a_channel_repeats_is_heard_once_and_counted():
    world = World({"twice": everybody([3, 3, 4, 3, 5, 4]), "other": everybody([4])}, {"twice": 3, "other": 1})
    run = world.pipeline().run([Request(excluded=ids([5]))])
    assert sorted(answer(run)) == [3, 4]
    assert proposers(run)[answer(run).index(4)] == [0, 1]
    assert run.merged.eligible[:, 0].tolist() == [2, 1]
    # returned = eligible + removed + repeated
    assert run.returned[:, 0].tolist() == [6, 1]
    assert run.removed[:, 0].tolist() == [0, 1]


def test_a_broken_fallback_is_an_error_and_the_next_one_fills(caplog):
    caplog.set_level(logging.CRITICAL)
    world = World(
        {"none": everybody([]), "broken": Broken("raises"), "rest": everybody(range(24))},
        {"none": 3},
        limit=3,
        fallback=("broken", "rest"),
    )
    run = world.pipeline().run([Request(), Request(user_id=1)])
    assert run.status.tolist() == [[EMPTY] * 2, [ERROR] * 2, [OK] * 2]
    assert [answer(run, q) for q in range(2)] == [[0, 1, 2]] * 2


class Gated(Listed):
    """Shut for guests; raises for the poisoned user."""

    def enable(self, query):
        if query.user == 2:
            raise RuntimeError("gate on fire")
        return query.user >= 0


def test_a_gate_shuts_its_channel_and_one_that_raises_is_an_error_of_its_query(caplog):
    caplog.set_level(logging.CRITICAL)
    world = World(
        {"gated": Gated([[0, 1]] * (USERS + 1)), "sound": everybody([7, 8])},
        {"gated": 2, "sound": 2},
        limit=4,
    )
    run = world.pipeline().run(
        [Request(user_id=1), Request(), Request(user_id=3), Request(quotas={"gated": 0})]
    )
    assert run.status.tolist() == [[OK, GATED, ERROR, SKIPPED], [OK, OK, OK, OK]]
    assert [sorted(answer(run, q)) for q in range(4)] == [[0, 1, 7, 8], [7, 8], [7, 8], [7, 8]]
    assert list(run.messages) == [(0, 2)]
    assert "gate on fire" in run.messages[0, 2]


class OddFilter(Filter):
    """Returns what filters must not."""

    def __init__(self, verdict) -> None:
        super().__init__(Options())
        self.verdict = verdict

    def keep(self, batch, candidates):
        return self.verdict(candidates.rows.size)


@pytest.mark.parametrize(
    "verdict",
    [lambda m: np.ones(m + 1, np.bool_), lambda m: np.ones(m, np.int8), lambda m: np.ones((m, 1), np.bool_)],
)
def test_a_filter_that_returns_something_else_is_loud(verdict):
    world = World(
        {"a": everybody([1, 2])}, {"a": 2}, filters=("odd",), more_filters={"odd": OddFilter(verdict)}
    )
    with pytest.raises(ContractError, match="filter 'odd'"):
        world.pipeline().run([Request()])


def test_what_two_filters_remove_is_counted_for_the_first():
    world = World({"a": everybody(range(6))}, {"a": 6}, likes=[[0, 1]], filters=("seen", "excluded"))
    run = world.pipeline().run([Request(user_id=1, excluded=ids([1, 2, 23]))])
    assert run.removed.tolist() == [[2], [1]]
    assert sorted(answer(run)) == [3, 4, 5]


# --- deadlines -----------------------------------------------------------------------------------


class Slow(Listed):
    def recall(self, query, k):
        if query.user == 0:
            time.sleep(0.6)
        return super().recall(query, k)


def test_channels_that_come_too_late_are_left_out_and_the_answer_stands():
    world = World(
        {
            "quick": everybody([1]),
            "slow": Slow([[2]] * (USERS + 1)),
            "late": everybody([3]),
            "rest": everybody(range(24)),
        },
        {"quick": 2, "slow": 2, "late": 2},
        limit=6,
        fallback=("rest",),
    )
    run = world.pipeline().run(
        [
            Request(user_id=1, deadline=time.monotonic() + 0.5),
            Request(user_id=2, deadline=time.monotonic() + 60),
        ]
    )
    assert run.status.tolist() == [[OK, OK], [OK, OK], [TIMEOUT, OK], [TIMEOUT, OK]]
    assert answer(run, 0) == [1, 2]
    assert answer(run, 1) == [1, 2, 3, 0, 4, 5]
    assert not run.messages


def test_a_deadline_that_has_passed_asks_nobody():
    run = two_halves().pipeline().run([Request(deadline=time.monotonic()), Request()])
    assert run.status[:, 0].tolist() == [TIMEOUT] * 3
    assert answer(run, 0) == []
    assert len(answer(run, 1)) == 5


def test_the_reserve_belongs_to_the_merge():
    soon = time.monotonic() + 5
    run = two_halves(reserve_ms=60_000).pipeline().run([Request(deadline=soon)])
    assert run.status[:, 0].tolist() == [TIMEOUT] * 3
    run = two_halves(reserve_ms=0).pipeline().run([Request(deadline=soon)])
    assert run.status[:, 0].tolist() == [OK, OK, SKIPPED]


def test_what_is_off_or_shut_is_not_called_late():
    world = World({"gated": Gated([[0]] * (USERS + 1)), "sound": everybody([1])}, {"gated": 1, "sound": 1})
    run = world.pipeline().run([Request(deadline=0.0, quotas={"sound": 0})])
    assert run.status[:, 0].tolist() == [TIMEOUT, SKIPPED]


# --- what a run tells ------------------------------------------------------------------------------


def test_a_run_tells_what_each_stage_and_channel_took():
    pipeline = two_halves().pipeline()
    run = pipeline.run([Request(), Request(limit=24)])
    assert list(run.stage_us) == [name for name, _ in pipeline.stages]
    assert list(run.stage_us) == ["hydrate", "fan_out", "mask", "merge", "fill"]
    assert all(spent >= 0 for spent in run.stage_us.values())
    assert (run.channel_us[:2] > 0).all()
    assert run.channel_us[:2].sum() <= run.stage_us["fan_out"]
