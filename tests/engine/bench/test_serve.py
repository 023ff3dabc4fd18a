"""`recall bench serve` end to end on a tiny world, and the baseline against the engine."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import redis
from recall.v1 import recall_pb2 as pb

from engine.bench.population import SHOWN, draw_active, fill, messages
from engine.bench.processes import cores, plain_redis
from engine.bench.profile import flame_graph, places, read_stacks, weighed
from engine.bench.serve import Settings, bench_serve
from engine.bench.world import World, made_up_world
from engine.config import load_config
from engine.core.channel import SilentProgress
from engine.data.snapshot import SnapshotStore
from engine.online.state import open_state
from engine.online.wire import parse
from loadtest import baseline

LIMIT = 40
pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins processes to two cores, on Linux",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    store = SnapshotStore(tmp_path_factory.mktemp("world"))
    config = load_config()
    names = list(config.scenes["default"].quotas)
    return made_up_world(config, names, 1500, LIMIT, store, SilentProgress())


def test_bench_serve_measures_the_server_beside_an_echo_and_the_baseline(world, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "RECALL_STATE_URL", "redis://127.0.0.1:1"
    )  # somebody's own store is none of its business
    settings = Settings(
        LIMIT, seconds=0.4, rounds=1, with_baseline=True, in_flight=8, steps=(2,), compiled=False
    )
    report = bench_serve(world, settings, tmp_path, SilentProgress())
    for name in ("requests_per_s", "echo_requests_per_s", "baseline_requests_per_s"):
        assert report[name] > 0, name
    for name in (
        "server_cpu_us",
        "echo_cpu_us",
        "baseline_cpu_us",
        "kernels_us",
        "rss_mb",
        "p99_ms",
        "glue_us",
    ):
        assert math.isfinite(report[name]), name
    assert report["refused_share"] == 0
    assert report["p50_ms"] <= report["p90_ms"] <= report["p99_ms"]
    assert 1 <= report["batch_mean"] <= 16
    assert report["answer_bytes"] > 20 * LIMIT
    assert report["half_offered_per_s"] > 0
    assert 0 < report["half_p99_from_sent_ms"] <= report["half_p99_ms"]
    assert 0 < report["half_answered_share"] <= 1
    assert [turn["p99_ms"] for turn in report["half_turns"]] == [report["half_p99_ms"]]
    assert 0 < report["degrading_answered_share"] <= 1
    assert report["degrading_answer_bytes"] <= 1.01 * report["answer_bytes"]
    assert report["half_answer_bytes"] == pytest.approx(report["answer_bytes"], rel=0.1)
    assert [row["in_flight"] for row in report["concurrency"]] == [2]
    kernels = report["kernels"]
    assert {"engine.core.gather._gather", "engine.core.merge._merge"} <= kernels["kernels"].keys()
    assert all(spent >= 0 for spent in kernels["kernels"].values())
    # All of them together are the mean over the rounds, whose extremes stand beside the median; less is rounding.
    assert kernels["kernels_us_min"] - 1 <= sum(kernels["kernels"].values()) <= kernels["kernels_us_max"] + 1
    assert set(kernels["channels"]) >= set(world.config.scenes["default"].quotas)
    assert os.environ["RECALL_STATE_URL"] == "redis://127.0.0.1:1"
    assert len(os.sched_getaffinity(0)) >= 2, "the bench leaves this process where it was"


def test_the_server_never_shares_its_core(world):
    server, client, store = cores()
    assert server not in (client, store)


def test_what_was_made_up_for_a_user_is_what_the_store_says(world, tmp_path):
    own = world.config.model_copy(update={"store": world.config.store.model_copy(update={"path": tmp_path})})
    with open_state(own) as state:
        assert state is not None
        replica = World(own, world.store, world.versions, world.now).replica(state)
        catalogue = replica.catalogue
        active = draw_active(catalogue)
        fill(state, catalogue, active, world.now, own.state.exposure.slice_seconds, SilentProgress())
        asked = messages(catalogue, active, LIMIT, world.now, 300, seed=1)
        requests = [
            parse(pb.RecallRequest.FromString(data), own, catalogue.id_type, math.inf, 0)[1] for data in asked
        ]
        mine = [n for n, request in enumerate(requests) if request.user_id == active.users[0].item()]
        assert mine, "active users ask"
        share = np.mean([request.user_id in set(active.users.tolist()) for request in requests])
        assert 0.7 < share < 0.95
        run = replica.pipelines["default"].run([requests[mine[0]]])
    live, history = run.batch.live, run.batch.history
    assert history.rows[0] == active.recent[0, 0]
    assert set(live.follows.rows.tolist()) == set(active.follows[0].tolist())
    assert set(live.leftovers.rows.tolist()) == set(active.leftovers[0].tolist())
    assert live.exposure is not None
    assert 0 < live.exposure.shown()[0] <= sum(SHOWN)
    assert not set(active.shown[0].tolist()) & set(run.merged.rows.tolist())


@pytest.mark.parametrize("name", ["itemcf", "swing", "usercf"])
def test_the_baseline_answers_what_the_engine_answers(name, tmp_path):
    config = load_config()
    scene = config.scenes["default"].model_copy(update={"fallback": ()})
    config = config.model_copy(update={"scenes": {"default": scene}})
    # So large a limit takes all there are, and who is last among equals does not matter.
    world = made_up_world(config, [name], 1500, 1500, SnapshotStore(tmp_path), SilentProgress())
    replica = world.replica()
    active = draw_active(replica.catalogue)
    with plain_redis(0) as url, redis.Redis.from_url(url) as connection:
        baseline.export(world, active, connection)
        plain = baseline.Baseline(connection)
        strangers = [user for user in range(40) if user not in active.users.tolist()]
        for user in strangers[:20]:
            request = pb.RecallRequest(user_id=user, limit=1500, context=pb.Context(time=world.now))
            answer = plain.Recall(request, None)
            run = replica.pipelines["default"].run([parse(request, world.config, "int64", math.inf, 0)[1]])
            assert {each.item_id for each in answer.candidates} == set(run.merged.rows.tolist())
            ours = dict(zip(run.columns.fan_out.rows.tolist(), run.columns.scores.tolist(), strict=True))
            for each in answer.candidates:
                assert each.proposals[0].score == pytest.approx(ours[each.item_id], rel=1e-4)
        known = pb.RecallRequest(user_id=int(active.users[0]), limit=1500, context=pb.Context(time=world.now))
        shown = set(active.shown[0].tolist())
        assert shown.isdisjoint(each.item_id for each in plain.Recall(known, None).candidates)


def test_a_profile_gives_each_thread_what_it_used_and_names_the_place_of_each_sample(tmp_path):
    compute = "work (engine/online/batcher.py:9);run (/somewhere/engine/online/pipeline.py:3)"
    lines = [
        "thread (7): MainThread;run (asyncio/runners.py:1);recall (engine/online/service.py:9);"
        "parse (engine/online/wire.py:3) 5",
        "thread (7): MainThread;run (asyncio/runners.py:1);EpollSelector.select (selectors.py:468) 90",
        f"thread (8);{compute};recall_batch (/somewhere/channels/geo.py:7);read (engine/core/postings.py:8) 3",
        f"thread (8);{compute};recall_batch (/somewhere/channels/geo.py:9) 1",
        f"thread (8);{compute} 4",
        "thread (9);drain (engine/online/committer.py:1);Condition.wait (threading.py:327) 50",
    ]
    file = tmp_path / "stacks.txt"
    file.write_text("\n".join(lines))
    stacks = weighed(read_stacks(file), {7: 100.0, 8: 200.0, 9: 1.0})
    assert places(stacks) == {
        "parse": 100.0,
        "channel geo": 100.0,
        "pipeline around the stages": 100.0,
    }
    root = ElementTree.fromstring(flame_graph(stacks))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "all: 100.0 %" in titles
    assert "recall_batch (channels/geo.py): 33.3 %" in titles
    assert "somewhere" not in "".join(map(str, titles))
    assert read_stacks(tmp_path / "nothing") == {}
