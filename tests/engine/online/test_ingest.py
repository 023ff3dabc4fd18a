from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from ingest_world import ingesting
from recall.v1 import ingest_pb2 as pb
from recall.v1 import ingest_pb2_grpc

from engine.client import (
    Action,
    AsyncIngestClient,
    Dislike,
    Event,
    Exposure,
    Follow,
    IngestClient,
    InvalidRequest,
    Item,
    Leftovers,
    TakeDown,
)
from engine.core.keys import key_of
from engine.state.layout import CITIES, DISLIKES, FOLLOWS, LEFTOVERS, RECENT, kind_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with ingesting(tmp_path_factory.mktemp("ingest")) as running:
        yield running


@pytest.fixture
def client(world):
    with IngestClient(world.target) as connected:
        yield connected


@pytest.fixture
def stub(world):
    with grpc.insecure_channel(world.target) as channel:
        yield ingest_pb2_grpc.IngestServiceStub(channel)


def clicks(user: int, *items: int, prefix: str = "") -> list[Event]:
    return [
        Event(user, Action(item, "click"), f"{prefix}{item}" if prefix else "", 1000 + item) for item in items
    ]


# --- report ------------------------------------------------------------------------------------------------


def test_every_kind_of_event_is_in_the_store_when_the_answer_is_there(world, client):
    events = [
        Event(1, Exposure([10, 11])),
        Event(1, Action(10, "like", 2.5), timestamp=500, city="Ulm"),
        Event(1, Follow(77), timestamp=600),
        Event(1, Dislike(topic="cats"), timestamp=700),
        Event(1, Leftovers([20, 21], [0.5, 0.25]), timestamp=800),
    ]
    result = client.report(events)
    assert (result.accepted, result.duplicates, result.refused) == (5, 0, ())
    assert world.exposed(1, 10, time.time())
    assert world.exposed(1, 11, time.time())
    assert world.records(1, RECENT) == [(10, kind_of("like"), 2.5, 500)]
    assert [key for key, *_ in world.records(1, FOLLOWS)] == [77]
    assert [key for key, *_ in world.records(1, DISLIKES)] == [key_of("cats")]
    assert [(key, score) for key, _, score, _ in world.records(1, LEFTOVERS)] == [(20, 0.5), (21, 0.25)]
    assert [key for key, *_ in world.records(1, CITIES)] == [key_of("Ulm")]


def test_an_event_sent_again_counts_once(world, client):
    events = clicks(2, 5, 6, prefix="again-")
    assert client.report(events).accepted == 2
    second = client.report([*events, *clicks(2, 7, prefix="again-")])
    assert (second.accepted, second.duplicates) == (1, 2)
    assert [key for key, *_ in world.records(2, RECENT)] == [5, 6, 7]


def test_bad_events_are_refused_one_by_one_and_the_good_ones_go_in(world, client):
    events = [*clicks(3, 1), Event(-3, Action(1, "click")), Event(3, Action(1, "zap")), *clicks(3, 2)]
    result = client.report(events)
    assert (result.accepted, result.duplicates) == (2, 0)
    assert [(refusal.index, refusal.field) for refusal in result.refused] == [
        (1, "user_id"),
        (2, "action.kind"),
    ]
    assert result.refused[1].reason == "expected one of click, like, view, got 'zap'"
    assert [key for key, *_ in world.records(3, RECENT)] == [1, 2]


def test_nothing_at_all_is_fine(client, stub):
    assert client.report([]).accepted == 0
    assert stub.Report(pb.ReportRequest()) == pb.ReportResponse()


def test_a_request_beyond_its_limits_is_refused_as_a_whole(world, client):
    with pytest.raises(InvalidRequest) as caught:
        client.report([Event(4, Action(1, "click"))] * 10_001)
    assert [violation.field for violation in caught.value.violations] == ["events"]
    with pytest.raises(InvalidRequest) as caught:
        client.upsert_items([TakeDown(1)] * 10_001)
    assert [violation.field for violation in caught.value.violations] == ["changes"]
    assert world.records(4, RECENT) == []


@pytest.mark.parametrize("method", ["Report", "UpsertItems", "ReportStream"])
def test_what_is_no_message_is_refused(world, method):
    path = f"/recall.v1.IngestService/{method}"
    with grpc.insecure_channel(world.target) as channel:
        if method == "ReportStream":
            call = channel.stream_stream(path)(iter([b"\xff\xff"]))
        else:
            call = channel.unary_unary(path).future(b"\xff\xff")
        with pytest.raises(grpc.RpcError) as caught:
            next(call) if method == "ReportStream" else call.result()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    bad = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(details).details[0].Unpack(bad)
    assert "expected a serialized recall.v1." in bad.field_violations[0].description


def test_many_callers_share_commits_and_each_hears_of_its_own(world, client):
    client.report(clicks(500, 1, prefix="shared-"))

    def report(caller: int):
        # The first event of each is one that is there already.
        return client.report([*clicks(500, 1, prefix="shared-"), *clicks(600 + caller, *range(caller + 1))])

    commits = _commits(world)
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(report, range(64)))
    assert [(r.accepted, r.duplicates) for r in results] == [(n + 1, 1) for n in range(64)]
    assert _commits(world) - commits <= 64
    for caller in range(64):
        assert len(world.records(600 + caller, RECENT)) == caller + 1


def _commits(world) -> float:
    (family,) = world.metrics.ingest_seconds.collect()
    return next(sample.value for sample in family.samples if sample.name.endswith("_count"))


def test_events_are_counted(world, client):
    before, kinds = world.counted("ingest_events"), world.counted("ingest_kinds")
    client.report(
        [*clicks(8, 1, prefix="m-"), *clicks(8, 1, prefix="m-"), Event(8, Follow(1)), Event(-8, Follow(1))]
    )
    after, kinds_after = world.counted("ingest_events"), world.counted("ingest_kinds")
    gained = {outcome: after[outcome] - before.get(outcome, 0) for outcome in after}
    assert gained == {"accepted": 2, "duplicate": 1, "refused": 1}
    assert kinds_after["action"] - kinds.get("action", 0) == 2
    assert kinds_after["follow"] - kinds.get("follow", 0) == 1


async def test_the_asynchronous_client_does_the_same(world):
    async with AsyncIngestClient(world.target) as client:
        results = await asyncio.gather(*(client.report(clicks(700 + n, 1, 2)) for n in range(20)))
        assert [result.accepted for result in results] == [2] * 20
        assert (await client.upsert_items([Item(1)])).accepted == 1
        with pytest.raises(InvalidRequest):
            await client.report([Event(4, Action(1, "click"))] * 10_001)


def test_a_string_catalogue_takes_and_keeps_keys(tmp_path):
    with ingesting(tmp_path, "string") as world, IngestClient(world.target) as client:
        result = client.report(
            [
                Event("ann", Exposure(["x", "y"])),
                Event("ann", Action("x", "like")),
                Event(5, Action(1, "like")),
                Event("ann", Follow("bob")),
            ]
        )
        assert result.accepted == 3
        assert [(r.index, r.field) for r in result.refused] == [(2, "user_id")]
        assert world.exposed("ann", key_of("x"), time.time())
        assert [key for key, *_ in world.records("ann", RECENT)] == [key_of("x")]
        assert [key for key, *_ in world.records("ann", FOLLOWS)] == [key_of("bob")]
        assert client.upsert_items([Item("x", author="bob")]).accepted == 1


# --- items -------------------------------------------------------------------------------------------------


def test_items_are_published_changed_and_taken_down(world, client):
    end = world.log.end()
    first = client.upsert_items(
        [
            Item(
                50,
                author=3,
                published_at=9,
                title="Bread",
                tags=["food"],
                location=(48.4, 10.0),
                updated_at_ms=100,
            )
        ]
    )
    assert (first.accepted, first.stale, first.refused) == (1, 0, ())
    assert first.log_offset == world.log.end()
    later = client.upsert_items([TakeDown(50, updated_at_ms=200), Item(50, updated_at_ms=150), Item(-1)])
    assert (later.accepted, later.stale) == (2, 1)
    assert [(refusal.index, refusal.field) for refusal in later.refused] == [(2, "item_id")]
    entries = [pb.ItemChange.FromString(change) for _, change in world.log.read(end, 10)]
    assert entries == [
        pb.ItemChange(
            item_id=50,
            updated_at_ms=100,
            put=pb.Item(
                author_id=3, published_at=9, title="Bread", tags=["food"], latitude=48.4, longitude=10.0
            ),
        ),
        pb.ItemChange(item_id=50, updated_at_ms=200, take_down=True),
    ]


# --- streams -----------------------------------------------------------------------------------------------


def test_a_stream_is_answered_in_order_by_its_offsets(world, client):
    batches = [(100 + n, clicks(9, *range(3 * n, 3 * n + 3))) for n in range(40)]
    answers = list(client.stream(batches))
    assert [answer.offset for answer in answers] == [offset for offset, _ in batches]
    assert sum(answer.accepted for answer in answers) == 120
    assert [key for key, *_ in world.records(9, RECENT)] == list(range(120))


def test_a_streams_messages_are_refused_and_recognised_as_a_batchs_are(client):
    batches = [
        (1, clicks(10, 1, prefix="s-")),
        (2, [Event(-1, Follow(1)), *clicks(10, 1, prefix="s-")]),
        (3, []),
        (4, [Event(-1, Follow(1))]),
    ]
    answers = list(client.stream(batches))
    assert [(a.offset, a.accepted, a.duplicates, len(a.refused)) for a in answers] == [
        (1, 1, 0, 0),
        (2, 0, 1, 1),
        (3, 0, 0, 0),
        (4, 0, 0, 1),
    ]


def test_a_stream_message_beyond_its_limit_ends_the_stream_after_the_answers_before_it(client):
    answers = client.stream([(1, clicks(11, 1)), (2, [Event(11, Action(1, "click"))] * 10_001), (3, [])])
    heard = []
    with pytest.raises(InvalidRequest):
        heard.extend(answer.offset for answer in answers)
    assert heard in ([1], [])  # what was not yielded was raised over


def test_no_more_than_the_allowed_batches_are_unanswered(client):
    taken = []

    def batches():
        for n in range(30):
            taken.append(n)
            yield n, clicks(12, n)

    for answer in client.stream(batches(), in_flight=3):
        assert len(taken) <= answer.offset + 4


async def test_the_asynchronous_stream_yields_answers_while_its_source_waits(world):
    heard = asyncio.Event()

    async def batches():
        yield 1, clicks(13, 1)
        await asyncio.wait_for(heard.wait(), 60)  # the answer comes although there is nothing more to send
        for n in range(2, 30):
            yield n, clicks(13, n)

    offsets = []
    async with AsyncIngestClient(world.target) as client:
        async for answer in client.stream(batches(), in_flight=2):
            heard.set()
            offsets.append(answer.offset)
    assert offsets == list(range(1, 30))
    assert [key for key, *_ in world.records(13, RECENT)] == offsets


# --- the store goes away -----------------------------------------------------------------------------------


@pytest.fixture
def own_world(tmp_path):
    # Once a second would lose what was acknowledged within the last second before a kill.
    with ingesting(tmp_path, durability="always") as running:
        yield running


def test_while_the_store_is_away_nothing_is_acknowledged_and_afterwards_it_counts_once(own_world):
    events = clicks(1, 1, 2, prefix="e-")
    with IngestClient(own_world.target, options=[("grpc.enable_retries", 0)]) as client:
        client.report(events[:1])
        own_world.embedded.stop()
        with pytest.raises(grpc.RpcError) as caught:
            client.report(events)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "send the same again" in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            client.upsert_items([Item(1)])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            list(client.stream([(1, events)], patience=0.2))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        own_world.embedded.start()
        (result,) = client.stream([(1, events)])
    assert (result.accepted, result.duplicates) == (1, 1)
    assert [key for key, *_ in own_world.records(1, RECENT)] == [1, 2]


def test_a_stream_outlives_the_stores_death_without_losing_or_doubling(own_world):
    batches = [(n, clicks(1, *range(5 * n, 5 * n + 5))) for n in range(30)]
    answers = []
    with IngestClient(own_world.target) as client:
        for answer in client.stream(batches, patience=30):
            answers.append(answer)
            if answer.offset == 3:
                os.kill(own_world.embedded.pid, signal.SIGKILL)
    assert [answer.offset for answer in answers] == list(range(30))
    assert all(answer.accepted + answer.duplicates == 5 for answer in answers)
    assert [key for key, *_ in own_world.records(1, RECENT)] == list(range(150))


async def test_the_asynchronous_stream_outlives_it_too(own_world):
    answers = []
    async with AsyncIngestClient(own_world.target) as client:
        async for answer in client.stream(((n, clicks(1, n)) for n in range(30)), patience=30):
            answers.append(answer.offset)
            if answer.offset == 3:
                os.kill(own_world.embedded.pid, signal.SIGKILL)
    assert answers == list(range(30))
    assert [key for key, *_ in own_world.records(1, RECENT)] == list(range(30))


def test_closing_finishes_what_waits_and_refuses_what_is_new(tmp_path):
    with (
        ingesting(tmp_path) as world,
        IngestClient(world.target, options=[("grpc.enable_retries", 0)]) as client,
    ):
        with client.open_stream(patience=0) as stream:
            stream.send(1, clicks(1, 1))
            assert stream.receive().offset == 1
            loop = world.service._committer._loop
            asyncio.run_coroutine_threadsafe(world.service.close(5), loop).result(10)
            stream.send(2, clicks(1, 2))
            with pytest.raises(grpc.RpcError) as caught:
                stream.receive()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            client.report(clicks(1, 3))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [key for key, *_ in world.records(1, RECENT)] == [1]
