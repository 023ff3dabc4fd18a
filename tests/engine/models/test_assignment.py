"""Scores of paths and the assignment made of them, against plain Python that follows the paper's steps."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.channel import SilentProgress
from engine.core.errors import ConfigError
from engine.models import assignment
from engine.models.assignment import (
    add_own,
    add_scores,
    assign,
    empty_scores,
    moved_share,
    path_sizes,
    random_paths,
    scores_of,
    with_own,
)


def merged(recorded, found, kept, decay):
    """Steps 1 to 4 of section 3 for one example; both are dicts of path -> score."""
    least = min(recorded.values()) if len(recorded) == kept else np.float32(0)
    after = {}
    for path in {**recorded, **found}:
        old = recorded.get(path, least)
        after[path] = np.float32(decay * float(old) + float(found.get(path, 0)))
    best = sorted(after.items(), key=lambda entry: (-entry[1], entry[0]))[:kept]
    return dict(best)


examples = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.integers(0, 11), min_size=3, max_size=3, unique=True),
        st.lists(st.integers(1, 8), min_size=3, max_size=3),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(examples, st.integers(1, 5), st.sampled_from([0.999, 0.5, 1.0]), st.integers(1, 3))
def test_scores_pass_as_the_paper_has_it(given_examples, kept, decay, threads):
    items = np.array([item for item, _, _, _ in given_examples], np.int32)
    found = np.array([row for _, row, _, _ in given_examples], np.int64).reshape(-1, 3)
    found[[short for _, _, _, short in given_examples], -1:] = -1
    chances = np.array([row for _, _, row, _ in given_examples], np.float32).reshape(-1, 3) / 8
    expected = [{} for _ in range(4)]
    for item, row, chance in zip(items, found, chances, strict=True):
        new = {int(path): value for path, value in zip(row, chance, strict=True) if path >= 0}
        expected[item] = merged(expected[item], new, kept, decay)
    paths, scores = empty_scores(4, kept)
    half = len(given_examples) // 2
    with ThreadPoolExecutor(threads) as pool:
        for part in (slice(half), slice(half, None)):
            add_scores(paths, scores, items[part], found[part], chances[part], decay, pool, threads)
    for item in range(4):
        known = [(int(p), s) for p, s in zip(paths[item], scores[item], strict=True) if p >= 0]
        assert known == sorted(expected[item].items(), key=lambda entry: (-entry[1], entry[0]))
        assert (scores[item, len(known) :] == 0).all()


def descended(paths, scores, counts, per_item, penalty, passes, start):
    """Algorithm 2, an item's paths taken off together before they are chosen anew."""

    def cost(size):
        return penalty * ((size + 1) ** 4 - size**4) / 4

    chosen = [
        [] if row[0] >= 0 else [int(p) for p in first if p >= 0]
        for row, first in zip(paths, start, strict=True)
    ]
    sizes = {}
    for mine in chosen:
        for path in mine:
            sizes[path] = sizes.get(path, 0) + 1
    for _ in range(passes):
        for v, row in enumerate(paths):
            if row[0] < 0:
                continue
            for path in chosen[v]:
                sizes[path] -= 1
            chosen[v], total = [], 0.0
            for _ in range(per_item):
                best, highest = None, -math.inf
                for path, score in zip(row.tolist(), scores[v].tolist(), strict=True):
                    if path < 0 or path in chosen[v]:
                        continue
                    gain = counts[v] * math.log(total + score) - cost(sizes.get(path, 0))
                    if gain > highest + 1e-9:
                        best, highest = (path, score), gain
                if best is None:
                    break
                chosen[v].append(best[0])
                total += best[1]
            for path in chosen[v]:
                sizes[path] = sizes.get(path, 0) + 1
    return chosen


@st.composite
def worlds(draw):
    items, kept = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    top = draw(st.sampled_from([6, 40]))
    paths, scores = empty_scores(items, kept)
    for v in range(items):
        mine = draw(st.lists(st.integers(0, top), max_size=kept, unique=True))
        values = sorted(
            draw(st.lists(st.integers(1, 1000), min_size=len(mine), max_size=len(mine))), reverse=True
        )
        paths[v, : len(mine)], scores[v, : len(mine)] = mine, np.array(values, np.float32) / 7
    counts = np.array(draw(st.lists(st.integers(1, 50), min_size=items, max_size=items)), np.float64)
    per_item = draw(st.integers(1, kept))
    start = np.array([[v * 3 + j for j in range(per_item)] for v in range(items)], np.int64)
    return paths, scores, counts, per_item, start


@settings(max_examples=150, deadline=None)
@given(worlds(), st.sampled_from([0.0, 0.013, 1.7, 90.0]), st.integers(1, 4), st.booleans())
def test_the_descent_chooses_what_plain_loops_choose(world, penalty, passes, direct):
    paths, scores, counts, per_item, start = world
    codes = assignment.DIRECT_CODES
    try:
        assignment.DIRECT_CODES = codes if direct else 1
        got = assign(paths, scores, counts, per_item, penalty, passes, 1, SilentProgress(), start)
    finally:
        assignment.DIRECT_CODES = codes
    expected = descended(paths, scores, counts, per_item, penalty, passes, start)
    assert [[path for path in row if path >= 0] for row in got.tolist()] == expected


def crowded(items, seed=0):
    """Every item likes the same few paths best."""
    random = np.random.default_rng(seed)
    paths = np.argsort(random.random((items, 200)) ** 4 * np.arange(1, 201), 1)[:, :20].astype(np.int64)
    scores = -np.sort(-random.exponential(size=(items, 20)), 1).astype(np.float32)
    counts = random.integers(1, 30, items).astype(np.float64)
    return paths, scores, counts


def objective(paths, scores, counts, chosen, penalty):
    found = (paths[:, :, None] == chosen[:, None, :]).any(2)
    sizes = path_sizes(chosen)[1].astype(np.float64)
    return (counts * np.log((scores * found).sum(1))).sum() - penalty * (sizes**4 / 4).sum()


@pytest.mark.parametrize("per_item", [1, 3])
def test_passes_raise_the_objective(per_item):
    paths, scores, counts = crowded(400)
    start = np.full((400, per_item), -1, np.int64)
    values = [
        objective(
            paths, scores, counts,
            assign(paths, scores, counts, per_item, 0.03, passes, 1, SilentProgress(), start), 0.03,
        )
        for passes in (1, 2, 3, 5, 6)
    ]  # fmt: skip
    assert values[0] < values[1] < values[3]
    assert values[4] == pytest.approx(values[3], rel=1e-3)


def test_the_penalty_keeps_paths_small():
    paths, scores, counts = crowded(2000)
    start = np.full((2000, 3), -1, np.int64)
    largest = [
        path_sizes(assign(paths, scores, counts, 3, penalty, 4, 1, SilentProgress(), start))[1].max()
        for penalty in (0, 1e-6, 1e-4)
    ]
    assert largest[0] > largest[1] > largest[2]
    assert largest[2] < 0.6 * largest[0]  # the mean is 30


def test_lanes_do_nearly_as_well_as_one_and_do_not_depend_on_threads(monkeypatch):
    paths, scores, counts = crowded(3000)
    start = random_paths(3000, 3, 200, np.random.default_rng(1))
    paths[:50], scores[:50] = -1, 0
    one = assign(paths, scores, counts, 3, 1e-5, 4, 1, SilentProgress(), start)
    monkeypatch.setattr(assignment, "ONE_LANE_BELOW", 100)
    monkeypatch.setattr(assignment, "LANE_ITEMS", 64)
    for direct in (True, False):
        monkeypatch.setattr(assignment, "DIRECT_CODES", 1 << 20 if direct else 1)
        lanes = [
            assign(paths, scores, counts, 3, 1e-5, 4, threads, SilentProgress(), start)
            for threads in (1, 2, 5)
        ]
        assert np.array_equal(lanes[0], lanes[1])
        assert np.array_equal(lanes[0], lanes[2])
        ours, best = (
            objective(paths[50:], scores[50:], counts[50:], each[50:], 1e-5) for each in (lanes[0], one)
        )
        assert ours == pytest.approx(best, rel=0.01)
        assert np.array_equal(lanes[0][:50], start[:50])


def test_the_progress_is_told_of_every_item():
    class Told(SilentProgress):
        total = done = 0

        def start(self, task, total):
            self.total = total

        def advance(self, amount=1):
            self.done += amount

    told = Told()
    paths, scores, counts = crowded(70)
    assign(paths, scores, counts, 2, 1e-5, 3, 1, told, np.full((70, 2), -1, np.int64))
    assert told.done == told.total == 210


def test_more_paths_than_scores_are_refused():
    paths, scores, counts = crowded(5)
    with pytest.raises(ConfigError, match=r"paths: 21 paths are chosen among the 20 .*kept_paths"):
        assign(paths, scores, counts, 21, 0, 1, 1, SilentProgress(), np.full((5, 21), -1, np.int64))
    with pytest.raises(ConfigError, match="there are 2"):
        random_paths(5, 3, 2, np.random.default_rng(0))


def test_random_paths_of_an_item_differ():
    drawn = random_paths(500, 3, 4, np.random.default_rng(0))
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert set(drawn.ravel().tolist()) == {0, 1, 2, 3}
    assert random_paths(3, 2, 2**62, np.random.default_rng(0)).max() > 2**50


def test_what_moved_is_counted_whatever_the_order():
    before = np.array([[1, 2], [3, 4], [5, -1]])
    after = np.array([[2, 1], [3, 5], [5, -1]])
    assert moved_share(before, after) == pytest.approx(1 / 3)
    codes, sizes = path_sizes(after)
    assert codes.tolist() == [1, 2, 3, 5]
    assert sizes.tolist() == [1, 1, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_paths_that_an_item_has_stay_candidates(seed):
    random = np.random.default_rng(seed)
    items, kept, per_item = 4, 5, 2
    paths, scores = empty_scores(items, kept)
    for v in range(items):
        count = random.integers(0, kept + 1)
        paths[v, :count] = random.permutation(12)[:count]
        scores[v, :count] = np.sort(random.integers(1, 9, count))[::-1]
    mine = random_paths(items, per_item, 12, random)
    mine[random.random(items) < 0.3, 1] = -1
    own = np.where(mine >= 0, random.integers(0, 9, mine.shape), 0).astype(np.float32)
    codes, values = with_own(paths, scores, mine, own)
    found = np.empty_like(own)
    scores_of(mine, codes, values, found)
    for v in range(items):
        expected = {int(c): float(s) for c, s in zip(mine[v], own[v], strict=True) if c >= 0 and s > 0} | {
            int(c): float(s) for c, s in zip(paths[v], scores[v], strict=True) if c >= 0
        }
        pairs = [(int(c), float(s)) for c, s in zip(codes[v], values[v], strict=True) if c >= 0]
        assert dict(pairs) == expected
        assert len(pairs) == len(expected)
        assert [s for _, s in pairs] == sorted(expected.values(), reverse=True)
        assert found[v].tolist() == [expected.get(int(c), 0.0) for c in mine[v]]


def test_scores_of_own_paths_decay_and_add_up():
    own = np.array([[1, 2], [4, 0]], np.float32)
    add_own(own, np.array([0, 0], np.int32), np.array([[0.5, 0.25], [1, 0]], np.float32), 0.5)
    assert own.tolist() == [[(1 * 0.5 + 0.5) * 0.5 + 1, (2 * 0.5 + 0.25) * 0.5], [4, 0]]
