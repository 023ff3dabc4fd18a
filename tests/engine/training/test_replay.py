"""What streaming VQ remembers of earlier impressions, and learns again."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the extra train")

from engine.models.encoded import EncodedUsers
from engine.training.impressions import ImpressionBatch
from engine.training.replay import Memory, packed


def batch_of(n, first, width=3):
    """Impressions whose every part says which one it is."""
    which = np.arange(first, first + n, dtype=np.int32)
    many = packed([np.full(each % 3, each, np.int32) for each in which.tolist()])
    sequence = np.zeros((n, width), np.int32)
    sequence[:, -2:] = which[:, None] + 1
    users = EncodedUsers(
        which[:, None], (many,), which[:, None].astype(np.float32), sequence, np.full(n, 2, np.int32)
    )
    return ImpressionBatch(which, users, which, which[:, None].astype(np.float32), which.astype(np.int64))


def assert_whole(batch, read):
    users, which = batch.encoded, batch.items
    for part in (batch.users, batch.rewards[:, 0], batch.timestamps, users.codes[:, 0], users.numbers[:, 0]):
        np.testing.assert_array_equal(part, which)
    wanted = np.zeros((which.size, read), np.int32)
    wanted[:, -2:] = which[:, None] + 1
    np.testing.assert_array_equal(users.sequence, wanted)
    np.testing.assert_array_equal(users.lengths, 2)
    many = users.multi[0]
    bounds = zip(many.offsets[:-1], many.offsets[1:], strict=True)
    for each, (begin, end) in zip(which.tolist(), bounds, strict=True):
        assert many.codes[begin:end].tolist() == [each] * (each % 3)


def test_what_is_drawn_stands_behind_the_batch_with_all_that_belongs_to_it():
    memory, random = Memory(40, 5), np.random.default_rng(0)
    for step, width in enumerate((3, 5, 9, 2)):
        batch = batch_of(10, 10 * step, width)
        mixed = memory.draw(batch, 6, random)
        assert len(mixed) == (16 if step else 10)
        np.testing.assert_array_equal(mixed.items[:10], batch.items)
        assert (mixed.items[10:] < 10 * step).all()
        if step:
            assert_whole(mixed, 5)
        memory.keep(batch, random)
    assert len(memory) == 40
    assert memory.draw(batch, 0, random) is batch


def test_a_full_memory_forgets_the_old_and_goes_on_from_its_state_alike():
    memory, random = Memory(25, 5), np.random.default_rng(1)
    for step in range(40):
        memory.keep(batch_of(10, 10 * step), random)
    assert len(memory) == 25
    other = Memory(25, 5)
    other.load(memory.state())
    drawn = []
    for each in (memory, other):
        random = np.random.default_rng(2)
        each.keep(batch_of(7, 400), random)
        drawn.append(each.draw(batch_of(10, 500), 200, random))
        assert_whole(drawn[-1], 5)
    np.testing.assert_array_equal(drawn[0].items, drawn[1].items)
    assert 300 < drawn[0].items.mean() < 500  # the mean age is a few batches
    with pytest.raises(ValueError, match="room for 24"):
        Memory(24, 5).load(memory.state())
