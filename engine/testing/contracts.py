"""The contracts of channels and filters as test classes. Inherit one, name what is tested, and pytest does the rest.

from engine.testing import ChannelContract

class TestMyChannel(ChannelContract):
    items, users = 40, 60

    def channel(self):
        return built_channel(MyChannel, tiny_interactions(self.users, self.items))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from engine.core import channel as channels
from engine.core.candidates import CandidateBatch, FanOut, check_contract, check_distinct, own_copy
from engine.core.channel import Channel, gates, waits
from engine.core.filter import Filter
from engine.core.query import QueryBatch
from engine.core.types import AnyArray, BoolArray, Int32Array
from engine.testing.world import random_batch


def ask(channel: Channel, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
    """Ask a channel as the pipeline does: the gate first; one that is not inline gets arrays that cannot be written."""
    if not channel.inline:
        batch = batch.detached()
    if gates(channel):
        open_ = [channel.enable(batch.query(q)) for q in range(len(batch))]
        k = np.where(open_, k, 0).astype(np.int32)
    answer = channels.ask(channel, batch, k)
    return answer if channel.inline else own_copy(answer, k, type(channel).__name__)


class ChannelContract:
    """What every channel must do. Subclasses set the sizes and return a channel for a catalogue of that size."""

    items: int = 40
    users: int = 60
    size: int = 12

    def channel(self) -> Channel:
        """Return the channel under test."""
        raise NotImplementedError("return the channel under test")

    def batch(self) -> QueryBatch:
        """Return the queries it is asked; override where the channel needs context."""
        return random_batch(self.items, self.users, self.size)

    def test_its_answer_keeps_the_contract(self) -> None:
        """Rows within the catalogue, finite scores that never increase, no more than k."""
        channel, batch = self.channel(), self.batch()
        for most in (0, 1, 3, self.items, 10 * self.items):
            k = np.full(len(batch), most, np.int32)
            answer = ask(channel, batch, k)
            check_contract(answer, k, self.items, type(channel).__name__)

    def test_it_answers_something(self) -> None:
        """A channel that never answers passes every other test."""
        channel, batch = self.channel(), self.batch()
        answer = ask(channel, batch, np.full(len(batch), self.items, np.int32))
        assert answer.rows.size > 0, (
            "no query of the batch got a candidate; override batch() to make it answer"
        )

    def test_it_proposes_an_item_once(self) -> None:
        """Within a query no row comes twice."""
        channel, batch = self.channel(), self.batch()
        answer = ask(channel, batch, np.full(len(batch), self.items, np.int32))
        check_distinct(answer, type(channel).__name__)

    def test_it_leaves_its_question_as_it_was(self) -> None:
        """Whoever shares the batch reads the same arrays."""
        channel, batch = self.channel(), self.batch()
        k = np.full(len(batch), 5, np.int32)
        before = batch.detached()
        ask(channel, batch, k)
        assert k.tolist() == [5] * len(batch)
        for after, was in zip(_arrays(batch), _arrays(before), strict=True):
            assert after.tobytes() == was.tobytes()

    def test_its_answer_is_not_written_into_later(self) -> None:
        """What it returned for one batch stays as it is while it answers the next."""
        channel, batch = self.channel(), self.batch()
        k = np.full(len(batch), self.items, np.int32)
        first = ask(channel, batch, k)
        was = [column.tobytes() for column in (first.rows, first.scores, first.triggers, first.offsets)]
        ask(channel, batch.alone(len(batch) - 1), k[-1:])
        assert [
            column.tobytes() for column in (first.rows, first.scores, first.triggers, first.offsets)
        ] == was

    def test_an_inline_channel_waits_for_nothing(self) -> None:
        """A coroutine has no place on the thread that computes."""
        channel = self.channel()
        assert not (channel.inline and waits(channel)), "leave `inline` out, or recall_batch_async()"

    def test_a_batch_answers_as_its_queries_do_alone(self) -> None:
        """Bit for bit: who shares the batch must not matter."""
        channel, batch = self.channel(), self.batch()
        k = np.arange(len(batch), dtype=np.int32) % 7
        together = ask(channel, batch, k)
        for q in range(len(batch)):
            alone = ask(channel, batch.alone(q), k[q : q + 1])
            _same(together, q, alone)

    def test_it_answers_the_same_again(self) -> None:
        """Same query, same answer, bit for bit."""
        channel, batch = self.channel(), self.batch()
        k = np.full(len(batch), 5, np.int32)
        first, second = ask(channel, batch, k), ask(channel, batch, k)
        for q in range(len(batch)):
            _same(first, q, second, q)

    def test_a_longer_answer_begins_with_the_shorter_one(self) -> None:
        """Asking for more must not change what comes first."""
        channel, batch = self.channel(), self.batch()
        short = ask(channel, batch, np.full(len(batch), 3, np.int32))
        long = ask(channel, batch, np.full(len(batch), self.items, np.int32))
        for q in range(len(batch)):
            rows = short.query(q).rows
            assert long.query(q).rows[: rows.size].tolist() == rows.tolist()


class FilterContract:
    """What every filter must do. Subclasses set the size and return a filter for a catalogue of that size."""

    items: int = 40
    users: int = 60
    size: int = 6
    channels: int = 3

    def filter(self) -> Filter:
        """Return the filter under test."""
        raise NotImplementedError("return the filter under test")

    def batch(self) -> QueryBatch:
        """Return the queries whose candidates are filtered."""
        return random_batch(self.items, self.users, self.size)

    def fan_out(self) -> FanOut:
        """Return random candidates for the batch."""
        rng = np.random.default_rng(1)
        segments = self.channels * self.size
        lengths = rng.integers(0, 9, segments)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths))).astype(np.int64)
        rows: Int32Array = rng.integers(0, self.items, int(offsets[-1])).astype(np.int32)
        return FanOut(rows, offsets, self.size)

    def verdicts(self, fan_out: FanOut) -> BoolArray:
        """bool[m]: what the filter says; None, which is "all stay", written out."""
        keep = self.filter().keep(self.batch(), fan_out)
        return np.ones(fan_out.rows.size, np.bool_) if keep is None else keep

    def test_it_says_of_each_candidate_whether_it_stays(self) -> None:
        """bool[m], nothing else."""
        fan_out = self.fan_out()
        keep = self.verdicts(fan_out)
        assert keep.dtype == np.bool_
        assert keep.shape == fan_out.rows.shape

    def test_it_takes_an_empty_fan_out(self) -> None:
        """No candidates, no failure."""
        empty = FanOut(np.empty(0, np.int32), np.zeros(self.channels * self.size + 1, np.int64), self.size)
        assert self.verdicts(empty).size == 0

    def test_it_judges_an_item_alike_for_every_channel(self) -> None:
        """What a user must not see they must not see from any channel."""
        fan_out = self.fan_out()
        keep = self.verdicts(fan_out)
        owner = fan_out.query_of_candidate()
        for q in range(self.size):
            for row in np.unique(fan_out.rows[owner == q]):
                verdicts = keep[(owner == q) & (fan_out.rows == row)]
                assert verdicts.all() or not verdicts.any()

    def test_a_batch_is_judged_as_its_queries_are_alone(self) -> None:
        """Who shares the batch must not matter."""
        component, batch, fan_out = self.filter(), self.batch(), self.fan_out()
        together = self.verdicts(fan_out)
        for q in range(self.size):
            mine, positions = fan_out.alone(q)
            keep = component.keep(batch.alone(q), mine)
            alone = np.ones(positions.size, np.bool_) if keep is None else keep
            assert alone.tolist() == together[positions].tolist()

    def test_its_overfetch_covers_what_it_can_remove(self) -> None:
        """Removed distinct items per query never exceed what it said to bring more of, unless it is not bounded."""
        component, batch, fan_out = self.filter(), self.batch(), self.fan_out()
        more = component.overfetch(batch)
        assert more is None or (more.shape == (self.size,) and (more >= 0).all())
        if not component.bounded:
            return
        keep = self.verdicts(fan_out)
        owner = fan_out.query_of_candidate()
        for q in range(self.size):
            removed = np.unique(fan_out.rows[(owner == q) & ~keep]).size
            assert removed <= (0 if more is None else int(more[q]))


def _same(batch: CandidateBatch, q: int, other: CandidateBatch, other_q: int = 0) -> None:
    mine, theirs = batch.query(q), other.query(other_q)
    assert mine.rows.tolist() == theirs.rows.tolist()
    assert mine.scores.tobytes() == theirs.scores.tobytes()
    assert mine.triggers.tolist() == theirs.triggers.tolist()


def _arrays(value: Any) -> Iterator[AnyArray]:
    """Every array in a tree of dataclasses and tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _arrays(getattr(value, part.name))
