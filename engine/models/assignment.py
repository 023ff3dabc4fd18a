"""Which items are on which paths: scores of paths per item, kept while examples pass, and the assignment made of them.

Source: Gao et al. 2021, "Learning a Retrievable Structure for Large-Scale Recommendations" (Deep Retrieval), section 3.
s[v, c], the score of path c for item v, is the sum over the examples whose label is v of p(c | user). Of each item the S
best are kept, the others count as 0. Both lists of an item stand best first, -1 and 0 where there are fewer.

Where this deviates from the paper:

- *min_score* of an item that has fewer than S paths yet is 0: what is not recorded scores 0.
- The M-step takes all J paths of an item off before it chooses them anew, as the objective has it (the item's paths
  given those of all others); algorithm 2 takes the j-th off when it chooses the j-th, so that an item can be kept from
  a path by being there itself.
- Of the first path, whose gain is over the log of an empty sum, only N_v log s[v, c] is compared: the rest is the same
  for all paths.
- An item without scores keeps the paths that it has; they count in the sizes.
- The paths that an item has stay candidates, whatever their scores (`with_own`). The beams of all users are full of the
  paths of what is popular, and so are then the S best of every item: where these were the only candidates the items
  crowded on a few dozen paths, and no penalty had anywhere else to send them.
- Large catalogues are done in lanes, side by side: see `assign`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numba import njit

from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.core.types import Float32Array, Float64Array, Int32Array, Int64Array

LANES = 4
"""Lanes of a large catalogue: what comes out depends on their number and not on that of the threads."""

LANE_ITEMS = 4096
"""Items that a lane does between two exchanges of path sizes: far fewer than the catalogue, so that lanes do not rush to
the same path unseen by each other; enough that an exchange costs little."""

ONE_LANE_BELOW = 100_000
"""Catalogues of fewer items are done in one lane, exactly as the algorithm says."""

DIRECT_CODES = 1 << 27
"""Sizes of paths stand at the paths' codes where these are smaller, else at their places among the codes in use."""


def empty_scores(items: int, kept: int) -> tuple[Int64Array, Float32Array]:
    """Return lists of no path: int64[items, kept] of -1 and float32[items, kept] of 0."""
    return np.full((items, kept), -1, np.int64), np.zeros((items, kept), np.float32)


def random_paths(items: int, per_item: int, paths: int, random: np.random.Generator) -> Int64Array:
    """Return int64[items, per_item]: codes below `paths`, distinct within an item.

    Raises:
        ConfigError: there are fewer paths than that.
    """
    if per_item > paths:
        raise ConfigError(
            f"an item has {per_item} paths, and there are {paths}: take more width or depth", "paths"
        )
    drawn = random.integers(0, paths, (items, per_item))
    while True:
        in_order = np.sort(drawn, 1)
        again = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(1))
        if not again.size:
            return drawn
        drawn[again] = random.integers(0, paths, (again.size, per_item))


def add_scores(
    paths: Int64Array,
    scores: Float32Array,
    items: Int32Array,
    found: Int64Array,
    probabilities: Float32Array,
    decay: float,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
) -> None:
    """Take examples into the scores of their items (section 3, steps 1 to 4), in the order of the examples.

    Args:
        paths, scores: int64[items, S] and float32[items, S], changed in place.
        items: int32[n], the label of each example.
        found: int64[n, B], the paths that beam search found for its user, distinct; -1 is none.
        probabilities: float32[n, B], above 0.
        decay: eta.
        pool: threads to share the items among; an item's examples stay together, so that nothing depends on it.
        threads: how many those are.
    """
    if not items.size:
        return
    order = np.argsort(items, kind="stable")
    begins = np.flatnonzero(np.diff(items[order], prepend=-1))
    begins = np.append(begins, items.size)
    arguments = (begins, order, items, found, probabilities, decay, paths, scores)
    parts = min(threads, begins.size - 1) if pool is not None else 1
    cuts = [round(each) for each in np.linspace(0, begins.size - 1, parts + 1).tolist()]
    if pool is None or parts == 1:
        merge_scores(0, begins.size - 1, *arguments)
        return
    for task in [pool.submit(merge_scores, *cut, *arguments) for cut in pairwise(cuts)]:
        task.result()


@njit(nogil=True, cache=True)
def merge_scores(first, last, begins, order, items, found, probabilities, decay, paths, scores):  # type: ignore[no-untyped-def]
    """Do the items first to last - 1 of a batch; item g's examples are order[begins[g]:begins[g + 1]], in turn.

    Of equal scores the smaller code is kept. Sums are float64, rounded once per example.
    """
    kept, width = paths.shape[1], found.shape[1]
    codes = np.empty(kept + width, np.int64)
    values = np.empty(kept + width, np.float32)
    for g in range(first, last):
        item = items[order[begins[g]]]
        path, score = paths[item], scores[item]
        for at in range(begins[g], begins[g + 1]):
            new, chance = found[order[at]], probabilities[order[at]]
            count = 0
            while count < kept and path[count] >= 0:
                codes[count] = path[count]
                values[count] = np.float32(decay * np.float64(score[count]))
                count += 1
            least = decay * np.float64(score[kept - 1]) if count == kept else 0.0
            recorded = count
            for b in range(width):
                if new[b] < 0:
                    continue
                here = -1
                for k in range(recorded):
                    if codes[k] == new[b]:
                        here = k
                        break
                if here >= 0:
                    values[here] = np.float32(decay * np.float64(score[here]) + np.float64(chance[b]))
                else:
                    codes[count] = new[b]
                    values[count] = np.float32(least + np.float64(chance[b]))
                    count += 1
            filled = 0
            for k in range(count):
                code, value = codes[k], values[k]
                place = filled
                while place > 0 and (
                    value > score[place - 1] or (value == score[place - 1] and code < path[place - 1])
                ):
                    place -= 1
                if place >= kept:
                    continue
                filled = min(filled + 1, kept)
                for j in range(filled - 1, place, -1):
                    path[j], score[j] = path[j - 1], score[j - 1]
                path[place], score[place] = code, value


@njit(nogil=True, cache=True)
def add_own(own, items, probabilities, decay):  # type: ignore[no-untyped-def]
    """Take examples into the scores of the paths that their items have, as `add_scores` does into the lists.

    Args:
        own: float32[items, J], changed in place.
        items: int32[n], the label of each example; probabilities: float32[n, J], of its paths; decay: eta.
    """
    for i in range(items.size):
        mine = own[items[i]]
        for j in range(mine.size):
            mine[j] = np.float32(decay * np.float64(mine[j]) + np.float64(probabilities[i, j]))


def with_own(
    paths: Int64Array, scores: Float32Array, assignment: Int64Array, own: Float32Array
) -> tuple[Int64Array, Float32Array]:
    """Return the lists of candidates with the paths that the items have among them: [items, S + J], best first.

    Args:
        paths, scores: [items, S], as `add_scores` leaves them. A path that stands there has that score.
        assignment: int64[items, J], -1 where there are fewer; own: float32[items, J], 0 where nothing is known.
    """
    items, kept = paths.shape
    wider = kept + assignment.shape[1]
    codes, values = np.full((items, wider), -1, np.int64), np.zeros((items, wider), np.float32)
    _with_own(paths, scores, assignment, own, codes, values)
    return codes, values


@njit(nogil=True, cache=True)
def _with_own(paths, scores, assignment, own, codes, values):  # type: ignore[no-untyped-def]
    for v in range(paths.shape[0]):
        code, value = codes[v], values[v]
        count = 0
        while count < paths.shape[1] and paths[v, count] >= 0:
            code[count], value[count] = paths[v, count], scores[v, count]
            count += 1
        listed = count
        for j in range(assignment.shape[1]):
            new, score = assignment[v, j], own[v, j]
            known = new < 0 or score <= 0
            for k in range(listed):
                known |= paths[v, k] == new
            if known:
                continue
            place = count
            while place > 0 and (
                score > value[place - 1] or (score == value[place - 1] and new < code[place - 1])
            ):
                code[place], value[place] = code[place - 1], value[place - 1]
                place -= 1
            code[place], value[place] = new, score
            count += 1


@njit(nogil=True, cache=True)
def scores_of(assignment, paths, scores, own):  # type: ignore[no-untyped-def]
    """Write the score of each path that an item has, 0 where the lists lack it: float32[items, J]."""
    for v in range(assignment.shape[0]):
        for j in range(assignment.shape[1]):
            own[v, j] = 0
            for k in range(paths.shape[1]):
                if assignment[v, j] >= 0 and paths[v, k] == assignment[v, j]:
                    own[v, j] = scores[v, k]


def assign(
    paths: Int64Array,
    scores: Float32Array,
    counts: Float64Array,
    per_item: int,
    penalty: float,
    passes: int,
    threads: int,
    progress: Progress,
    start: Int64Array,
) -> Int64Array:
    """Choose each item's paths by coordinate descent (section 3, algorithm 2).

    Maximises sum over v of N_v log sum_j s[v, c_j] - penalty * sum over c of |c|^4 / 4, item by item, and for an item
    path by path, by gain: N_v (log(sum + s) - log(sum)) - penalty (f(|c| + 1) - f(|c|)); of equal gains the better score.
    The sizes begin at those of the items without scores.

    A catalogue of `ONE_LANE_BELOW` items or more is cut into `LANES` stretches of items that are gone through side by
    side. A lane sees its own choices at once and those of the others after each `LANE_ITEMS` items. The result does not
    depend on `threads`, which only says how many lanes run at a time.

    Args:
        paths, scores: int64[items, S] and float32[items, S], best first, as `add_scores` leaves them.
        counts: float64[items], N_v: examples of each item.
        per_item: J.
        penalty: alpha; 0: none.
        passes: over the items, 3 to 5 suffice.
        threads: cores to use.
        progress: told of the items.
        start: int64[items, J]: the paths of items without scores, and all that an item with fewer than J scores gets.

    Returns:
        int64[items, J]: codes in the order chosen; an item with fewer than J scored paths has these alone, -1
        behind them.

    Raises:
        ConfigError: J exceeds S.
    """
    items, kept = paths.shape
    if per_item > kept:
        raise ConfigError(
            f"{per_item} paths are chosen among the {kept} whose scores are kept (kept_paths): they are too few",
            "paths",
        )
    lanes = 1 if items < ONE_LANE_BELOW else LANES
    codes = np.empty(0, np.int64)
    slots, chosen = paths, np.full((items, per_item), -1, np.int64)
    unscored = paths[:, 0] < 0
    chosen[unscored] = start[unscored]
    most = max(int(paths.max(initial=-1)), int(chosen.max(initial=-1))) + 1
    if most > DIRECT_CODES:
        codes = np.unique(np.concatenate([paths.ravel(), chosen[unscored].ravel()]))
        codes = codes[np.searchsorted(codes, 0) :]
        slots = _places(codes, paths)
        chosen[unscored] = _places(codes, chosen[unscored])
        most = codes.size
    sizes = np.zeros((lanes, most), np.int32)
    settled = chosen[unscored]
    sizes[:] = np.bincount(settled[settled >= 0], minlength=most).astype(np.int32)
    del settled

    bounds = np.linspace(0, items, lanes + 1).astype(np.int64).tolist()
    longest = max(end - begin for begin, end in pairwise(bounds))
    before = np.empty((lanes, LANE_ITEMS, per_item), np.int64)
    progress.start("paths of items", items * passes)
    with ThreadPoolExecutor(min(threads, lanes), thread_name_prefix="build") as pool:
        for _ in range(passes):
            for done in range(0, longest, LANE_ITEMS):
                parts = [
                    (min(begin + done, end), min(begin + done + LANE_ITEMS, end))
                    for begin, end in pairwise(bounds)
                ]
                for lane, (first, last) in enumerate(parts):
                    before[lane, : last - first] = chosen[first:last]
                tasks = [
                    pool.submit(descend, first, last, slots, scores, counts, penalty, sizes[lane], chosen)
                    for lane, (first, last) in enumerate(parts)
                ]
                for task in tasks:
                    task.result()
                if lanes > 1:
                    ends = np.array(parts, np.int64)
                    for task in [
                        pool.submit(catch_up, lane, ends, before, chosen, sizes[lane])
                        for lane in range(lanes)
                    ]:
                        task.result()
                progress.advance(sum(last - first for first, last in parts))
    if codes.size:
        chosen = np.where(chosen >= 0, codes[chosen], -1)
    return chosen


def _places(codes: Int64Array, paths: Int64Array) -> Int64Array:
    """Return where each path is among the codes, -1 where it is none."""
    return np.where(paths >= 0, np.searchsorted(codes, paths), -1)


# error_model: the check of each division for zero is not needed, and keeps loops from being vectorised.
@njit(nogil=True, cache=True, error_model="numpy")
def descend(first, last, paths, scores, counts, penalty, sizes, chosen):  # type: ignore[no-untyped-def]
    """Choose the paths of items first to last - 1 anew, in turn.

    Args:
        paths: int64[items, S], places in `sizes`, best score first, -1 where there are fewer; scores: float32[items, S].
        counts: float64[items]; penalty: alpha.
        sizes: int32[paths], changed in place; chosen: int64[items, J], likewise.
    """
    kept, per_item = paths.shape[1], chosen.shape[1]
    costs = np.empty(kept, np.float64)
    taken = np.empty(kept, np.bool_)
    for v in range(first, last):
        path, score, mine = paths[v], scores[v], chosen[v]
        if path[0] < 0:
            continue
        for j in range(per_item):
            if mine[j] >= 0:
                sizes[mine[j]] -= 1
            mine[j] = -1
        reached, total = 0, 0.0
        for j in range(per_item):
            best, highest = -1, -np.inf
            for k in range(kept):
                if path[k] < 0:
                    break
                if k < reached and taken[k]:
                    continue
                gain = counts[v] * np.log(total + np.float64(score[k]))
                # Scores fall from here on, and no path costs less than an empty one.
                if gain - penalty * 0.25 <= highest:
                    break
                if k == reached:
                    n = np.float64(sizes[path[k]])
                    # f(n + 1) - f(n) of f = n^4 / 4
                    costs[k] = penalty * (((n + 1.5) * n + 1.0) * n + 0.25)
                    taken[k] = False
                    reached += 1
                gain -= costs[k]
                if gain > highest:
                    best, highest = k, gain
            if best < 0:  # all that is left scores 0
                break
            taken[best] = True
            total += np.float64(score[best])
            sizes[path[best]] += 1
            mine[j] = path[best]


@njit(nogil=True, cache=True)
def catch_up(lane, parts, before, chosen, sizes):  # type: ignore[no-untyped-def]
    """Take into a lane's sizes what the other lanes changed since the last exchange.

    Args:
        lane: which; parts: int64[lanes, 2], the items that each lane did.
        before: int64[lanes, items of a part, J], what these items had; chosen: int64[items, J], what they have.
        sizes: int32[paths], of this lane, changed in place.
    """
    for other in range(parts.shape[0]):
        if other == lane:
            continue
        for v in range(parts[other, 0], parts[other, 1]):
            old, new = before[other, v - parts[other, 0]], chosen[v]
            for j in range(new.size):
                if old[j] != new[j]:
                    if old[j] >= 0:
                        sizes[old[j]] -= 1
                    if new[j] >= 0:
                        sizes[new[j]] += 1


def path_sizes(assignment: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the codes of the paths in use, rising, and how many items each has: int64[P] both."""
    codes, sizes = np.unique(assignment[assignment >= 0], return_counts=True)
    return codes, sizes.astype(np.int64)


def moved_share(before: Int64Array, after: Int64Array) -> float:
    """Return the share of the items whose set of paths is another one."""
    if not len(after):
        return 0.0
    return float((np.sort(before, 1) != np.sort(after, 1)).any(1).mean())
