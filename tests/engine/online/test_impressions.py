"""Impressions: exposures that are reported back are credited to the channels that recalled the items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from online_world import make_world

from engine.online.answered import Answered
from engine.online.impressions import ANSWERS_KEPT, Impressions, pack, unpack
from engine.online.metrics import Metrics
from engine.online.request import Request
from engine.state.embedded import EmbeddedStore
from engine.state.store import StateStore


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[StateStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("impressions")) as embedded:
        store = StateStore.connect(embedded.url, "test", 2000.0)
        yield store
        store.close()


@given(
    items=st.dictionaries(
        st.integers(0, 2**63 - 1), st.lists(st.integers(0, 60_000), min_size=1, max_size=4)
    ),
    names=st.lists(st.text("abc_", min_size=1), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_an_answer_comes_back_as_it_was_kept(items, names):
    counts = np.array([len(channels) for channels in items.values()], np.int64)
    flat = np.array([channel for channels in items.values() for channel in channels], np.int64)
    kept = pack(names, np.array(list(items), np.int64), counts, flat)
    assert unpack(kept) == (names, items)


def counted(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"recall_{name}_total", labels) or 0.0


def answer(world, user):
    pipeline = world.replica.pipelines["default"]
    run = pipeline.run([Request(user_id=user)])
    return Answered("default", pipeline, run, "r-1", ["r"], [""], [0.0], 0.0, 0.0)


def test_exposures_are_credited_to_every_channel_that_proposed_the_item(store):
    world, first, second = make_world(), Metrics(), Metrics()
    one = answer(world, 1)
    keys = 100 + np.arange(1000)  # of the world's rows
    # Two servers on one store: it makes no difference which of them hears of the exposure.
    recalling, hearing = Impressions(store, 1.0, first), Impressions(store, 1.0, second)
    recalling.answered(one, keys)
    recalling.close(10)
    merged = one.run.merged
    shown = keys[merged.rows[:3]]
    hearing.exposed([(b"u1", [*shown.tolist(), 999_999]), (b"u5", [7])])
    hearing.close(10)
    proposals = merged.proposal_channels[: merged.proposal_offsets[3]]
    for c, name in enumerate(one.pipeline.channel_names):
        wanted = np.count_nonzero(proposals == c)
        assert counted(second, "impressions_credited", channel=name) == wanted
    assert counted(second, "impressions") == 5
    assert counted(second, "impressions_unknown") == 2
    assert counted(first, "impressions") == 0


def test_the_newest_answers_of_the_share_alone_are_kept_for_a_while(store):
    world, metrics = make_world(), Metrics()
    none = Impressions(store, 0.0, metrics)
    none.answered(answer(world, 3), 100 + np.arange(1000))
    none.exposed([(b"u3", [101])])
    none.close(10)
    assert store.execute(b"EXISTS", b"test:{u3}:a") == 0
    assert counted(metrics, "impressions") == 0
    every = Impressions(store, 1.0, metrics)
    for _ in range(ANSWERS_KEPT + 2):
        every.answered(answer(world, 2), 100 + np.arange(1000))
    every.close(10)
    assert store.execute(b"LLEN", b"test:{u2}:a") == ANSWERS_KEPT
    assert 0 < store.execute(b"TTL", b"test:{u2}:a") <= 6 * 3600
    share = Impressions(store, 0.25, metrics)
    share.close(10)
    chosen = sum(share.chosen(b"u%d" % user) for user in range(4000))
    assert 800 < chosen < 1200


def test_a_store_that_is_away_costs_notes_and_nothing_else(tmp_path):
    metrics = Metrics()
    with EmbeddedStore(tmp_path) as embedded:
        away = StateStore.connect(embedded.url, "test", 200.0)
    impressions = Impressions(away, 1.0, metrics)
    impressions.exposed([(b"u1", [1]), (b"u2", [2])])
    impressions.close(20)
    assert counted(metrics, "impressions_dropped") == 2
    away.close()
