"""Filters that cannot read the user's state, and what filters removed: in the pipeline, on the wire, at the client."""

from __future__ import annotations

import asyncio
import logging

import grpc
import numpy as np
import pytest
from online_world import ITEMS, Gate, make_world, serving, submit

from engine.core.candidates import FilterStatus
from engine.core.errors import ContractError, StateUnavailableError
from engine.core.filter import Filter
from engine.core.options import Options
from engine.online.batcher import Batcher
from engine.online.request import Request

OK, UNAVAILABLE = int(FilterStatus.OK), int(FilterStatus.UNAVAILABLE)


class Needy(Filter):
    """Removes even rows; cannot judge for users whose rows are given, nor say how many to bring for anybody."""

    def __init__(self, unreadable) -> None:
        super().__init__(Options())
        self.unreadable = list(unreadable)
        self.asked: list[int] = []

    def overfetch(self, batch):
        raise StateUnavailableError("no answer")

    def keep(self, batch, candidates):
        self.asked.append(len(batch))
        if np.isin(batch.users, self.unreadable).any():
            raise StateUnavailableError("no answer")
        return candidates.rows % 2 == 1


class Twice(Needy):
    """Answers a batch of one with what does not fit."""

    def keep(self, batch, candidates):
        if len(batch) == 1:
            return np.ones(candidates.rows.size + 1, np.bool_)
        return super().keep(batch, candidates)


def world_of(needy, fail_open=("needy",), **more):
    return make_world(
        quotas={"rest": 8},
        limit=8,
        fallback=(),
        filters=("seen", "needy", "excluded"),
        more_filters={"needy": needy},
        fail_open=fail_open,
        **more,
    )


def run_of(world, *requests):
    return world.replica.pipelines["default"].run(list(requests))


def rows_of(run, q):
    return run.merged.rows[run.merged.offsets[q] : run.merged.offsets[q + 1]].tolist()


def test_a_scene_that_fails_open_goes_on_without_the_filter_for_whom_it_cannot_judge():
    world = world_of(Needy([1]))
    run = run_of(world, Request(user_id=1), Request(user_id=2, excluded=np.array([103])), Request())
    assert run.filter_status.tolist() == [[OK] * 3, [OK, UNAVAILABLE, OK], [OK] * 3]
    assert run.refused == {}
    # User 2, row 1, saw rows 1 and 7: only the other filters judged. Of the others only odd rows are left.
    assert rows_of(run, 1) == [0, 2, 4, 5, 6, 8, 9, 10]
    assert rows_of(run, 0) == [1, 3, 5, 7, 9]
    assert rows_of(run, 2) == [1, 3, 5, 7]
    assert run.removed.tolist() == [[2, 2, 0], [3, 0, 4], [0, 1, 0]]


def test_a_scene_that_fails_closed_refuses_those_alone():
    world = world_of(Needy([1, 3]), fail_open=("exposure",))
    run = run_of(world, *(Request(user_id=u) for u in (1, 2, 3, 4)))
    assert sorted(run.refused) == [1, 3]
    assert str(run.refused[1]) == "filter 'needy': no answer"
    assert rows_of(run, 0) == [1, 3, 5, 7, 9]


def test_the_filter_is_asked_once_more_per_query_and_not_where_there_is_only_one():
    needy = Needy([1])
    run_of(world_of(needy), Request(user_id=2))
    assert needy.asked == [1]
    needy.asked.clear()
    run_of(world_of(needy), Request(user_id=2), Request(user_id=3))
    assert needy.asked == [2, 1, 1]


def test_the_candidates_of_fallback_channels_are_refused_too():
    world = make_world(
        quotas={"rest": 2},
        limit=30,
        fallback=("top",),
        filters=("needy",),
        more_filters={"needy": Needy([-1])},
    )
    run = run_of(world, Request(), Request(user_id=1))
    assert sorted(run.refused) == [0]
    assert set(rows_of(run, 1)) == set(range(1, ITEMS, 2))


def test_an_answer_that_does_not_fit_is_loud_where_a_query_is_asked_alone_too():
    with pytest.raises(ContractError, match="filter 'needy'"):
        run_of(world_of(Twice([1])), Request(user_id=1), Request(user_id=2))


def test_the_log_says_it_once_a_minute(caplog):
    world = world_of(Needy([0, 1]))
    with caplog.at_level(logging.WARNING, "engine.online.mask"):
        for _ in range(3):
            run_of(world, Request(user_id=1), Request(user_id=2))
    assert [record.getMessage() for record in caplog.records] == [
        "filter needy: no answer; the scene goes on without it"
    ]


def test_what_each_filter_removed_is_known_once_per_item_and_for_the_first_filter_alone():
    world = make_world(
        quotas={"rest": 10, "top": 40},
        limit=10,
        fallback=("similar",),
        filters=("seen", "excluded", "needy"),
        more_filters={"needy": Needy([])},
    )
    run = run_of(world, Request(), Request(user_id=3, excluded=np.array([102, 103, 105]), limit=50))
    removed = [rows.tolist() for rows in run.removed_rows(1)]
    assert removed == [[2, 8], [3, 5], [row for row in range(0, ITEMS, 2) if row not in (2, 8)]]
    # Rest and top propose all of them, and the fallback 3 and 5 once more: each counts.
    assert run.removed[:2, 1].tolist() == [4, 6]


async def test_a_refused_request_is_unavailable_and_names_the_filter():
    world = world_of(Needy([1]), fail_open=())
    async with serving(world) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.recall(user_id=2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "filter 'needy': no answer"
        result = await client.recall(user_id=1)
    assert {report.filter: report.status for report in result.filters} == {
        "seen": "OK",
        "needy": "OK",
        "excluded": "OK",
    }


async def test_a_refused_request_is_not_computed_again_and_its_neighbours_are_answered(caplog):
    gate = Gate()
    world = make_world(
        extra={"gate": gate},
        quotas={"gate": 5},
        fallback=(),
        filters=("needy",),
        more_filters={"needy": Needy([1])},
    )
    batcher = Batcher(world.replica, 16, 100)
    try:
        gate.open.clear()
        calls = [asyncio.create_task(submit(batcher, "default", Request(user_id=9), "first"))]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        calls += [
            asyncio.create_task(submit(batcher, "default", Request(user_id=u), str(u))) for u in (1, 2, 3)
        ]
        await asyncio.sleep(0.01)
        gate.open.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        await batcher.close()
    assert [type(outcome) for outcome in outcomes] == [bytes, bytes, StateUnavailableError, bytes]
    assert gate.batches == [1, 3]
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("kind", ["int64", "string"])
async def test_the_answer_says_which_filters_were_gone_without_and_debug_what_they_removed(kind):
    world = world_of(Needy([2]), kind=kind)
    async with serving(world) as client:
        excluded = [world.item(0), world.item(999)]
        result = await client.recall(**world.user(2), exclude=excluded, debug=True)
        assert {report.filter: report.status for report in result.filters} == {
            "seen": "OK",
            "needy": "UNAVAILABLE",
            "excluded": "OK",
        }
        assert result.debug is not None
        assert result.debug.removed == {
            "seen": (world.item(2), world.item(8)),
            "needy": (),
            "excluded": (world.item(0),),
        }
        judged = await client.recall(**world.user(1), debug=True)
        assert judged.debug is not None
        # Deep enough for the two seen: rows 0 to 9.
        assert judged.debug.removed["needy"] == tuple(world.items([0, 2, 4, 6, 8]))
        assert (await client.recall(**world.user(1))).debug is None
