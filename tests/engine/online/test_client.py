from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from recall.v1 import recall_pb2 as pb
from recall.v1 import recall_pb2_grpc

from engine.client import AsyncRecallClient, Candidate, InvalidRequest, Proposal, RecallClient, RecentItem
from engine.core.errors import RecallError


class Scripted(recall_pb2_grpc.RecallServiceServicer):
    """Fails with the given codes, one a call, then answers; remembers what it was sent."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self.codes = list(codes)
        self.calls: list[pb.RecallRequest] = []
        self.response = pb.RecallResponse(request_id="done")

    def Recall(self, request, context):  # noqa: N802
        self.calls.append(request)
        if self.codes:
            context.abort(self.codes.pop(0), "as told")
        return self.response


@contextmanager
def scripted(*codes):
    servicer = Scripted(*codes)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    recall_pb2_grpc.add_RecallServiceServicer_to_server(servicer, server)
    servicer.health = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(None).wait()


def test_every_argument_reaches_the_wire():
    with scripted() as servicer, RecallClient(servicer.target) as client:
        client.recall(
            user_id=7,
            scene="feed",
            limit=20,
            recent_items=[RecentItem(1, "like", 5), (2, "click"), ("three",), "four", 5],
            recent_mode="override",
            exclude=[4, "five"],
            like=[8, "nine"],
            overrides={"swing": False, "fresh": 0, "popular": 9},
            city="Ulm",
            location=(48.4, 10.0),
            time=0,
            device={"os": "ios"},
            debug=True,
            request_id="r",
        )
        (sent,) = servicer.calls
    assert sent == pb.RecallRequest(
        user_id=7,
        scene="feed",
        limit=20,
        recent_items=[
            pb.RecentItem(item_id=1, event="like", timestamp=5),
            pb.RecentItem(item_id=2, event="click"),
            pb.RecentItem(item_key="three"),
            pb.RecentItem(item_key="four"),
            pb.RecentItem(item_id=5),
        ],
        recent_mode=pb.RECENT_MODE_OVERRIDE,
        exclude_item_ids=[4],
        exclude_item_keys=["five"],
        trigger_item_ids=[8],
        trigger_item_keys=["nine"],
        channel_overrides=[
            pb.ChannelOverride(channel="swing", off=True),
            pb.ChannelOverride(channel="fresh", quota=0),
            pb.ChannelOverride(channel="popular", quota=9),
        ],
        context=pb.Context(
            city="Ulm", location=pb.Location(latitude=48.4, longitude=10.0), time=0, device={"os": "ios"}
        ),
        debug=True,
        request_id="r",
    )


def test_none_is_the_same_as_nothing():
    with scripted() as servicer, RecallClient(servicer.target) as client:
        client.recall()
        client.recall(user_id=None, user_key=None, limit=None, location=None, time=None)
        client.recall(user_id=0)
        client.recall(user_key="")
        guest, also, zero, key = servicer.calls
    assert guest == also
    assert guest.WhichOneof("user") is None
    assert not guest.HasField("limit")
    assert not guest.context.HasField("time")
    assert zero.WhichOneof("user") == "user_id"
    assert key.WhichOneof("user") == "user_key"


@pytest.mark.parametrize(
    "arguments",
    [
        {"user_id": 1, "user_key": "a"},
        {"recent_mode": "replace"},
        {"overrides": {"swing": True}},
        {"user_id": 2**63},
        {"user_id": "1"},
        {"colour": "red"},
        {"recent_items": [(1.5,)]},
    ],
)
def test_what_cannot_be_sent_is_refused_here(arguments):
    with RecallClient("127.0.0.1:1") as client, pytest.raises((ValueError, TypeError)):
        client.recall(**arguments)


def test_an_answer_is_plain_values():
    with scripted() as servicer, RecallClient(servicer.target) as client:
        servicer.response = pb.RecallResponse(
            request_id="r",
            candidates=[
                pb.Candidate(
                    item_id=0,
                    score=0.5,
                    proposals=[
                        pb.Proposal(channel="a", rank=1, score=2.0, trigger_id=0),
                        pb.Proposal(channel="b", rank=2, score=-1.0),
                        pb.Proposal(channel="c", rank=3, score=1.0, trigger_key="k"),
                    ],
                ),
                pb.Candidate(item_key="x"),
            ],
            channels=[pb.ChannelReport(channel="a", status=99, trigger_kind=pb.TRIGGER_KIND_CELL)],
        )
        result = client.recall()
    assert result.candidates == (
        Candidate(
            0, 0.5, (Proposal("a", 1, 2.0, 0), Proposal("b", 2, -1.0, None), Proposal("c", 3, 1.0, "k"))
        ),
        Candidate("x", 0.0, ()),
    )
    assert result.item_ids == [0, "x"]
    assert result.channels[0].status == "99"  # of a newer server
    assert result.channels[0].trigger_kind == "CELL"
    assert result.debug is None


def test_unavailable_is_tried_again():
    with (
        scripted(*[grpc.StatusCode.UNAVAILABLE] * 3) as servicer,
        RecallClient(servicer.target, timeout=60) as client,
    ):
        assert client.recall().request_id == "done"
        assert len(servicer.calls) == 4


def test_the_fourth_unavailable_is_the_last():
    with (
        scripted(*[grpc.StatusCode.UNAVAILABLE] * 9) as servicer,
        RecallClient(servicer.target, timeout=60) as client,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            client.recall()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(servicer.calls) == 4


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED],
)
def test_nothing_else_is_tried_again(code):
    with scripted(code) as servicer, RecallClient(servicer.target, timeout=60) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.recall()
        assert caught.value.code() is code
        assert len(servicer.calls) == 1


async def test_the_async_client_tries_again_and_translates_too():
    with scripted(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT) as servicer:
        async with AsyncRecallClient(servicer.target, timeout=60) as client:
            with pytest.raises(InvalidRequest, match="as told") as caught:
                await client.recall()
    assert caught.value.violations == ()
    assert len(servicer.calls) == 2


def test_a_refusal_names_the_fields(target):
    with RecallClient(target, timeout=60) as client, pytest.raises(InvalidRequest) as caught:
        client.recall(limit=0, recent_items=[(1, "stare")])
    assert isinstance(caught.value, RecallError)
    assert [violation.field for violation in caught.value.violations] == ["limit", "recent_items[0].event"]
    assert "limit: expected 1 to 500, got 0" in str(caught.value)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert error_details_pb2.BadRequest.DESCRIPTOR.full_name == "google.rpc.BadRequest"


async def test_both_clients_give_the_same(target):
    with RecallClient(target, timeout=60) as blocking:
        one = await asyncio.to_thread(blocking.recall, user_id=1)
    async with AsyncRecallClient(target, timeout=60) as client:
        await client.wait_ready()
        other = await client.recall(user_id=1)
    assert one.candidates == other.candidates


def test_waiting_for_a_server_that_never_comes_ends():
    with RecallClient("127.0.0.1:1") as client, pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        client.wait_ready(0.3)


def test_waiting_ends_when_the_server_says_serving():
    with scripted() as servicer, RecallClient(servicer.target) as client:
        servicer.health.set("recall.v1.RecallService", health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(TimeoutError):
            client.wait_ready(0.3)
        servicer.health.set("recall.v1.RecallService", health_pb2.HealthCheckResponse.SERVING)
        client.wait_ready(60)


def test_a_client_needs_no_server_libraries():
    heavy = ("numpy", "numba", "pyarrow", "pydantic")
    code = f"import sys, engine.client; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
