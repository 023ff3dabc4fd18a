from __future__ import annotations

import math

import numpy as np
import pytest
from online_world import INTEREST, make_world
from recall.v1 import recall_pb2 as pb

from engine.config import SceneConfig
from engine.core.candidates import ChannelStatus, TriggerKind
from engine.core.errors import RequestError
from engine.online import wire
from engine.online.encode import encode
from engine.online.request import Request

NOW = 1_750_000_000
LONG = "x" * 257


def parsed(world, message):
    return wire.parse(message, world.config, world.replica.catalogue.id_type, math.inf, NOW)


def violations(world, **fields):
    with pytest.raises(RequestError) as caught:
        parsed(world, pb.RecallRequest(**fields))
    return dict(caught.value.violations)


def test_an_empty_request_is_a_guest_of_the_default_scene(world):
    scene, request = parsed(world, pb.RecallRequest())
    assert scene == "default"
    assert request.user_id is None
    assert request.limit is None
    assert request.recent is None
    assert request.excluded is None
    assert request.now == NOW
    assert math.isnan(request.latitude)
    assert math.isnan(request.longitude)


def test_every_field_arrives(world):
    message = pb.RecallRequest(
        user_id=7,
        scene="default",
        limit=20,
        context=pb.Context(
            location=pb.Location(latitude=0.0, longitude=-180.0), city="Ulm", time=1000, device={"os": "ios"}
        ),
        recent_items=[
            pb.RecentItem(item_id=101, event="like", timestamp=900),
            pb.RecentItem(item_id=102),
            pb.RecentItem(item_id=0, event="click"),
        ],
        recent_mode=pb.RECENT_MODE_OVERRIDE,
        exclude_item_ids=[5, 6],
        trigger_item_ids=[8],
        channel_overrides=[
            pb.ChannelOverride(channel="similar", quota=9),
            pb.ChannelOverride(channel="rest", off=True),
            pb.ChannelOverride(channel="top"),
        ],
    )
    scene, request = parsed(world, message)
    assert scene == "default"
    assert request.user_id == 7
    assert request.limit == 20
    assert (request.latitude, request.longitude, request.city) == (0.0, -180.0, "Ulm")
    assert request.device == {"os": "ios"}
    assert request.now == 1000
    assert request.quotas == {"similar": 9, "rest": 0}
    assert request.excluded is not None
    assert request.excluded.tolist() == [5, 6]
    assert request.triggers is not None
    assert request.triggers.tolist() == [8]
    assert request.recent is not None
    assert request.recent.ids.tolist() == [101, 102, 0]
    assert request.recent.points.tolist() == [2.0, 1.0, 1.0]
    assert request.recent.timestamps.tolist() == [900, 1000, 1000]
    assert len(set(request.recent.kinds.tolist())) == 3
    assert request.recent.override


def test_an_event_of_no_points_says_nothing(world):
    _, request = parsed(
        world,
        pb.RecallRequest(recent_items=[pb.RecentItem(item_id=1, event="view"), pb.RecentItem(item_id=2)]),
    )
    assert request.recent is not None
    assert request.recent.ids.tolist() == [2]


def test_override_with_nothing_replaces_the_history_by_nothing(world, string_world):
    for each in (world, string_world):
        scene, request = parsed(each, pb.RecallRequest(recent_mode=pb.RECENT_MODE_OVERRIDE))
        run = each.replica.pipelines[scene].run([request])
        assert run.batch.history.rows.size == 0


def test_what_stands_at_a_limit_is_accepted(world):
    parsed(
        world,
        pb.RecallRequest(
            user_id=2**63 - 1,
            limit=500,
            request_id="x" * 128,
            context=pb.Context(
                location=pb.Location(latitude=-90, longitude=180),
                time=wire.MAX_TIME,
                city="y" * 256,
                device={f"{i:0256}": "z" * 256 for i in range(64)},
            ),
            recent_items=[pb.RecentItem(item_id=i, timestamp=0) for i in range(1000)],
            exclude_item_ids=range(10_000),
            channel_overrides=[pb.ChannelOverride(channel="top", quota=500)],
        ),
    )


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"user_id": -1}, "user_id"),
        ({"user_key": "u"}, "user_key"),
        ({"scene": "nowhere"}, "scene"),
        ({"limit": 0}, "limit"),
        ({"limit": -5}, "limit"),
        ({"limit": 501}, "limit"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "é" * 65}, "request_id"),
        ({"recent_mode": 9}, "recent_mode"),
        ({"context": pb.Context(time=-1)}, "context.time"),
        ({"context": pb.Context(time=wire.MAX_TIME + 1)}, "context.time"),
        ({"context": pb.Context(city=LONG)}, "context.city"),
        ({"context": pb.Context(location=pb.Location(latitude=90.5))}, "context.location.latitude"),
        ({"context": pb.Context(location=pb.Location(latitude=math.nan))}, "context.location.latitude"),
        ({"context": pb.Context(location=pb.Location(longitude=-181))}, "context.location.longitude"),
        ({"context": pb.Context(location=pb.Location(longitude=math.inf))}, "context.location.longitude"),
        ({"context": pb.Context(device={str(i): "" for i in range(65)})}, "context.device"),
        ({"context": pb.Context(device={"os": LONG})}, "context.device['os']"),
        ({"context": pb.Context(device={LONG: "x"})}, f"context.device['{'x' * 64}'...]"),
        ({"recent_items": [pb.RecentItem(item_id=1)] * 1001}, "recent_items"),
        ({"recent_items": [pb.RecentItem(item_id=1), pb.RecentItem()]}, "recent_items[1].item"),
        ({"recent_items": [pb.RecentItem(item_key="a")]}, "recent_items[0].item_key"),
        ({"recent_items": [pb.RecentItem(item_id=-3)]}, "recent_items[0].item_id"),
        ({"recent_items": [pb.RecentItem(item_id=1, event="stare")]}, "recent_items[0].event"),
        ({"recent_items": [pb.RecentItem(item_id=1, timestamp=-1)]}, "recent_items[0].timestamp"),
        (
            {"recent_items": [pb.RecentItem(item_id=1, timestamp=NOW * 1000)]},
            "recent_items[0].timestamp",
        ),
        ({"exclude_item_ids": [1, -1]}, "exclude_item_ids[1]"),
        ({"exclude_item_ids": range(10_001)}, "exclude_item_ids"),
        ({"exclude_item_keys": ["a"]}, "exclude_item_keys"),
        ({"channel_overrides": [pb.ChannelOverride(channel="top")] * 65}, "channel_overrides"),
        ({"channel_overrides": [pb.ChannelOverride(channel="tip")]}, "channel_overrides[0].channel"),
        ({"channel_overrides": [pb.ChannelOverride()]}, "channel_overrides[0].channel"),
        (
            {"channel_overrides": [pb.ChannelOverride(channel="top", off=off) for off in (False, True)]},
            "channel_overrides[1].channel",
        ),
        (
            {"channel_overrides": [pb.ChannelOverride(channel="top", quota=-1)]},
            "channel_overrides[0].quota",
        ),
        (
            {"channel_overrides": [pb.ChannelOverride(channel="top", quota=501)]},
            "channel_overrides[0].quota",
        ),
        (
            {"channel_overrides": [pb.ChannelOverride(channel="rest", quota=5)]},
            "channel_overrides[0].quota",
        ),
        (
            {"channel_overrides": [pb.ChannelOverride(channel="top", quota=1, off=True)]},
            "channel_overrides[0].off",
        ),
    ],
)  # fmt: skip
def test_each_breach_names_its_field(world, fields, path):
    assert list(violations(world, **fields)) == [path]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"user_id": 1}, "user_id"),
        ({"user_key": ""}, "user_key"),
        ({"user_key": LONG}, "user_key"),
        ({"user_key": "user-1\0"}, "user_key"),
        ({"recent_items": [pb.RecentItem(item_id=1)]}, "recent_items[0].item_id"),
        ({"recent_items": [pb.RecentItem(item_key="é" * 129)]}, "recent_items[0].item_key"),
        ({"exclude_item_ids": [1]}, "exclude_item_ids"),
        ({"exclude_item_keys": ["a", ""]}, "exclude_item_keys[1]"),
        ({"exclude_item_keys": ["a"] * 10_001}, "exclude_item_keys"),
    ],
)
def test_each_breach_of_string_ids_names_its_field(string_world, fields, path):
    assert list(violations(string_world, **fields)) == [path]


def test_all_breaches_are_named_at_once(world):
    found = violations(
        world,
        user_id=-1,
        scene="nowhere",
        limit=0,
        recent_items=[pb.RecentItem(), pb.RecentItem(item_id=1, event="stare", timestamp=-1)],
        exclude_item_ids=[-1, -2],
        exclude_item_keys=["a"],
        channel_overrides=[pb.ChannelOverride(channel="anything", quota=-1, off=True)],
    )
    assert set(found) == {
        "user_id",
        "scene",
        "limit",
        "recent_items[0].item",
        "recent_items[1].event",
        "recent_items[1].timestamp",
        "exclude_item_ids[0]",
        "exclude_item_ids[1]",
        "exclude_item_keys",
        "channel_overrides[0].quota",
        "channel_overrides[0].off",
    }
    assert "default, other" in found["scene"]
    assert ", ".join(INTEREST) in found["recent_items[1].event"]


def test_the_only_scene_answers_a_request_that_names_none():
    top = SceneConfig(quotas={"top": 5}, limit=5, fallback=(), filters=())
    one = make_world(scenes={"feed": top})
    assert parsed(one, pb.RecallRequest())[0] == "feed"
    two = make_world(scenes={"feed": top, "cart": top})
    assert "feed, cart" in violations(two)["scene"]


def test_what_a_violation_quotes_is_cut(world):
    assert len(violations(world, scene="\n" * 100_000)["scene"]) < 300


def answer(world, request, q=0, neighbours=(), debug=False):
    pipeline = world.replica.pipelines["default"]
    run = pipeline.run([request, *neighbours])
    n = len(run.requests)
    encoded = encode(world.replica, pipeline, run, ["id-1"] * n, [debug] * n)
    return pb.RecallResponse.FromString(encoded[q]), run


def test_the_response_says_what_the_run_found(world):
    response, run = answer(world, Request(user_id=1))
    merged = run.merged
    assert [c.item_id for c in response.candidates] == [100 + row for row in merged.rows]
    assert [c.score for c in response.candidates] == merged.scores.tolist()
    assert response.request_id == "id-1"
    assert response.release == "r-1"
    assert dict(response.snapshots) == {"catalogue": "c-1", "history": "h-1"}
    assert not response.HasField("debug")
    names = ["similar", "crowd", "top", "rest"]
    assert [report.channel for report in response.channels] == names
    assert [report.trigger_kind for report in response.channels] == [
        TriggerKind.ITEM,
        TriggerKind.USER,
        TriggerKind.CLUSTER,
        TriggerKind.NONE,
    ]
    for c, report in enumerate(response.channels[:3]):
        assert report.status == ChannelStatus.OK
        assert report.returned == run.returned[c, 0]
        assert report.eligible == merged.eligible[c, 0]
        assert report.kept == merged.kept[c, 0]
        assert report.kept == sum(p.channel == names[c] for x in response.candidates for p in x.proposals)
    assert response.channels[3].status == ChannelStatus.SKIPPED
    assert [report.filter for report in response.filters] == ["seen", "excluded"]
    assert [report.removed for report in response.filters] == run.removed[:, 0].tolist()
    assert {report.status for report in response.filters} == {pb.FILTER_STATUS_OK}


def test_triggers_are_external_ids_of_the_channels_kind(world, string_world):
    for each, user, field in ((world, 1, "trigger_id"), (string_world, "user-1", "trigger_key")):
        response, _ = answer(each, Request(user_id=user))
        causes: dict[str, set[object]] = {}
        for candidate in response.candidates:
            for proposal in candidate.proposals:
                given = proposal.WhichOneof("trigger")
                causes.setdefault(proposal.channel, set()).add(given and getattr(proposal, given))
                if proposal.channel in ("similar", "crowd"):
                    assert given == field
        assert causes["similar"] <= {each.item(0), each.item(6)}
        assert causes["crowd"] == set(each.user(1).values())
        assert causes["top"] == {None, 19}


def test_a_guest_is_not_an_unknown_user(world):
    assert not answer(world, Request())[0].unknown.user
    assert answer(world, Request(user_id=999))[0].unknown.user
    assert not answer(world, Request(user_id=3))[0].unknown.user


def test_the_answers_of_a_batch_are_those_of_each_request_alone(world):
    requests = [Request(user_id=u) for u in (1, 2, 999, 6)] + [
        Request(),
        Request(user_id=3, limit=40, excluded=np.array([120, 7])),
    ]
    for q, request in enumerate(requests):
        alone, _ = answer(world, request)
        batched, _ = answer(world, requests[0], q, requests[1:])
        for response in (alone, batched):
            for report in response.channels:
                report.microseconds = 0
        assert alone.SerializeToString(deterministic=True) == batched.SerializeToString(deterministic=True)


def test_debug_shows_the_stages_and_the_history(world, string_world):
    response, _ = answer(world, Request(user_id=1), debug=True)
    assert [stage.stage for stage in response.debug.stages] == ["hydrate", "fan_out", "mask", "merge", "fill"]
    assert list(response.debug.history_item_ids) == [106, 100]
    assert response.debug.batch_size == 1
    response, _ = answer(string_world, Request(user_id="user-1"), debug=True)
    assert list(response.debug.history_item_keys) == ["item-106", "item-100"]
