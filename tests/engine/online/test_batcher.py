from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
from online_world import PATIENCE, POISON, Gate, make_world, submit, user_id
from recall.v1 import recall_pb2 as pb

from engine.online.batcher import (
    Batcher,
    ClosedError,
    ComputeError,
    DeadlinePassedError,
    QueueFullError,
)
from engine.online.request import Request


@asynccontextmanager
async def batching(world, max_batch=16, max_queue=1000, observer=None) -> AsyncIterator[Batcher]:
    batcher = Batcher(world.replica, max_batch, max_queue, observer)
    try:
        yield batcher
    finally:
        await batcher.close()


def gated_world():
    gate = Gate()
    return make_world(extra={"gate": gate}, quotas={"gate": 5, "similar": 5}), gate


async def start(*calls) -> list[asyncio.Task[bytes]]:
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


async def hold(batcher, gate) -> asyncio.Task[bytes]:
    """Make the compute thread busy, so that what comes next waits together."""
    gate.open.clear()
    gate.entered.clear()
    (task,) = await start(submit(batcher, "default", Request(), "first"))
    assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
    return task


def read(data: bytes) -> pb.RecallResponse:
    return pb.RecallResponse.FromString(data)


async def test_what_waits_together_is_computed_together():
    world, gate = gated_world()
    async with batching(world, max_batch=4) as batcher:
        first = await hold(batcher, gate)
        tasks = await start(
            *(submit(batcher, "default", Request(user_id=u), f"r{u}", True) for u in range(1, 7))
        )
        gate.open.set()
        answers = [read(answer) for answer in await asyncio.gather(first, *tasks)]
    assert gate.batches == [1, 4, 2]
    assert [answer.request_id for answer in answers] == ["first"] + [f"r{u}" for u in range(1, 7)]
    assert [answer.debug.batch_size for answer in answers[1:]] == [4, 4, 4, 4, 2, 2]


async def test_each_batch_is_noted_once_in_order_the_last_one_and_one_before_a_chore_too():
    world, gate = gated_world()
    noted: list[list[str]] = []

    def observe(answered):
        noted.append(list(answered.request_ids))
        if len(noted) == 1:
            raise RuntimeError("cannot be noted")

    async with batching(world, max_batch=2, observer=observe) as batcher:
        first = await hold(batcher, gate)
        tasks = await start(*(submit(batcher, "default", Request(user_id=u), f"r{u}") for u in range(1, 6)))
        gate.open.set()
        await asyncio.gather(first, *tasks)
        seen: list[int] = []
        await asyncio.wrap_future(batcher.between(lambda: seen.append(len(noted))))
        assert seen == [4]
    assert noted == [["first"], ["r1", "r2"], ["r3", "r4"], ["r5"]]


async def test_a_batch_of_several_scenes_is_computed_scene_by_scene():
    world, gate = gated_world()
    async with batching(world) as batcher:
        first = await hold(batcher, gate)
        scenes = ["default", "other", "default", "other"]
        tasks = await start(*(submit(batcher, s, Request(), f"{s}{i}", True) for i, s in enumerate(scenes)))
        gate.open.set()
        answers = [read(answer) for answer in await asyncio.gather(*tasks)]
        await first
    assert [answer.request_id for answer in answers] == ["default0", "other1", "default2", "other3"]
    assert {answer.debug.batch_size for answer in answers} == {2}
    assert [len(answer.candidates) for answer in answers] == [10, 5, 10, 5]


async def test_one_beyond_the_queue_is_refused_at_once():
    world, gate = gated_world()
    async with batching(world, max_queue=3) as batcher:
        first = await hold(batcher, gate)
        tasks = await start(*(submit(batcher, "default", Request(), str(i)) for i in range(3)))
        with pytest.raises(QueueFullError, match="3 requests"):
            await submit(batcher, "default", Request(), "too many")
        gate.open.set()
        assert len(await asyncio.gather(first, *tasks)) == 4
        assert read(await submit(batcher, "default", Request(), "again")).request_id == "again"


async def test_a_request_that_is_late_when_its_turn_comes_is_not_computed():
    world, gate = gated_world()
    async with batching(world) as batcher:
        first = await hold(batcher, gate)
        late = Request(deadline=time.monotonic() + 0.01)
        tasks = await start(
            submit(batcher, "default", late, "late"), submit(batcher, "default", Request(), "not")
        )
        await asyncio.sleep(0.02)
        gate.open.set()
        with pytest.raises(DeadlinePassedError):
            await tasks[0]
        await asyncio.gather(first, tasks[1])
    assert gate.batches == [1, 1]


async def test_a_cancelled_request_is_not_computed():
    world, gate = gated_world()
    async with batching(world) as batcher:
        first = await hold(batcher, gate)
        tasks = await start(*(submit(batcher, "default", Request(), str(i)) for i in range(2)))
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, tasks[1])
        assert tasks[0].cancelled()
    assert gate.batches == [1, 1]


async def test_one_cancelled_while_it_is_computed_harms_nobody():
    world, gate = gated_world()
    async with batching(world) as batcher:
        first = await hold(batcher, gate)
        first.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert read(await submit(batcher, "default", Request(), "next")).request_id == "next"


async def test_a_poisonous_request_fails_alone(caplog):
    gate = Gate()
    world = make_world(extra={"gate": gate}, quotas={"gate": 5}, filters=("poisoned",))
    async with batching(world) as batcher:
        first = await hold(batcher, gate)
        users = [1, user_id(POISON), 2]
        tasks = await start(*(submit(batcher, "default", Request(user_id=u), f"r{u}") for u in users))
        gate.open.set()
        good, bad, too = await asyncio.gather(*tasks, return_exceptions=True)
        await first
    assert read(good).request_id == "r1"
    assert read(too).request_id == "r2"
    assert isinstance(bad, ComputeError)
    assert "'r6'" in str(bad)
    assert "RuntimeError: poison" in caplog.text
    assert gate.batches == [1, 3, 1, 1, 1]


async def test_an_unknown_scene_fails_and_the_thread_lives(world):
    async with batching(world) as batcher:
        with pytest.raises(ComputeError):
            await submit(batcher, "nowhere", Request(), "x")
        assert await submit(batcher, "default", Request(), "y")


async def test_another_replica_answers_from_the_next_batch_on(world):
    async with batching(world) as batcher:
        assert read(await submit(batcher, "default", Request(), "x")).release == "r-1"
        batcher.replica = replace(world.replica, release="r-2")
        assert read(await submit(batcher, "default", Request(), "x")).release == "r-2"


async def test_a_channel_that_hangs_does_not_hang_the_end(caplog):
    world, gate = gated_world()
    batcher = Batcher(world.replica, 16, 100)
    first = await hold(batcher, gate)
    await batcher.close(0.05)
    assert "hangs" in caplog.text
    gate.open.set()
    await first


async def test_closing_finishes_what_waits_and_refuses_more():
    world, gate = gated_world()
    async with batching(world, max_batch=2) as batcher:
        first = await hold(batcher, gate)
        tasks = await start(*(submit(batcher, "default", Request(), str(i)) for i in range(5)))
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(ClosedError):
            await submit(batcher, "default", Request(), "more")
        gate.open.set()
        await closing
        assert len(await asyncio.gather(first, *tasks)) == 6


async def test_chores_are_done_between_batches_on_the_thread_that_computes():
    done = []
    async with batching(make_world()) as batcher:
        threads = [threading.current_thread().name]
        await asyncio.wrap_future(batcher.between(lambda: threads.append(threading.current_thread().name)))
        assert threads[1] == "compute"
        chores = [batcher.between(partial(done.append, n)) for n in range(5)]
        await asyncio.gather(submit(batcher, "default", Request(), "r"), *map(asyncio.wrap_future, chores))
        assert done == list(range(5))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(batcher.between(lambda: 1 // 0))
        assert await submit(batcher, "default", Request(), "r")
    assert batcher.between(lambda: done.append(9)).cancelled()
    assert 9 not in done
