"""Channels that run beside the compute, and whatever they do wrong: the others and the neighbours answer as ever."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from online_world import ITEMS, USERS, Similar, Top, World, make_world, serving, user_id

from engine.config import BreakerConfig, SceneConfig
from engine.core.candidates import CandidateBatch, ChannelStatus
from engine.core.channel import Channel
from engine.core.options import Options
from engine.online.answered import Answered
from engine.online.beside import Beside, Guard, Guards
from engine.online.breaker import BreakerState
from engine.online.metrics import Metrics
from engine.online.pipeline import Pipeline
from engine.online.request import Request
from engine.online.run import Run

OK, EMPTY, TIMEOUT, ERROR, SKIPPED, GATED = (int(status) for status in ChannelStatus)
SECONDS = 60.0
"""Deadline of channels that are expected to answer."""


class Inline(Top):
    inline = True


class Plain(Top):
    """Answers as it should, beside."""


class Waiting(Channel):
    """Answers as `Top`, as a coroutine."""

    def __init__(self) -> None:
        super().__init__(Options())
        self.top = Top(Options())

    async def recall_batch_async(self, batch, k):
        await asyncio.sleep(0)
        return self.top.recall_batch(batch, k)


class Answers(Channel):
    """Returns what a function makes of a good answer."""

    def __init__(self, spoil) -> None:
        super().__init__(Options())
        self.spoil = spoil
        self.top = Top(Options())

    def recall_batch(self, batch, k):
        return self.spoil(self.top.recall_batch(batch, k))


class Hangs(Channel):
    """Waits until it is let go, then answers."""

    def __init__(self) -> None:
        super().__init__(Options())
        self.go = threading.Event()
        self.entered = threading.Event()
        self.updates: list[tuple[int, str]] = []
        self.asked = 0

    def recall_batch(self, batch, k):
        self.asked += 1
        self.entered.set()
        self.go.wait(2 * SECONDS)
        return Top(Options()).recall_batch(batch, k)

    def update(self, rows):
        self.updates.append((rows.size, threading.current_thread().name))


class HangsAsync(Channel):
    def __init__(self) -> None:
        super().__init__(Options())
        self.cancelled = threading.Event()
        self.hang = True

    async def recall_batch_async(self, batch, k):
        if self.hang:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return Top(Options()).recall_batch(batch, k)


class Guarded:
    """A pipeline of an inline channel and one that is looked at, in a world drawn by hand."""

    def __init__(self, channel: Channel, deadline: float = SECONDS, **scene) -> None:
        self.world = make_world()
        channels = {"inline": Inline(Options()), "plugin": channel, "similar": Similar(Options())}
        rules = BreakerConfig(failures=3, calls=5, open_seconds=SECONDS, jitter=0.0)
        deadlines = {"plugin": deadline}
        self.guards = Guards(
            {
                name: Guard(name, each, rules, deadlines.get(name, SECONDS) * 1e3)
                for name, each in channels.items()
            }
        )
        hydrator = self.world.replica.pipelines["default"]._hydrator
        config = SceneConfig(
            **{"quotas": {"inline": 5, "plugin": 5}, "limit": 10, "fallback": (), "filters": ()} | scene
        )
        self.pipeline = Pipeline(config, channels, {}, hydrator, 2.0, self.guards)

    def run(self, *users: int, deadline: float = np.inf, degraded: int = 0) -> Run:
        requests = [Request(user_id=user_id(user), deadline=deadline) for user in users or (0, 1, 2)]
        return self.pipeline.run(requests, degraded)

    def close(self) -> None:
        self.guards.close()


@pytest.fixture
def guarded():
    made: list[Guarded] = []

    def make(channel: Channel, **options) -> Guarded:
        made.append(Guarded(channel, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(run: Run, q: int) -> list[int]:
    return run.merged.rows[run.merged.offsets[q] : run.merged.offsets[q + 1]].tolist()


def without_the_plugin() -> list[int]:
    return list(range(ITEMS - 1, ITEMS - 11, -1))


def same(run: Run, other: Run) -> None:
    assert run.status.tolist() == other.status.tolist()
    assert run.merged.rows.tobytes() == other.merged.rows.tobytes()
    assert run.merged.scores.tobytes() == other.merged.scores.tobytes()
    assert run.merged.offsets.tolist() == other.merged.offsets.tolist()


@pytest.mark.parametrize("channel", [Plain(Options()), Waiting()], ids=["thread", "coroutine"])
def test_one_that_behaves_answers_as_if_it_were_inline(guarded, channel):
    inline = guarded(Inline(Options())).run()
    beside = guarded(channel)
    for _ in range(3):
        same(beside.run(), inline)


def test_without_guards_a_coroutine_is_waited_for_on_the_thread_that_asks(guarded):
    made = guarded(Waiting())
    channels = dict(zip(made.pipeline.channel_names, made.pipeline.channels, strict=True))
    plain = Pipeline(made.pipeline.scene, channels, {}, made.pipeline._hydrator)
    same(plain.run([Request(user_id=user_id(user)) for user in range(3)]), made.run())


def batch_with(answer: CandidateBatch, **columns) -> CandidateBatch:
    return answer._replace(**columns)


def repeated(answer: CandidateBatch) -> CandidateBatch:
    changed = answer.rows.copy()
    changed[1] = changed[0]
    return batch_with(answer, rows=changed)


def set_first(column: str, value: float):
    def spoil(answer: CandidateBatch) -> CandidateBatch:
        changed = getattr(answer, column).copy()
        changed[:1] = value
        return batch_with(answer, **{column: changed})

    return spoil


def exits(answer):
    raise SystemExit(3)


def cancels(answer):
    raise asyncio.CancelledError


class UnprintableError(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no")


def unprintable(answer):
    raise UnprintableError


def raises(text: str):
    def spoil(answer):
        raise RuntimeError(text)

    return spoil


SPOILED = {
    "raises": (raises("on fire"), "on fire"),
    "exits": (exits, "SystemExit"),
    "cancels": (cancels, "CancelledError"),
    "unprintable": (unprintable, "UnprintableError"),
    "long message": (raises("x" * 100_000), "..."),
    "surrogates": (raises("\ud800"), "RuntimeError"),
    "nothing": (lambda answer: None, "expected a CandidateBatch of arrays, got NoneType"),
    "single candidates": (lambda answer: answer.query(0), "got Candidates"),
    "lists": (lambda answer: batch_with(answer, rows=answer.rows.tolist()), "must be arrays"),
    "list of offsets": (lambda answer: batch_with(answer, offsets=answer.offsets.tolist()), "must be arrays"),
    "int64 rows": (lambda answer: batch_with(answer, rows=answer.rows.astype(np.int64)), "int32"),
    "float64 scores": (lambda answer: batch_with(answer, scores=answer.scores.astype(float)), "float32"),
    "objects": (lambda answer: batch_with(answer, rows=answer.rows.astype(object)), "int32"),
    "2-d": (lambda answer: batch_with(answer, rows=answer.rows[:, None]), "1-d"),
    "float offsets": (
        lambda answer: batch_with(answer, offsets=answer.offsets.astype(float)),
        "offsets must be int64",
    ),
    "int32 offsets": (
        lambda answer: batch_with(answer, offsets=answer.offsets.astype(np.int32)),
        "offsets must be int64",
    ),
    "short offsets": (lambda answer: batch_with(answer, offsets=answer.offsets[:-1]), "offsets"),
    "offsets beyond": (lambda answer: batch_with(answer, offsets=answer.offsets * 7), "offsets"),
    "negative offsets": (lambda answer: batch_with(answer, offsets=answer.offsets - 1), "offsets"),
    "short scores": (lambda answer: batch_with(answer, scores=answer.scores[:-1]), "one length"),
    "too many": (lambda answer: CandidateBatch.of([answer.query(0)] * 99), "offsets"),
    "NaN": (set_first("scores", np.nan), "finite"),
    "infinite": (set_first("scores", np.inf), "finite"),
    "rising": (set_first("scores", -5.0), "must not increase"),
    "row beyond": (set_first("rows", ITEMS), "outside the catalogue"),
    "negative row": (set_first("rows", -1), "outside the catalogue"),
    "trigger": (set_first("triggers", -2), "negative trigger"),
    "repeated": (repeated, "a row twice"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_whatever_one_returns_is_its_own_failure(guarded, caplog, spoiled):
    caplog.set_level(logging.CRITICAL)  # the reports of a parallel run cannot carry surrogates
    spoil, text = SPOILED[spoiled]
    made = guarded(Answers(spoil))
    run = made.run()
    assert run.status[:, 0].tolist() == [OK, ERROR]
    for q in range(3):
        assert rows(run, q) == without_the_plugin()
        assert text in run.messages[1, q] if run.status[1, q] == ERROR else True
        run.messages.get((1, q), "").encode()
        assert len(run.messages.get((1, q), "")) < 1000


@pytest.mark.parametrize("inline", [False, True])
def test_one_bad_query_costs_its_neighbours_nothing(guarded, inline):
    class BadForOne(Top):
        def recall(self, query, k):
            if query.user == 1:
                raise RuntimeError("not this one")
            return super().recall(query, k)

    BadForOne.inline = inline
    run = guarded(BadForOne(Options())).run()
    assert run.status.tolist() == [[OK] * 3, [OK, ERROR, OK]]
    same_as = guarded(Inline(Options())).run()
    for q in (0, 2):
        assert rows(run, q) == rows(same_as, q)


def test_one_that_asks_for_more_memory_than_k_is_not_copied(guarded):
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (1 << 40,), (0,))

    def spoil(answer):
        return CandidateBatch(huge, huge.view(np.float32), huge, np.array([0, 0, 0, 1 << 40], np.int64))

    run = guarded(Answers(spoil)).run()
    assert run.status[1].tolist() == [ERROR] * 3


def test_what_is_written_into_an_answer_later_changes_nothing(guarded):
    kept: list[CandidateBatch] = []

    def keep(answer):
        kept.append(answer)
        return answer

    made = guarded(Answers(keep))
    run = made.run()
    before = run.columns.fan_out.rows.copy()
    kept[0].rows[:] = 1 << 30
    assert (run.columns.fan_out.rows == before).all()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_writes_into_its_question_fails_alone(guarded, asynchronous):
    class Writes(Similar):
        def recall_batch(self, batch, k):
            for column in (
                batch.history.rows,
                batch.history.offsets,
                batch.users,
                batch.now,
                batch.excluded.rows,
            ):
                with pytest.raises(ValueError, match="read-only"):
                    column[...] = 1 << 20
            k[:] = 1 << 20
            batch.devices[0]["os"] = "changed"
            raise RuntimeError("tried")

    class WritesAsync(Writes):
        async def recall_batch_async(self, batch, k):
            return self.recall_batch(batch, k)

    made = guarded((WritesAsync if asynchronous else Writes)(Options()), quotas={"plugin": 5, "similar": 5})
    run, plain = made.run(), guarded(Inline(Options()), quotas={"similar": 5, "inline": 0}).run()
    assert run.status[:, 0].tolist() == [ERROR, OK]
    assert run.batch.devices == ({}, {}, {})
    assert run.returned[1].tolist() == plain.returned[0].tolist()


def test_a_thread_that_hangs_is_left_behind_and_comes_back(guarded):
    channel = Hangs()
    made = guarded(channel, deadline=0.02)
    run = made.run()
    assert run.status.tolist() == [[OK] * 3, [TIMEOUT] * 3]
    assert "no answer within" in run.messages[1, 0]
    assert rows(run, 0) == without_the_plugin()
    run = made.run()
    assert run.status[1].tolist() == [TIMEOUT] * 3
    assert "still at an earlier batch" in run.messages[1, 2]  # it is not waited for again
    assert channel.asked == 1
    channel.go.set()
    beside = made.guards["plugin"].beside
    assert beside is not None
    beside.deadline = SECONDS
    wait_until(lambda: not beside.busy_seconds())
    # What it answered meanwhile was for the first batch; this one is asked anew.
    run = made.run(3)
    assert run.status.tolist() == [[OK], [OK]]
    assert channel.asked == 2


def test_a_coroutine_that_hangs_is_cancelled_and_free_at_once(guarded):
    channel = HangsAsync()
    made = guarded(channel, deadline=0.02)
    run = made.run()
    assert run.status[1].tolist() == [TIMEOUT] * 3
    assert channel.cancelled.wait(SECONDS)
    beside = made.guards["plugin"].beside
    assert beside is not None
    beside.deadline = SECONDS
    channel.hang = False
    wait_until(lambda: not beside.busy_seconds())
    assert made.run().status[1].tolist() == [OK] * 3


def test_the_earliest_deadline_of_a_request_ends_the_waiting(guarded):
    channel = Hangs()
    made = guarded(channel)
    run = made.run(0, 1, deadline=time.monotonic() + 0.5)
    assert run.status.tolist() == [[OK] * 2, [TIMEOUT] * 2]
    assert made.guards["plugin"].breaker.quiet  # that was the caller's hurry, no failure of the channel
    channel.go.set()


def test_its_gate_runs_on_its_own_thread(guarded):
    names = []

    class Gated(Top):
        def enable(self, query):
            names.append(threading.current_thread().name)
            if query.user == 2:
                raise RuntimeError("gate")
            return query.user == 1

    run = guarded(Gated(Options())).run()
    assert run.status[1].tolist() == [GATED, OK, ERROR]
    assert "gate" in run.messages[1, 2]
    assert set(names) == {"channel plugin"}


def test_updates_wait_for_its_own_thread(guarded):
    channel = Hangs()
    made = guarded(channel, deadline=0.02)
    replica = replace(made.world.replica, channels={"plugin": channel}, guards=made.guards)
    made.run()
    for row in range(100):
        assert replica.update(np.array([row % 7], np.int32)) == []
    assert channel.updates == []  # it is still at its first batch
    channel.go.set()
    wait_until(lambda: channel.updates)
    assert {name for _, name in channel.updates} == {"channel plugin"}
    # More than a few were put together: each row is in it, and once.
    assert sum(size for size, _ in channel.updates) < 100
    assert max(size for size, _ in channel.updates) == 7


def test_an_update_that_fails_is_said_at_the_next(guarded, caplog):
    class Fails(Plain):
        def update(self, rows):
            raise RuntimeError("not now")

    made = guarded(Fails(Options()))
    replica = replace(made.world.replica, channels={"plugin": made.pipeline.channels[1]}, guards=made.guards)
    assert replica.update(np.zeros(1, np.int32)) == []
    wait_until(lambda: "failed to take note" in caplog.text)
    wait_until(lambda: replica.update(np.zeros(1, np.int32)) == ["plugin"])
    assert made.run().status[1].tolist() == [OK] * 3


def answered(made, run: Run) -> Answered:
    n = len(run.requests)
    return Answered("default", made.pipeline, run, "r-1", [""] * n, [""] * n, [0.0] * n, 0.0, 0.001)


@pytest.mark.parametrize("inline", [False, True])
def test_a_circuit_opens_and_closes_again(guarded, caplog, inline):
    class Sick(Top):
        sick = True
        asked = 0

        def recall_batch(self, batch, k):
            Sick.asked += 1
            if self.sick:
                raise RuntimeError("on fire")
            return super().recall_batch(batch, k)

    Sick.inline = inline
    channel = Sick(Options())
    made = guarded(channel)
    metrics = Metrics()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert made.run().status[1].tolist() == [ERROR] * 3
    asked = Sick.asked
    run = made.run()
    metrics.count(answered(made, run))
    assert Sick.asked == asked
    assert run.status[1].tolist() == [SKIPPED] * 3
    assert run.messages[1, 0] == "circuit open: RuntimeError('on fire')"
    assert rows(run, 0) == without_the_plugin()
    assert "its circuit is open" in caplog.text
    assert caplog.text.count("channel plugin failed") == 1  # not one for each request
    assert (
        metrics.registry.get_sample_value("recall_channel_breaker", {"channel": "plugin"})
        == BreakerState.OPEN
    )
    channel.sick = False
    let_time_pass(made)
    assert made.run().status[1].tolist() == [OK] * 3
    assert made.pipeline.breakers["plugin"].state is BreakerState.CLOSED
    assert "answers again" in caplog.text


def test_timeouts_open_the_circuit_too_and_are_counted(guarded):
    channel = Hangs()
    made = guarded(channel, deadline=0.01)
    metrics = Metrics()
    statuses = []
    for _ in range(5):
        run = made.run(0)
        metrics.count(answered(made, run))
        statuses.append(int(run.status[1, 0]))
        time.sleep(0.011)
    assert statuses[:3] == [TIMEOUT] * 3
    assert statuses[3] == SKIPPED
    labels = {"scene": "default", "channel": "plugin", "status": "timeout"}
    assert metrics.registry.get_sample_value("recall_channel_status_total", labels) >= 3
    channel.go.set()


def test_a_gate_that_shuts_everything_uses_up_no_probe(guarded):
    class Moody(Top):
        inline = True
        broken = True

        def enable(self, query):
            return query.user == 0

        def recall(self, query, k):
            if self.broken:
                raise RuntimeError("broken")
            return super().recall(query, k)

    channel = Moody(Options())
    made = guarded(channel)
    for _ in range(3):
        made.run(0)
    channel.broken = False
    let_time_pass(made)
    assert made.run(1).status[1].tolist() == [GATED]
    assert made.run(0).status[1].tolist() == [OK]
    assert made.pipeline.breakers["plugin"].state is BreakerState.CLOSED


def test_a_fallback_may_run_beside_too(guarded):
    made = guarded(Plain(Options()), quotas={"similar": 5}, fallback=("plugin",), limit=20)
    assert made.run().status.tolist() == [[OK] * 3] * 2


def test_warming_up_has_time_and_leaves_no_trace(guarded):
    channel = Hangs()
    made = guarded(channel, deadline=0.001)
    with made.guards.patient():
        for _ in range(4):
            channel.go.clear()
            threading.Timer(0.02, channel.go.set).start()
            assert made.run().status[1].tolist() == [OK] * 3
    channel.go.clear()
    assert made.run().status[1].tolist() == [TIMEOUT] * 3
    channel.go.set()


def test_closed_guards_end_their_threads(guarded):
    made = guarded(Waiting())
    made.run()
    beside: Beside | None = made.guards["plugin"].beside
    assert beside is not None
    assert beside._thread is not None
    made.close()
    beside._thread.join(SECONDS)
    assert not beside._thread.is_alive()


def test_steps_of_degrading(guarded):
    made = guarded(
        Plain(Options()),
        quotas={"similar": 4, "inline": 5, "plugin": 5},
        degrade=({"at": 0.5, "limit": 0.5}, {"at": 0.9, "limit": 0.25, "without": ("plugin",)}),
    )
    assert [made.pipeline.step_at(load) for load in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0, 7.0)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        2,
    ]
    lengths = []
    for step in range(3):
        run = made.run(0, degraded=step)
        lengths.append(len(rows(run, 0)))
        assert run.degraded == step
    assert lengths == [10, 5, 3]
    assert run.status[:, 0].tolist() == [OK, OK, GATED]
    assert run.messages == {(2, 0): "degraded"}
    assert run.quotas[:, 0].tolist() == [1, 2, 2]


async def test_over_grpc_a_plugin_that_hangs_costs_the_answer_its_deadline_and_no_more():
    class RaisesAsync(Channel):
        async def recall_batch_async(self, batch, k):
            raise ConnectionError("refused")

    hangs, raising = Hangs(), RaisesAsync(Options())
    base = make_world(
        extra={"hangs": hangs, "raising": raising}, quotas={"hangs": 5, "raising": 5, "top": 5}, fallback=()
    )
    guards = Guards(
        {
            name: Guard(name, channel, BreakerConfig(), 20.0 if name == "hangs" else 1e4)
            for name, channel in base.channels.items()
        }
    )
    replica = base.replica
    pipelines = {
        name: Pipeline(
            pipeline.scene, base.channels, dict(zip(pipeline.filter_names, pipeline._filters.filters, strict=True)),
            pipeline._hydrator, 2.0, guards,
        )
        for name, pipeline in replica.pipelines.items()
    }  # fmt: skip
    hangs.go.set()
    world = World(base.config, replace(replica, pipelines=pipelines, guards=guards), base.kind, base.channels)
    async with serving(world) as client:
        hangs.go.clear()
        results = await asyncio.gather(*(client.recall(user_id=user_id(user)) for user in range(USERS)))
        for result in results:
            assert len(result.candidates) == 10
            reports = {report.channel: report for report in result.channels}
            assert reports["hangs"].status in ("TIMEOUT", "SKIPPED")
            assert reports["hangs"].message
            assert reports["raising"].status == "ERROR"
            assert "ConnectionError('refused')" in reports["raising"].message
        hangs.go.set()
    guards.close()


def let_time_pass(made: Guarded) -> None:
    """As if the circuit of the plugin had been open for as long as it stays so."""
    made.guards["plugin"].breaker._open_until = 0.0


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
