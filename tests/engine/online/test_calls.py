"""Calls that do not pass through grpc.aio: what is asked of them that a client hardly ever does."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from online_world import PATIENCE, Gate, make_world, served, serving_thread, until, user_id
from recall.v1 import recall_pb2 as pb

from engine.client import AsyncRecallClient
from engine.core.errors import RecallError
from engine.online.calls import Call, Calls
from engine.online.service import METHOD

REQUEST = pb.RecallRequest(user_id=user_id(0)).SerializeToString()


class InlineGate(Gate):
    inline = True


@pytest.fixture
def gated():
    gate = InlineGate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 5}, fallback=(), max_batch=4)
    with serving_thread(world) as port:
        try:
            yield gate, f"127.0.0.1:{port}"
        finally:
            gate.open.set()


async def status(channel, method: str, *requests: bytes) -> tuple[grpc.StatusCode, str]:
    call = channel.stream_unary(method)(iter(requests), timeout=PATIENCE)
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def test_a_call_without_a_request_is_told_so_and_one_with_two_is_answered_once(gated):
    _, target = gated
    async with grpc.aio.insecure_channel(target) as channel:
        code, text = await status(channel, METHOD)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "RecallRequest" in text
        assert (await status(channel, METHOD, REQUEST, REQUEST))[0] is grpc.StatusCode.OK


async def test_a_caller_that_is_gone_is_not_computed():
    gate = InlineGate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 5}, fallback=(), max_batch=4)
    async with served(world) as (server, client):
        before = len(gate.batches)  # the warm-up's
        gate.entered.clear()
        gate.open.clear()
        first = asyncio.ensure_future(client.recall())
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
        gone = [asyncio.ensure_future(client.recall()) for _ in range(2)]
        waiting = server._batcher._waiting
        await until(lambda: len(waiting) == 2)
        for each in gone:
            each.cancel()
        await until(lambda: all(each.caller.cancelled for each in waiting))
        gate.open.set()
        assert (await first).candidates
        assert (await client.recall()).candidates
    assert gate.batches[before:] == [1, 1]


async def test_what_is_not_recall_is_answered_while_many_calls_wait(gated):
    gate, target = gated
    async with grpc.aio.insecure_channel(target) as channel:
        gate.entered.clear()
        gate.open.clear()
        calls = [asyncio.ensure_future(status(channel, METHOD, REQUEST)) for _ in range(500)]
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
        async with AsyncRecallClient(target) as other:
            await other.wait_ready(PATIENCE)
        assert (await status(channel, "/recall.v1.RecallService/Nothing"))[0] is grpc.StatusCode.UNIMPLEMENTED
        gate.open.set()
        codes = {code for code, _ in await asyncio.gather(*calls)}
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_a_call_whose_connection_breaks_costs_nothing(gated):
    _, target = gated
    host, port = target.split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    async with AsyncRecallClient(target, timeout=PATIENCE) as client:
        assert (await client.recall(user_id=user_id(0))).candidates


async def test_a_handler_that_raises_does_not_end_the_thread(caplog):
    server = grpc.aio.server()
    seen: list[Call] = []

    def handle(call: Call) -> None:
        seen.append(call)
        if len(seen) == 1:
            raise RuntimeError("broken")
        call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", (("key", "value"),))

    calls = Calls(server, "/a.B/C", handle)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    calls.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/a.B/C")
        lost = call(b"", timeout=PATIENCE)
        unanswered = asyncio.ensure_future(lost.code())
        await until(lambda: seen)
        lost.cancel()
        assert await unanswered is grpc.StatusCode.CANCELLED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"", timeout=PATIENCE, metadata=(("from", "us"),))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(refused.value.trailing_metadata())["key"] == "value"
    assert "RuntimeError: broken" in caplog.text
    assert ("from", "us") in [tuple(pair) for pair in seen[1].metadata]
    assert seen[1].peer.startswith("ipv4:127.0.0.1")
    assert 100.0 < seen[1].deadline(100.0) < 161.0
    seen.clear()
    await server.stop(0)
    await asyncio.to_thread(calls.close, 5)


def test_a_grpc_that_keeps_its_core_is_an_error():
    with pytest.raises(RecallError, match="grpcio"):
        Calls(object(), "/a.B/C", print)  # type: ignore[arg-type]
