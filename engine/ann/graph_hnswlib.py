"""HNSW graphs that hnswlib built (an optional extra: it has no wheels, so installing it needs a C++ compiler).

What it built is searched where it lies, by our own kernel: no copy in the memory of each worker, no hnswlib where it
is served, and less processor time than hnswlib's search. hnswlib is needed again only when so much came since the build
that vectors must go into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from engine.ann.library import step
from engine.ann.options import IndexOptions
from engine.ann.walk import Graph, walk
from engine.core.channel import Progress
from engine.core.types import AnyArray, Float32Array, Int32Array

SLICE = 4096
"""Vectors given to the library at a time, so that progress moves."""

_LAST_MARK = 65_535
"""Largest mark that says which vectors a query met: uint16."""

_ARRAYS = ("label_lookup_external", "label_lookup_internal", "element_levels", "data_level0", "link_lists")


def installed() -> bool:
    """Whether hnswlib can be imported; it is not imported."""
    return find_spec("hnswlib") is not None


class HnswlibGraph:
    """A graph that hnswlib built: searched in its arrays until vectors are added, from then on inside hnswlib."""

    exact_scores = True

    def __init__(
        self, parameters: Mapping[str, Any], arrays: Mapping[str, AnyArray], options: IndexOptions, name: str
    ) -> None:
        self.name = name
        self._parameters = dict(parameters)
        self._arrays = {each: np.asarray(arrays[each]) for each in _ARRAYS}
        self.graph = _graph_of(self._parameters, self._arrays)
        self._first = options.ef_search
        self._visited = np.zeros(len(self.graph.links), np.uint16)
        self._mark = 1
        self._index: Any = None

    @classmethod
    def build(
        cls, vectors: Float32Array, options: IndexOptions, threads: int, progress: Progress
    ) -> HnswlibGraph:
        """Link all vectors with as many threads; with one, the graph is the same each time."""
        import hnswlib

        index = hnswlib.Index("ip", vectors.shape[1])
        index.init_index(
            len(vectors), M=options.m, ef_construction=options.ef_construction, random_seed=options.seed
        )
        progress.start("linking vectors", len(vectors))
        for start in range(0, len(vectors), SLICE):
            part = np.ascontiguousarray(vectors[start : start + SLICE])
            index.add_items(part, np.arange(start, start + len(part)), num_threads=threads)
            progress.advance(len(part))
        state = index.__getstate__()[0]
        del index
        parameters = {name: value for name, value in state.items() if name not in _ARRAYS}
        return cls(parameters, state, options, f"hnswlib {version('hnswlib')}")

    @property
    def can_add(self) -> bool:
        """As `Library.can_add`: where hnswlib is installed."""
        return installed()

    def depth(self, wanted: int) -> int:
        """As `Library.depth`."""
        return step(self._first, wanted)

    def search(self, queries: Float32Array, depth: int, deeper: int) -> tuple[Int32Array, Float32Array]:
        """As `Library.search`."""
        del deeper
        if self._index is not None:
            return self._search_inside(queries, depth)
        graph = self.graph
        if self._mark + len(queries) > _LAST_MARK:
            self._visited[:] = 0
            self._mark = 1
        depth = min(depth, len(graph.links))
        entries = np.empty((len(queries), depth), np.int32)
        scores = np.empty((len(queries), depth), np.float32)
        walk(
            queries,
            graph.links,
            graph.numbers,
            graph.upper,
            graph.upper_at,
            graph.upper_width,
            graph.enter,
            graph.levels,
            graph.vector_at,
            graph.label_at,
            self._visited,
            self._mark,
            entries,
            scores,
        )
        self._mark += len(queries)
        return entries, scores

    def _search_inside(self, queries: Float32Array, depth: int) -> tuple[Int32Array, Float32Array]:
        entries = np.full((len(queries), depth), -1, np.int32)
        scores = np.full((len(queries), depth), -np.inf, np.float32)
        self._index.set_ef(depth)
        asked = min(depth, self._index.get_current_count())
        for q in range(len(queries)):
            try:
                labels, distances = self._index.knn_query(queries[q], asked, num_threads=1)
            except RuntimeError:
                # It found fewer than asked and returns none: the graph has parts that nothing leads to.
                continue
            entries[q, :asked] = labels[0]
            scores[q, :asked] = np.float32(1) - distances[0]
        return entries, scores

    def add(self, vectors: Float32Array) -> None:
        """As `Library.add`; the first time, the graph is copied into the memory of this process."""
        if self._index is None:
            import hnswlib

            self._index = hnswlib.Index.__new__(hnswlib.Index)
            self._index.__setstate__(({**self._parameters, **self._arrays},))
            self._visited = np.empty(0, np.uint16)
        count = self._index.get_current_count()
        if count + len(vectors) > self._index.get_max_elements():
            self._index.resize_index(count + len(vectors) + count // 16 + 1024)
        self._index.add_items(vectors, np.arange(count, count + len(vectors)), num_threads=1)

    def parameters(self) -> dict[str, Any]:
        """As `Library.parameters`."""
        return self._parameters

    def arrays(self) -> Mapping[str, AnyArray]:
        """As `Library.arrays`."""
        return self._arrays


def _graph_of(parameters: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> Graph:
    """Return hnswlib's state (version 1) as a graph, in the same memory.

    Raises:
        KeyError, TypeError, ValueError: it is damaged, or of another version.
    """
    if parameters["ser_version"] != 1 or parameters["space"] != "ip" or parameters["offset_level0"] != 0:
        raise ValueError("hnswlib wrote it in a form that is not known")
    count, size = parameters["cur_element_count"], parameters["size_data_per_element"]
    links = arrays["data_level0"].view(np.int32).reshape(count, size // 4)
    levels = arrays["element_levels"][:count].astype(np.int64)
    width = parameters["size_links_per_element"] // 4
    upper = arrays["link_lists"].view(np.int32)
    upper_at = np.zeros(count, np.int64)
    np.cumsum(levels[:-1] * width, out=upper_at[1:])
    if int(levels.sum()) * width != upper.size:
        raise ValueError("the links of the upper levels are incomplete")
    return Graph(
        links=links,
        numbers=links.view(np.float32),
        upper=upper,
        upper_at=upper_at,
        upper_width=width,
        enter=int(parameters["enterpoint_node"]),
        levels=int(parameters["max_level"]),
        vector_at=parameters["offset_data"] // 4,
        label_at=parameters["label_offset"] // 4,
    )
