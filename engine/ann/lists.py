"""Inverted lists of vectors in bytes, searched by our own kernel over the arrays as they lie in the snapshot.

The lists are those of faiss's IVF (Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", 2011,
section IV): spherical k-means, each vector in the list of the centre whose product with it is largest. A vector is kept
as one signed byte per dimension and a float for its scale, the query likewise, so that a product is a sum of integers and
a quarter of the memory is read, which is what such a search waits for. The best are compared by whole vectors after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit

from engine.ann.faiss_indexes import SLICE, in_threads, inverted, sample
from engine.ann.kernels import bits_of
from engine.ann.library import step
from engine.ann.options import IndexOptions
from engine.core.channel import Progress
from engine.core.select import offer, row_of, select_top, sort_key
from engine.core.types import AnyArray, Float32Array, Int8Array, Int32Array, Int64Array

FIRST = 128
"""The least depth that is searched."""

SPARE = 8
"""Of so many wanted one more is looked at: bytes may put those near the end in another order."""

_ARRAYS = ("centres", "centre_scales", "offsets", "codes", "scales", "entries")


class ByteLists:
    """Inverted lists of bytes; nothing is copied, and vectors that are added stay in the index's tail."""

    name = "lists 1"
    exact_scores = False
    can_add = False

    def __init__(self, arrays: Mapping[str, AnyArray], options: IndexOptions) -> None:
        self._arrays = {each: np.asarray(arrays[each]) for each in _ARRAYS}
        self._options = options
        lists, count = len(self._arrays["centres"]), len(self._arrays["codes"])
        if self._arrays["offsets"].shape != (lists + 1,) or self._arrays["offsets"][-1] != count:
            raise ValueError("its lists do not hold all vectors")

    @classmethod
    def build(
        cls, vectors: Float32Array, options: IndexOptions, threads: int, progress: Progress
    ) -> ByteLists:
        """Cluster the vectors with as many threads, list them, and turn them into bytes."""
        with in_threads(threads) as faiss:
            index = inverted(faiss, "ivf_flat", vectors, options)
            progress.start("clustering vectors", 1)
            index.train(np.ascontiguousarray(vectors[sample(len(vectors), index.nlist)]))
            progress.advance()
            centres: Float32Array = index.quantizer.reconstruct_n(0, index.nlist)
            progress.start("listing vectors", len(vectors))
            of = np.empty(len(vectors), np.int64)
            for start in range(0, len(vectors), SLICE):
                part = np.ascontiguousarray(vectors[start : start + SLICE])
                of[start : start + SLICE] = index.quantizer.search(part, 1)[1][:, 0]
                progress.advance(len(part))
        entries = np.argsort(of, kind="stable").astype(np.int32)
        offsets = np.zeros(len(centres) + 1, np.int64)
        np.cumsum(np.bincount(of, minlength=len(centres)), out=offsets[1:])
        codes, scales = np.empty(vectors.shape, np.int8), np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), SLICE):
            at = slice(start, start + SLICE)
            codes[at], scales[at] = in_bytes(vectors[entries[at]])
        of_centres, centre_scales = in_bytes(centres)
        arrays: dict[str, AnyArray] = {
            "centres": of_centres, "centre_scales": centre_scales, "offsets": offsets,
            "codes": codes, "scales": scales, "entries": entries,
        }  # fmt: skip
        return cls(arrays, options)

    def depth(self, wanted: int) -> int:
        """As `Library.depth`."""
        return step(FIRST, wanted + wanted // SPARE)

    def search(self, queries: Float32Array, depth: int, deeper: int) -> tuple[Int32Array, Float32Array]:
        """As `Library.search`."""
        arrays = self._arrays
        asked = min(depth, len(arrays["codes"]))
        probes = min(len(arrays["centres"]), self._options.probes * 8**deeper)
        entries = np.empty((len(queries), asked), np.int32)
        arguments = (queries, *(arrays[name] for name in _ARRAYS), probes, entries)
        look(*arguments)
        return entries, np.empty(entries.shape, np.float32)

    def add(self, vectors: Float32Array) -> None:
        """As `Library.add`: there is none."""
        raise NotImplementedError("vectors that are added stay in the tail")

    def parameters(self) -> dict[str, Any]:
        """As `Library.parameters`."""
        return {}

    def arrays(self) -> Mapping[str, AnyArray]:
        """As `Library.arrays`: centres int8[lists, d], centre_scales float32[lists], offsets int64[lists + 1], and in
        order of the lists codes int8[n, d], scales float32[n], entries int32[n]."""
        return self._arrays


def in_bytes(vectors: Float32Array) -> tuple[Int8Array, Float32Array]:
    """Return int8[n, d] and float32[n]: a vector is nearly its bytes times its scale; the largest number becomes 127."""
    scales = (np.abs(vectors).max(1) / 127).astype(np.float32)
    codes = np.rint(vectors / np.maximum(scales, np.float32(1e-30))[:, None]).astype(np.int8)
    return codes, scales


@njit(nogil=True, cache=True)
def look(queries, centres, centre_scales, offsets, codes, scales, numbers, probes, entries):  # type: ignore[no-untyped-def]
    """Write the entries with the largest products, by bytes and in no order, of the lists nearest to each query.

    Args:
        queries: float32[n, d].
        centres, centre_scales, offsets, codes, scales, numbers: as `ByteLists.arrays`, `numbers` being its entries.
        probes: lists looked into.
        entries: int32[n, depth], filled; -1 where the lists hold fewer.
    """
    lists, width = centres.shape
    depth = entries.shape[1]
    longest = np.int64(lists)
    for c in range(lists):
        longest = max(longest, offsets[c + 1] - offsets[c])
    products = np.empty(longest, np.float32)
    near = np.empty(probes + max(probes, 64), np.uint64)
    keys = np.empty(depth + max(depth, 64), np.uint64)
    asked = np.empty(width, np.int8)
    none = np.uint64(0)
    least = np.float32(-np.inf)
    for q in range(queries.shape[0]):
        query = queries[q]
        largest = np.float32(0)
        for i in range(width):
            largest = max(largest, abs(query[i]))
        # The query's own scale changes no order and is left out.
        turned = np.float32(127) / max(largest, np.float32(1e-30))
        for i in range(width):
            asked[i] = np.int8(np.rint(query[i] * turned))
        found, _, _ = _offered(
            asked, centres, centre_scales, 0, lists, products, near, 0, probes, none, least
        )
        if found > probes:
            select_top(near, found, probes)
        count, worst, bound = 0, none, least
        for probe in range(probes):
            c = row_of(near[probe])
            count, worst, bound = _offered(
                asked, codes, scales, offsets[c], offsets[c + 1], products, keys, count, depth, worst, bound
            )
        if count > depth:
            select_top(keys, count, depth)
            count = depth
        for i in range(count):
            entries[q, i] = numbers[row_of(keys[i])]
        for i in range(count, depth):
            entries[q, i] = -1


@njit(nogil=True, cache=True)
def _offered(asked, codes, scales, begin, end, products, keys, count, keep, worst, least):  # type: ignore[no-untyped-def]
    """Offer the products with codes[begin:end]; least: float32, the score in `worst`, or -inf."""
    score = np.empty(1, np.float32)
    bits = score.view(np.uint32)
    for i in range(begin, end):
        products[i - begin] = np.float32(_integers(asked, codes[i])) * scales[i]
    # Most are below the least that still matters: one compare each, and no key.
    for i in range(begin, end):
        if products[i - begin] >= least:
            score[0] = products[i - begin]
            before = count
            count, worst = offer(keys, count, keep, worst, sort_key(bits[0], i))
            if count < before:
                bits[0] = bits_of(worst)
                least = score[0]
    return count, worst, least


@njit(nogil=True, cache=True)
def _integers(left, right):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for i in range(left.size):
        total = np.int32(total + np.int32(np.int32(left[i]) * np.int32(right[i])))
    return total


def look_reference(
    query: Float32Array,
    centres: Int8Array,
    centre_scales: Float32Array,
    offsets: Int64Array,
    codes: Int8Array,
    scales: Float32Array,
    numbers: Int32Array,
    probes: int,
    depth: int,
) -> set[int]:
    """The plain twin of `look` for one query, where no two products are equal."""
    asked = np.rint(query * (np.float32(127) / np.abs(query).max())).astype(np.int8).astype(np.int32)
    nearest = np.argsort(-(centres.astype(np.int32) @ asked * centre_scales), kind="stable")[:probes]
    at = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in nearest.tolist()])
    products = codes[at].astype(np.int32) @ asked * scales[at]
    return {int(row) for row in numbers[at[np.argsort(-products, kind="stable")[:depth]]]}
