"""Overload over real gRPC: who is refused, that everybody gets an answer, and that degrading is said."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from online_world import PATIENCE, Gate, Top, make_world, serving_thread, user_id
from recall.v1 import recall_pb2 as pb

from engine.client import AsyncRecallClient
from engine.config import SceneConfig
from engine.core.options import Options
from engine.online.service import METHOD, PUSHBACK
from engine.online.wire import parse

MANY = 300
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class InlineGate(Gate):
    inline = True


def call(channel, **fields):
    request = pb.RecallRequest(**fields).SerializeToString()
    return channel.unary_unary(METHOD)(request, timeout=PATIENCE)


async def outcome(channel) -> grpc.StatusCode:
    try:
        answer = await call(channel, user_id=user_id(0))
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert pb.RecallResponse.FromString(answer).candidates
    return grpc.StatusCode.OK


@pytest.fixture
def gated():
    gate = InlineGate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 5}, fallback=(), max_batch=2)
    with serving_thread(world) as port:
        try:
            yield gate, f"127.0.0.1:{port}"
        finally:
            gate.open.set()


async def swamped(gate, channel) -> list[asyncio.Task[grpc.StatusCode]]:
    """Make many calls while the compute hangs, and wait until as many are refused as must be."""
    gate.entered.clear()
    gate.open.clear()
    calls = [asyncio.create_task(outcome(channel)) for _ in range(MANY)]
    assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
    # Two batches of two is the least that may be in flight, four batches what it begins with.
    while sum(each.done() for each in calls) < MANY - 4 * 2:
        await asyncio.sleep(0.01)
    return calls


async def test_while_the_compute_hangs_the_rest_is_refused_at_once_and_it_recovers(gated):
    gate, target = gated
    async with grpc.aio.insecure_channel(target) as channel:
        calls = await swamped(gate, channel)
        assert {each.result() for each in calls if each.done()} == {EXHAUSTED}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(channel, user_id=user_id(0))
        assert refused.value.code() is EXHAUSTED
        assert "in flight" in (refused.value.details() or "")
        assert int(dict(refused.value.trailing_metadata())[PUSHBACK]) >= 0
        async with AsyncRecallClient(target) as other:  # the event loop is not held
            await other.wait_ready(PATIENCE)
        gate.open.set()
        outcomes = await asyncio.gather(*calls)
        assert outcomes.count(grpc.StatusCode.OK) >= 2 * 2
        assert set(outcomes) <= {EXHAUSTED, grpc.StatusCode.OK}
        assert await outcome(channel) is grpc.StatusCode.OK


async def test_hardly_more_requests_are_read_than_there_is_room_for(gated, monkeypatch):
    gate, target = gated
    read = []

    def counted(*arguments):
        read.append(1)
        return parse(*arguments)

    monkeypatch.setattr("engine.online.service.parse", counted)
    async with grpc.aio.insecure_channel(target) as channel:
        calls = await swamped(gate, channel)
        # A few more than four batches of two: of those that come one by one some are let in as others are being read.
        assert len(read) <= 4 * 2 + 16
        gate.open.set()
        await asyncio.gather(*calls)


async def test_who_opens_calls_and_sends_no_request_keeps_nobody_out(gated):
    _, target = gated

    async def nothing():
        await asyncio.sleep(PATIENCE)
        yield b""

    async with grpc.aio.insecure_channel(target) as channel:
        silent = [channel.stream_unary(METHOD)(nothing(), timeout=PATIENCE) for _ in range(30)]
        answered = 0
        while answered < 10:  # while they come, others may be refused; they stay, and nobody is
            answered = answered + 1 if await outcome(channel) is grpc.StatusCode.OK else 0
        for each in silent:
            each.cancel()


async def test_everybody_gets_an_answer_however_many_come(gated):
    _, target = gated
    async with grpc.aio.insecure_channel(target) as channel:
        for _ in range(3):
            outcomes = await asyncio.gather(*(outcome(channel) for _ in range(MANY)))
            assert set(outcomes) <= {EXHAUSTED, grpc.StatusCode.OK}
            assert grpc.StatusCode.OK in outcomes
        assert await outcome(channel) is grpc.StatusCode.OK


async def test_a_degraded_answer_says_so():
    steps = ({"at": 0.0001, "limit": 0.5, "without": ("top",)},)
    scene = SceneConfig(
        quotas={"similar": 4, "top": 4}, limit=8, fallback=("rest",), filters=(), degrade=steps
    )
    world = make_world(scenes={"default": scene, "plain": scene.model_copy(update={"degrade": ()})})
    with serving_thread(world) as port:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = pb.RecallResponse.FromString(await call(channel, user_id=user_id(0)))
            plain = pb.RecallResponse.FromString(await call(channel, user_id=user_id(0), scene="plain"))
    assert (answer.degraded, plain.degraded) == (1, 0)
    assert (len(answer.candidates), len(plain.candidates)) == (4, 8)
    top = next(report for report in answer.channels if report.channel == "top")
    assert (top.status, top.message) == (pb.CHANNEL_STATUS_GATED, "degraded")


async def test_a_channel_that_ends_the_thread_does_not_end_the_server():
    class Exits(Top):
        inline = True

        def recall_batch(self, batch, k):
            raise SystemExit(3)

    world = make_world(extra={"exits": Exits(Options())}, quotas={"exits": 3, "top": 3})
    world = replace(world, replica=replace(world.replica))
    with serving_thread(world) as port:
        async with AsyncRecallClient(f"127.0.0.1:{port}", timeout=PATIENCE) as client:
            for _ in range(3):
                result = await client.recall(user_id=user_id(0))
                assert [report.status for report in result.channels][:2] == ["ERROR", "OK"]
