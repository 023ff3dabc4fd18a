"""The search in an HNSW graph, over the arrays as they lie in the snapshot: mapped once, shared by all workers.

Source: Malkov and Yashunin 2016, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable
Small World graphs", algorithms 2 and 5. Where the paper has two heaps, of candidates and of results, one sorted list
holds both, a bit of each key saying whether the vector's links were followed (as in Fu et al. 2019, "Fast Approximate
Nearest Neighbor Search With The Navigating Spreading-out Graph", algorithm 1): it ends sorted, and what one vector's
links bring is merged into it in one pass.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.ann.kernels import LINE, bits_of, prefetch
from engine.core.select import sort_key
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, without copies of its arrays.

    Attributes:
        links: int32[n, width], a row per vector: how many links (low 16 bits), the links, the vector's bits from
            `vector_at` on, and the entry's number at `label_at`.
        numbers: the same memory as float32.
        upper: int32[u], the links of the upper levels: per level of a vector their count and the links.
        upper_at: int64[n], where a vector's begin.
        upper_width: int32 per level of a vector.
        enter: the vector where a search begins; levels: of the graph above the lowest.
    """

    links: Int32Array
    numbers: Float32Array
    upper: Int32Array
    upper_at: Int64Array
    upper_width: int
    enter: int
    levels: int
    vector_at: int
    label_at: int


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _product(query, numbers, node, start):  # type: ignore[no-untyped-def]
    vector = numbers[
        node, start : start + query.size
    ]  # a view whose indices need no check for being negative
    total = np.float32(0)
    for i in range(query.size):
        total += query[i] * vector[i]
    return total


@njit(nogil=True, cache=True)
def walk(  # type: ignore[no-untyped-def]
    queries,
    links,
    numbers,
    upper,
    upper_at,
    upper_width,
    enter,
    levels,
    vector_at,
    label_at,
    visited,
    mark,
    entries,
    scores,
):
    """Write the nearest that a walk finds, best first, into entries int32[n, depth] and scores float32[n, depth].

    Args:
        queries: float32[n, d].
        links to label_at: see `Graph`.
        visited: uint16[nodes], changed: where it holds the query's mark, a walk was there.
        mark: of the first query; the following have the next. None of them stands in `visited`.
        entries, scores: changed, padded with -1 and -inf; as many as columns are held while searching (the paper's ef).
    """
    depth = entries.shape[1]
    held = np.empty(depth + 2 * links.shape[1], np.uint64)
    near = np.empty(links.shape[1], np.int32)
    new = np.empty(links.shape[1], np.uint64)
    score = np.empty(1, np.float32)
    bits = score.view(np.uint32)
    low = np.uint64(0xFFFFFFFF)
    done = np.uint64(1)
    width = vector_at + queries.shape[1]
    for q in range(queries.shape[0]):
        query = queries[q]
        node = enter
        best = _product(query, numbers, node, vector_at)
        for level in range(levels, 0, -1):
            moved = True
            while moved:
                moved = False
                at = upper_at[node] + (level - 1) * upper_width
                for i in range(upper[at] & 0xFFFF):
                    other = upper[at + 1 + i]
                    product = _product(query, numbers, other, vector_at)
                    if product > best:
                        best = product
                        node = other
                        moved = True
        own = np.uint16(mark + q)
        visited[node] = own
        # Keys fall with the score, so that the list is sorted with the largest first; the lowest bit is set when the
        # links have been followed, and a node's number is below 2^31.
        score[0] = best
        held[0] = sort_key(bits[0], 0) & ~low | np.uint64(node) << done
        size = 1
        at = 0
        worst = np.float32(-np.inf)
        while at < size:
            node = np.int64((held[at] & low) >> done)
            held[at] |= done
            count = 0
            for i in range(links[node, 0] & 0xFFFF):
                other = links[node, 1 + i]
                if visited[other] != own:
                    visited[other] = own
                    near[count] = other
                    count += 1
                    for column in range(0, width, LINE):
                        prefetch(numbers, other, column)  # type: ignore[call-arg]
            better = 0
            for i in range(count):
                other = near[i]
                product = _product(query, numbers, other, vector_at)
                if product > worst or size < depth:
                    score[0] = product
                    key = sort_key(bits[0], 0) & ~low | np.uint64(other) << done
                    place = better
                    while place > 0 and new[place - 1] < key:
                        new[place] = new[place - 1]
                        place -= 1
                    new[place] = key
                    better += 1
            if better > 0:
                mine = size - 1
                its = better - 1
                to = size + better - 1
                while its >= 0:
                    if mine >= 0 and held[mine] < new[its]:
                        held[to] = held[mine]
                        mine -= 1
                    else:
                        held[to] = new[its]
                        its -= 1
                    to -= 1
                at = min(at, to + 1)
                size = min(depth, size + better)
                if size == depth:
                    bits[0] = bits_of(held[size - 1])
                    worst = score[0]
            while at < size and held[at] & done:
                at += 1
        for i in range(size):
            entries[q, i] = links[np.int64((held[i] & low) >> done), label_at]
            bits[0] = bits_of(held[i])
            scores[q, i] = score[0]
        for i in range(size, depth):
            entries[q, i] = -1
            scores[q, i] = -np.inf


def walk_reference(query: Float32Array, graph: Graph, depth: int) -> dict[int, float]:
    """The plain twin of `walk` for one query, with the two heaps of the paper: entry to score."""

    def links_of(level: int, node: int) -> AnyArray:
        row = (
            graph.links[node]
            if level == 0
            else graph.upper[graph.upper_at[node] + (level - 1) * graph.upper_width :]
        )
        return row[1 : 1 + (int(row[0]) & 0xFFFF)]

    def product(node: int) -> float:
        return float(graph.numbers[node, graph.vector_at : graph.vector_at + query.size] @ query)

    node = graph.enter
    for level in range(graph.levels, 0, -1):
        while True:
            best = max([node, *links_of(level, node).tolist()], key=product)
            if product(best) <= product(node):
                break
            node = best
    visited = {node}
    candidates = [(-product(node), node)]
    results = [(product(node), node)]
    while candidates:
        distance, node = heapq.heappop(candidates)
        if len(results) == depth and -distance < results[0][0]:
            break
        for other in links_of(0, node).tolist():
            if other in visited:
                continue
            visited.add(other)
            if len(results) < depth or product(other) > results[0][0]:
                heapq.heappush(candidates, (-product(other), other))
                heapq.heappush(results, (product(other), other))
                if len(results) > depth:
                    heapq.heappop(results)
    return {int(graph.links[node, graph.label_at]): score for score, node in results}
