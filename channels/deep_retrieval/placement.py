"""Where an item goes that nobody has liked yet: on the paths of the items that it shares a value of a feature with.

Every value of the features (an author, a tag, a city) has a *group*, the items with the most likes among those that have
it, `PER_GROUP` at most. The groups of an item vote: each of their items, as often as it shares a value, spreads one vote
over the paths that its scores s[v, c] are kept of (section 3 of the paper), in proportion to them. The J paths with the
most votes are the item's, among those that have an item already; its vector and bias in the ranker are the means of those
items'. The paper places an item by the examples it is the label of, of which there is none here. It is done at build time
for the items without an event, and while serving for what is published.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from engine.core.sealed import sealed
from engine.core.types import Float32Array, Int32Array, Int64Array
from engine.models.encoded import Encoded
from engine.models.spec import Feature

PER_GROUP = 64
"""Items of a value that speak for it."""


def groups_of(features: Sequence[Feature], encoded: Encoded) -> tuple[Int64Array, Int64Array]:
    """Return the groups of n items: int64[n + 1] offsets, int64[...] numbers, those of a feature behind the ones before.

    Args:
        features: with their sizes; each has codes.
        encoded: n items.
    """
    owners, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    base = one = many = 0
    for feature in features:
        if feature.coded:
            codes = encoded.codes[:, one].astype(np.int64)
            known = np.flatnonzero(codes)
            owners.append(known)
            numbers.append(base + codes[known])
            one += 1
        else:
            multi = encoded.multi[many]
            owners.append(np.repeat(np.arange(len(encoded), dtype=np.int64), np.diff(multi.offsets)))
            numbers.append(base + multi.codes.astype(np.int64))
            many += 1
        base += feature.size
    owner, number = np.concatenate(owners), np.concatenate(numbers)
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=len(encoded)), out=offsets[1:])
    return offsets, number[np.argsort(owner, kind="stable")]


def members_of(
    features: Sequence[Feature], encoded: Encoded, likes: Int64Array, placed: Int64Array
) -> tuple[Int64Array, Int32Array]:
    """Return who speaks for each group: int64[groups + 1] offsets, int32[...] items.

    Args:
        features: with their sizes.
        encoded: all items.
        likes: int64[items], of each.
        placed: int64[items], above 0 where an item has a path by its own events: the others speak for nobody.
    """
    offsets, numbers = groups_of(features, encoded)
    owner = np.repeat(np.arange(len(encoded), dtype=np.int64), np.diff(offsets))
    speaks = placed[owner] > 0
    owner, numbers = owner[speaks], numbers[speaks]
    order = np.lexsort((owner, -likes[owner], numbers))
    owner, numbers = owner[order], numbers[order]
    begins = np.searchsorted(numbers, numbers)
    first = np.arange(numbers.size) - begins < PER_GROUP
    bounds = np.zeros(sum(feature.size for feature in features) + 1, np.int64)
    np.cumsum(np.bincount(numbers[first], minlength=bounds.size - 1), out=bounds[1:])
    return bounds, owner[first].astype(np.int32)


class Placement:
    """Votes on the paths of items without events.

    Args:
        features: by which items are similar, with their sizes.
        group_offsets, group_items: who speaks for each group, as `members_of` says.
        score_paths: int64[items, S], -1 where empty, and score_values: float32[items, S].
        codes: int64[P], the paths that have an item, rising.
        vectors: float32[items, e] and bias: float32[items] of the ranker.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        group_offsets: Int64Array,
        group_items: Int32Array,
        score_paths: Int64Array,
        score_values: Float32Array,
        codes: Int64Array,
        vectors: Float32Array,
        bias: Float32Array,
    ) -> None:
        self._features = tuple(features)
        self._width = vectors.shape[1]
        arrays = (group_offsets, group_items, score_paths, score_values, codes, vectors, bias)
        self._arrays = tuple(sealed(array) for array in arrays)

    def place(self, encoded: Encoded, paths: int) -> tuple[Int32Array, Float32Array, Float32Array]:
        """Return where m items go.

        Args:
            encoded: what is known of them.
            paths: J, how many each gets at most.

        Returns:
            int32[m, J], positions in `codes`, most votes first (of equal votes the smaller code), -1 behind them: all of
            them -1 where no item is similar; float32[m, e] vectors; float32[m] biases.
        """
        offsets, groups = groups_of(self._features, encoded)
        places = np.full((len(encoded), paths), -1, np.int32)
        vectors = np.zeros((len(encoded), self._width), np.float32)
        bias = np.zeros(len(encoded), np.float32)
        arguments = (offsets, groups, *self._arrays, places, vectors, bias)
        _vote(*arguments)
        return places, vectors, bias


@njit(nogil=True, cache=True)
def _find(codes, code):  # type: ignore[no-untyped-def]
    low, high = 0, codes.size
    while low < high:
        middle = (low + high) // 2
        if codes[middle] < code:
            low = middle + 1
        else:
            high = middle
    return low if low < codes.size and codes[low] == code else -1


@njit(nogil=True, cache=True)
def _vote(  # type: ignore[no-untyped-def]
    offsets, groups, group_offsets, group_items, score_paths, score_values, codes, vectors, bias, out_places,
    out_vectors, out_bias,
):  # fmt: skip
    kept, paths, width = score_paths.shape[1], out_places.shape[1], vectors.shape[1]
    for r in range(offsets.size - 1):
        voices = 0
        for g in range(offsets[r], offsets[r + 1]):
            voices += group_offsets[groups[g] + 1] - group_offsets[groups[g]]
        if voices == 0:
            continue
        votes_for = np.empty(voices * kept, np.int64)
        votes = np.empty(voices * kept, np.float64)
        order = np.empty(voices * kept, np.int64)
        count = 0
        mean = np.zeros(width, np.float64)
        mean_bias = 0.0
        for g in range(offsets[r], offsets[r + 1]):
            for p in range(group_offsets[groups[g]], group_offsets[groups[g] + 1]):
                item = group_items[p]
                total = 0.0
                for s in range(kept):
                    if score_paths[item, s] >= 0:
                        total += score_values[item, s]
                for s in range(kept):
                    if score_paths[item, s] >= 0 and total > 0:
                        place = _find(codes, score_paths[item, s])
                        if place >= 0:
                            votes_for[count] = place
                            votes[count] = score_values[item, s] / total
                            count += 1
                for c in range(width):
                    mean[c] += vectors[item, c]
                mean_bias += bias[item]
        for c in range(width):
            out_vectors[r, c] = mean[c] / voices
        out_bias[r] = mean_bias / voices
        for at in range(count):  # in order of the places, and of the votes for each as they came
            order[at] = (votes_for[at] << 32) | at
        sums, places = np.empty(count, np.float64), np.empty(count, np.int64)
        distinct = 0
        for key in np.sort(order[:count]):
            at = key & 0xFFFFFFFF
            if distinct and places[distinct - 1] == votes_for[at]:
                sums[distinct - 1] += votes[at]
            else:
                places[distinct] = votes_for[at]
                sums[distinct] = votes[at]
                distinct += 1
        for j in range(min(paths, distinct)):
            best = -1
            for at in range(distinct):
                if sums[at] > 0 and (best < 0 or sums[at] > sums[best]):
                    best = at
            if best < 0:
                break
            out_places[r, j] = places[best]
            sums[best] = 0


def place_reference(
    similar: Sequence[int],
    score_paths: Int64Array,
    score_values: Float32Array,
    codes: Int64Array,
    paths: int,
) -> list[int]:
    """The plain twin of the vote, of one item: the codes that it gets, most votes first.

    Args:
        similar: who speaks for it, an item as often as it shares a value.
        score_paths, score_values, codes: as of `Placement`.
        paths: J.
    """
    votes: dict[int, float] = {}
    used = set(codes.tolist())
    for item in similar:
        there = score_paths[item] >= 0
        total = float(score_values[item][there].astype(np.float64).sum())
        for code, value in zip(
            score_paths[item][there].tolist(), score_values[item][there].tolist(), strict=True
        ):
            if code in used and total > 0:
                votes[code] = votes.get(code, 0.0) + value / total
    chosen = sorted((code for code in votes if votes[code] > 0), key=lambda code: (-votes[code], code))
    return chosen[:paths]
