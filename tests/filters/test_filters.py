from dataclasses import replace

import numpy as np

from engine.core.candidates import FanOut
from engine.core.options import Options
from engine.core.types import RaggedRows
from engine.testing import FilterContract, random_batch
from filters.excluded import Excluded
from filters.seen import Seen


class TestSeenContract(FilterContract):
    def filter(self):
        return Seen(Options())


class TestExcludedContract(FilterContract):
    def filter(self):
        return Excluded(Options())

    def batch(self):
        rng = np.random.default_rng(2)
        lists = [rng.choice(self.items, 8, replace=False).astype(np.int32) for _ in range(self.size)]
        return replace(super().batch(), excluded=RaggedRows.of(lists))


def test_seen_removes_the_history_and_excluded_removes_the_excluded():
    batch = random_batch(10, 5, 1, seed=3)
    batch = replace(batch, excluded=RaggedRows.of([np.array([9], np.int32)]))
    everything = FanOut(np.arange(10, dtype=np.int32), np.array([0, 10]), 1)
    kept = np.flatnonzero(Seen(Options()).keep(batch, everything))
    assert set(kept) == set(range(10)) - set(batch.history.rows.tolist())
    assert np.flatnonzero(~Excluded(Options()).keep(batch, everything)).tolist() == [9]
