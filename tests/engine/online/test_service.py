from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import online_world
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from online_world import (
    ITEMS,
    PATIENCE,
    POISON,
    Gate,
    NotFinite,
    OutOfRange,
    Raising,
    StrangeTrigger,
    in_flight,
    make_world,
    served,
    serving,
    serving_thread,
    until,
    user_id,
)
from recall.v1 import recall_pb2 as pb
from recall.v1 import recall_pb2_grpc

from engine.client import InvalidRequest, RecallClient
from engine.core.errors import ConfigError, RecallError
from engine.core.options import Options
from engine.online.server import Server

SERVICE = "recall.v1.RecallService"


@pytest.fixture
def client(target):
    with RecallClient(target, timeout=PATIENCE) as connected:
        yield connected


@pytest.fixture
def stub(target):
    with grpc.insecure_channel(target) as channel:
        yield recall_pb2_grpc.RecallServiceStub(channel)


def statuses(result) -> dict[str, str]:
    return {report.channel: report.status for report in result.channels}


def proposers(result) -> set[str]:
    return {proposal.channel for candidate in result.candidates for proposal in candidate.proposals}


# --- answers -----------------------------------------------------------------------------------------------


def test_a_known_user_is_answered_by_the_channels(client):
    result = client.recall(user_id=1)
    assert len(result.candidates) == 10
    assert statuses(result) == {"similar": "OK", "crowd": "OK", "top": "OK", "rest": "SKIPPED"}
    assert 106 not in result.item_ids  # seen
    assert 100 not in result.item_ids
    assert result.unknown.user is False
    assert result.request_id


def test_an_unknown_user_is_answered_by_what_needs_no_history(client):
    result = client.recall(user_id=999, limit=60)
    assert result.unknown.user is True
    assert statuses(result) == {"similar": "EMPTY", "crowd": "EMPTY", "top": "OK", "rest": "OK"}
    assert sorted(result.item_ids) == [100 + row for row in range(ITEMS)]


async def test_a_string_catalogue_takes_and_gives_keys(string_world):
    async with serving(string_world) as client:
        result = await client.recall(
            user_key="user-1", exclude=["item-139", "item-x"], recent_items=["item-x", "y"]
        )
        assert len(result.candidates) == 10
        assert all(str(item).startswith("item-") for item in result.item_ids)
        assert "item-139" not in result.item_ids
        assert result.unknown.exclude_items == 1
        with pytest.raises(InvalidRequest) as caught:
            await client.recall(user_id=1)
        assert [v.field for v in caught.value.violations] == ["user_id"]


def test_the_same_request_has_the_same_answer_bit_for_bit(stub):
    def ask(request):
        response = stub.Recall(request)
        for report in response.channels:
            report.microseconds = 0
        return response.SerializeToString(deterministic=True)

    request = pb.RecallRequest(user_id=2, request_id="same", limit=30)
    assert len({ask(request) for _ in range(5)}) == 1


async def test_concurrent_requests_share_batches_and_answer_as_if_alone():
    gate = Gate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 3, "similar": 4, "crowd": 3})
    async with served(world) as (server, client):
        users = [1, 2, 3, 999, 6, 4, 5]
        alone = [await client.recall(user_id=u) for u in users]
        gate.open.clear()
        gate.entered.clear()
        blocker = asyncio.create_task(client.recall(user_id=1))
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
        tasks = [asyncio.create_task(client.recall(user_id=u, debug=True)) for u in users]
        await until(lambda: in_flight(server) == 1 + len(users))
        gate.open.set()
        together = await asyncio.gather(*tasks)
        await blocker
    assert {result.debug.batch_size for result in together} == {len(users)}
    for one, other in zip(alone, together, strict=True):
        assert one.candidates == other.candidates
        assert one.unknown == other.unknown
        assert statuses(one) == statuses(other)


def test_overrides_change_quotas_and_turn_channels_off(client):
    off = client.recall(user_id=1, overrides={"crowd": False, "top": 0})
    assert statuses(off)["crowd"] == statuses(off)["top"] == "SKIPPED"
    assert "crowd" not in proposers(off)
    more = client.recall(user_id=1, overrides={"top": 10, "similar": False, "crowd": False})
    assert more.item_ids == [139 - n for n in range(10)]
    alone = client.recall(user_id=999, overrides={"top": False, "rest": False})
    assert alone.candidates == ()


def test_recent_items_are_added_or_replace_the_history(client):
    added = client.recall(user_id=1, recent_items=[(130, "like", 1_700_000_100)], debug=True)
    assert added.debug.history == (130, 106, 100)
    assert 131 in added.item_ids
    assert 130 not in added.item_ids
    replaced = client.recall(user_id=1, recent_items=[(130,)], recent_mode="override", debug=True)
    assert replaced.debug.history == (130,)
    triggers = {p.trigger for c in replaced.candidates for p in c.proposals if p.channel == "similar"}
    assert triggers == {130}


def test_unknown_ids_are_counted(client):
    result = client.recall(recent_items=[(130, "click"), (7,), (8,)], exclude=[9, 131])
    assert result.unknown.recent_items == 2
    assert result.unknown.exclude_items == 1
    assert result.unknown.user is False


def test_what_is_excluded_never_comes_back_and_uses_up_no_quota(client):
    best = client.recall(user_id=999, limit=3).item_ids
    assert best == [139, 138, 137]
    result = client.recall(user_id=999, limit=3, exclude=best)
    assert result.item_ids == [136, 135, 134]
    assert {report.filter: report.removed for report in result.filters} == {"seen": 0, "excluded": 3}
    assert client.recall(exclude=[100 + row for row in range(ITEMS)]).candidates == ()


def test_the_callers_moment_and_request_id_come_through(client):
    assert client.recall(request_id="mine").request_id == "mine"
    assert client.recall(time=0, city="Ulm", location=(0.0, 0.0), device={"os": "x"}).candidates


def test_requests_without_an_id_get_one_each(client):
    assert len({client.recall().request_id for _ in range(3)} - {""}) == 3


def test_debug_is_given_on_request_only(client):
    assert client.recall(user_id=1).debug is None
    debug = client.recall(user_id=1, debug=True).debug
    assert list(debug.stages) == ["hydrate", "fan_out", "mask", "merge", "fill"]
    assert debug.history == (106, 100)
    assert debug.batch_size == 1


# --- refusals ----------------------------------------------------------------------------------------------


def test_a_refusal_carries_bad_request_details(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Recall(pb.RecallRequest(limit=0, scene="nowhere"))
    error = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status.message == error.details()
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert {violation.field for violation in bad.field_violations} == {"limit", "scene"}
    assert all(violation.description for violation in bad.field_violations)


@pytest.mark.parametrize("limit", [0, -1, 501, 2**31 - 1])
def test_a_limit_out_of_range_is_refused(client, limit):
    with pytest.raises(InvalidRequest) as caught:
        client.recall(limit=limit)
    assert [v.field for v in caught.value.violations] == ["limit"]


def test_a_thousand_violations_still_fit_the_metadata(client):
    for event in ("é" * 1000, "\n\0" * 500):
        with pytest.raises(InvalidRequest) as caught:
            client.recall(recent_items=[(1, event)] * 1000, exclude=[-1] * 10_000, scene=event)
        assert caught.value.violations[-1].field == ""
        assert caught.value.violations[-1].description.endswith("more")


def test_bytes_that_are_no_message_are_refused(target):
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Recall")
        for data in (b"\xff\xff\xff", b"\x12\x02\xff\xfe"):  # the second is a string that is not UTF-8
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=PATIENCE)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_at_every_limit_is_within_the_message_size(target):
    keys = [f"{n:0256}" for n in range(10_000)]
    message = pb.RecallRequest(exclude_item_keys=keys)
    for key in keys[:1000]:
        message.recent_items.add(item_key=key, event="click", timestamp=1)
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        recall_pb2_grpc.RecallServiceStub(channel).Recall(message, timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # read, and refused as ids are int64


NUMBERS = st.integers(-(2**31), 2**31 - 1)
LARGE = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(max_size=8)
EVENTS = st.sampled_from(["", "click", "like", "view"])
CHANNELS = st.sampled_from(["similar", "crowd", "top", "rest"])


@st.composite
def messages(draw):
    """Requests: about half of them keep every rule, the others break some."""
    careless = draw(st.booleans())

    def one(good, bad):
        return st.one_of(good, bad) if careless else good

    ids = one(st.integers(0, 150), LARGE)
    times = one(st.none() | st.integers(0, 2_000_000_000), LARGE)
    recent = st.builds(pb.RecentItem, item_id=ids, event=one(EVENTS, TEXTS), timestamp=times)
    location = st.builds(
        pb.Location,
        latitude=one(st.floats(-90, 90), st.floats()),
        longitude=one(st.floats(-180, 180), st.floats()),
    )
    context = st.builds(
        pb.Context,
        location=st.none() | location,
        city=TEXTS,
        time=times,
        device=st.dictionaries(TEXTS, TEXTS, max_size=3),
    )
    quota = one(st.none() | st.integers(0, 20), NUMBERS)
    override = st.one_of(
        st.builds(pb.ChannelOverride, channel=st.just("top"), quota=quota),
        st.builds(pb.ChannelOverride, channel=one(CHANNELS, TEXTS), off=st.just(True)),
    )
    user = st.fixed_dictionaries({}, optional={"user_id": ids})
    return pb.RecallRequest(
        **draw(one(user, st.builds(dict, user_key=TEXTS))),
        scene=draw(one(st.sampled_from(["", "default"]), st.just("other") | TEXTS)),
        limit=draw(one(st.none() | st.integers(1, 500), NUMBERS)),
        context=draw(st.none() | context),
        recent_items=draw(st.lists(one(recent, st.builds(pb.RecentItem, item_key=TEXTS)), max_size=6)),
        recent_mode=draw(one(st.integers(0, 1), NUMBERS)),
        exclude_item_ids=draw(st.lists(ids, max_size=6)),
        exclude_item_keys=draw(one(st.just([]), st.lists(TEXTS, max_size=3))),
        channel_overrides=draw(
            st.lists(override, max_size=3, unique_by=None if careless else lambda o: o.channel)
        ),
        debug=draw(st.booleans()),
        request_id=draw(TEXTS),
    )


@given(messages())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_message_whatever_is_our_failure(stub, message):
    try:
        response = stub.Recall(message, timeout=PATIENCE)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
        return
    limit = message.limit or {"other": 5}.get(message.scene, 10)
    ids = [candidate.item_id for candidate in response.candidates]
    assert len(ids) <= limit
    assert len(set(ids)) == len(ids)
    if message.scene != "other":
        assert not set(ids) & set(message.exclude_item_ids)


# --- what breaks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (Raising, "on fire"),
        (NotFinite, "not finite"),
        (OutOfRange, "outside the catalogue"),
        (StrangeTrigger, "trigger outside"),
    ],
)
async def test_a_broken_channel_is_reported_and_the_others_answer(broken, text, caplog):
    world = make_world(extra={"broken": broken(Options())}, quotas={"broken": 4, "top": 3}, limit=7)
    async with serving(world) as client:
        result = await client.recall(user_id=1)
    assert statuses(result) == {"broken": "ERROR", "top": "OK", "rest": "SKIPPED"}
    (report,) = (report for report in result.channels if report.channel == "broken")
    assert text in report.message
    assert (report.returned, report.eligible, report.kept) == (0, 0, 0)
    assert len(result.candidates) == 7


async def test_a_gate_is_reported():
    world = make_world(quotas={"known_only": 3, "top": 3})
    async with serving(world) as client:
        assert statuses(await client.recall())["known_only"] == "GATED"
        assert statuses(await client.recall(user_id=1))["known_only"] == "OK"


class Slow(online_world.Rest):
    """Takes as many milliseconds as the request's moment says; a time.time() of today says none."""

    def recall(self, query, k):
        time.sleep(query.now / 1000 if query.now < 10_000 else 0)
        return super().recall(query, k)


async def test_channels_after_a_slow_one_are_left_out_when_time_is_up():
    # Channels are asked for 2 s, the slow one takes 4; the reserve is left for the answer. gRPC rounds a minute up to
    # whole seconds, so that the two must be further apart than one.
    world = make_world(extra={"slow": Slow(Options())}, quotas={"slow": 10, "top": 3}, reserve_ms=58_000.0)
    async with serving(world) as client:
        result = await client.recall(time=4000, timeout=60.0)
        assert statuses(result) == {"slow": "OK", "top": "TIMEOUT", "rest": "SKIPPED"}
        assert len(result.candidates) == 10
        nothing = await client.recall(timeout=30.0)
        assert statuses(nothing) == {"slow": "TIMEOUT", "top": "TIMEOUT", "rest": "TIMEOUT"}
        assert nothing.candidates == ()


async def test_a_caller_never_waits_longer_than_its_deadline():
    gate = Gate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 4, "top": 3})
    async with serving(world) as client:
        gate.open.clear()
        with pytest.raises(grpc.RpcError) as caught:
            await client.recall(timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.open.set()  # only now could the channel have answered
        assert statuses(await client.recall()) == {"gate": "OK", "top": "OK", "rest": "SKIPPED"}


async def test_a_request_that_cannot_be_computed_is_internal_and_says_which(caplog):
    world = make_world(filters=("poisoned",))
    # Users are warmed up by the first of them, who is not the poisonous one.
    async with serving(world) as client:
        with pytest.raises(grpc.RpcError) as caught:
            await client.recall(user_id=user_id(POISON), request_id="culprit")
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "culprit" in caught.value.details()
        assert "RuntimeError" not in caught.value.details()
        assert (await client.recall(user_id=1)).candidates
    assert "RuntimeError: poison" in caplog.text


async def test_a_full_queue_is_resource_exhausted_at_once():
    gate = Gate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 3}, max_queue=2)
    async with served(world) as (server, client):
        gate.open.clear()
        gate.entered.clear()
        tasks = [asyncio.create_task(client.recall())]
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
        tasks += [asyncio.create_task(client.recall()) for _ in range(2)]
        await until(lambda: in_flight(server) == 3)
        with pytest.raises(grpc.RpcError) as caught:
            await client.recall()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.open.set()
        assert len(await asyncio.gather(*tasks)) == 3


# --- the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", SERVICE])
def test_health_says_serving(target, name):
    with grpc.insecure_channel(target) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(target):
    with grpc.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE)
    names = {service.name for service in response.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_health_watcher_hears_the_end_and_does_not_delay_it(world):
    server = Server(world.config, world.replica)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop(10 * PATIENCE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        await asyncio.wait_for(stopping, PATIENCE)


async def test_a_taken_port_is_an_error_in_one_sentence(world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            await Server(make_world(port=port).config, world.replica).start()


async def test_two_servers_do_not_share_a_port(world):
    server = Server(world.config, world.replica)
    port = await server.start()
    with pytest.raises(ConfigError, match="Address already in use"):
        await Server(make_world(port=port).config, world.replica).start()
    await server.stop(0)


async def test_a_scene_that_cannot_answer_does_not_start():
    class Broken(online_world.Seen):
        def keep(self, batch, candidates):
            raise RuntimeError("broken")

    world = make_world()
    world.replica.pipelines["other"]._filters.filters = [Broken(Options())]
    with pytest.raises(RecallError, match=r"scene 'other' cannot answer: RuntimeError\('broken'\)"):
        await Server(world.config, world.replica).start()


async def test_the_log_says_where_it_listens(world, caplog):
    with caplog.at_level(logging.INFO, logger="engine"):
        async with serving(world):
            pass
    assert "release r-1: listening on 127.0.0.1:" in caplog.text


SERVER = """
import asyncio, logging, sys, time
sys.path.insert(0, sys.argv[1])
import online_world
from engine.core.options import Options
from engine.online.server import serve

class Slow(online_world.Rest):
    def recall(self, query, k):
        if query.user_id == 1 and query.now == 1000:
            print("entered", flush=True)
            time.sleep(1)
        return super().recall(query, k)

logging.basicConfig(level=logging.INFO)
world = online_world.make_world(extra={"slow": Slow(Options())}, quotas={"slow": 5}, drain_seconds=20)
asyncio.run(serve(world.config, world.replica, lambda port: print(port, flush=True)))
print("bye", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_flight_finish(number, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        port = int(process.stdout.readline())
        with (
            RecallClient(f"127.0.0.1:{port}", timeout=PATIENCE) as client,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            message = pb.RecallRequest(user_id=1, context=pb.Context(time=1000))
            call = recall_pb2_grpc.RecallServiceStub(channel).Recall.future(message, timeout=PATIENCE)
            assert process.stdout.readline() == "entered\n"
            process.send_signal(number)
            assert len(call.result().candidates) == 10
            out, err = process.communicate(timeout=PATIENCE)
            assert out == "bye\n"
            assert process.returncode == 0, err
            assert "draining" in err
            with pytest.raises(grpc.RpcError) as caught:
                client.recall()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        process.kill()
        process.communicate()


def test_a_server_in_a_thread_stops_cleanly():
    with serving_thread(make_world()) as port, RecallClient(f"127.0.0.1:{port}", timeout=PATIENCE) as client:
        assert client.recall().candidates
