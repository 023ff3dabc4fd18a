"""HNSW and inverted lists by faiss (Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", 2017; product
quantisation: Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", 2011)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from typing import Any

import numpy as np

from engine.ann.library import step
from engine.ann.options import IndexKind, IndexOptions
from engine.core.channel import Progress
from engine.core.errors import BuildError
from engine.core.types import AnyArray, Float32Array, Int32Array

SLICE = 8192
"""Vectors given to the library at a time, so that progress moves."""

TOGETHER = 16
"""Queries given to the library at a time: from 20 on it computes products in another order, and a query's answer would
depend on how many share its batch."""


def faiss_module() -> Any:
    """Import faiss, which takes about 0.1 s and is done only where an index needs it."""
    with warnings.catch_warnings():
        # SWIG's types lack a __module__, of which Python 3.12 and later warn.
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss
    return faiss


@contextmanager
def in_threads(threads: int) -> Iterator[Any]:
    """Let faiss use so many threads, and put back what was; gives faiss."""
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


class FaissIndex:
    """Any of the indexes in faiss. Its state is copied into the memory of each process."""

    can_add = True

    def __init__(self, kind: IndexKind, index: Any, options: IndexOptions) -> None:
        self._faiss = faiss_module()
        self._kind = kind
        self._index = index
        self._options = options
        self._inverted = kind in ("ivf_flat", "ivf_pq")
        self.exact_scores = kind != "ivf_pq"
        self.name = f"faiss {self._faiss.__version__}"

    @classmethod
    def build(
        cls, kind: IndexKind, vectors: Float32Array, options: IndexOptions, threads: int, progress: Progress
    ) -> FaissIndex:
        """Train where the kind needs it, and add all vectors with as many threads."""
        with in_threads(threads) as faiss:
            if kind in ("ivf_flat", "ivf_pq"):
                index = inverted(faiss, kind, vectors, options)
                progress.start("clustering vectors", 1)
                index.train(np.ascontiguousarray(vectors[sample(len(vectors), index.nlist)]))
                progress.advance()
            else:
                index = faiss.IndexHNSWFlat(vectors.shape[1], options.m, faiss.METRIC_INNER_PRODUCT)
                index.hnsw.efConstruction = options.ef_construction
                index.hnsw.rng = faiss.RandomGenerator(options.seed)
            progress.start("linking vectors" if kind == "hnsw_faiss" else "listing vectors", len(vectors))
            for start in range(0, len(vectors), SLICE):
                part = np.ascontiguousarray(vectors[start : start + SLICE])
                index.add(part)
                progress.advance(len(part))
        return cls(kind, index, options)

    @classmethod
    def load(cls, kind: IndexKind, arrays: Mapping[str, AnyArray], options: IndexOptions) -> FaissIndex:
        """Take the state that `arrays` returned.

        Raises:
            KeyError, RuntimeError: it is damaged.
        """
        faiss = faiss_module()
        return cls(kind, faiss.deserialize_index(np.ascontiguousarray(arrays["state"])), options)

    def depth(self, wanted: int) -> int:
        """As `Library.depth`."""
        return step(128 if self._inverted else self._options.ef_search, wanted)

    def search(self, queries: Float32Array, depth: int, deeper: int) -> tuple[Int32Array, Float32Array]:
        """As `Library.search`."""
        faiss = self._faiss
        faiss.omp_set_num_threads(1)  # holds for the thread that calls
        if self._inverted:
            asked = depth if self.exact_scores else depth * self._options.rerank
            probes = min(self._index.nlist, self._options.probes * 8**deeper)
            parameters = faiss.SearchParametersIVF(nprobe=probes)
        else:
            asked = depth
            parameters = faiss.SearchParametersHNSW(efSearch=depth)
        asked = min(asked, self._index.ntotal)
        if len(queries) <= TOGETHER:
            scores, entries = self._index.search(queries, asked, params=parameters)
            return entries.astype(np.int32), scores
        entries = np.empty((len(queries), asked), np.int32)
        scores = np.empty((len(queries), asked), np.float32)
        for start in range(0, len(queries), TOGETHER):
            part = slice(start, start + TOGETHER)
            scores[part], entries[part] = self._index.search(queries[part], asked, params=parameters)
        return entries, scores

    def add(self, vectors: Float32Array) -> None:
        """As `Library.add`."""
        self._faiss.omp_set_num_threads(1)
        self._index.add(np.ascontiguousarray(vectors))

    def parameters(self) -> dict[str, Any]:
        """As `Library.parameters`."""
        return {}

    def arrays(self) -> Mapping[str, AnyArray]:
        """As `Library.arrays`."""
        return {"state": self._faiss.serialize_index(self._index)}


def inverted(faiss: Any, kind: IndexKind, vectors: Float32Array, options: IndexOptions) -> Any:
    """Return empty inverted lists; BuildError where the options do not fit the vectors."""
    count, dimension = vectors.shape
    lists = options.lists or max(1, min(4 * isqrt(count), count // 39))
    if lists > count:
        raise BuildError(f"the index is to have {lists:,} lists, of {count:,} vectors; lists must be fewer")
    coarse = faiss.IndexFlatIP(dimension)
    if kind == "ivf_flat":
        index = faiss.IndexIVFFlat(coarse, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        parts = options.parts or max(each for each in range(1, dimension // 4 + 2) if dimension % each == 0)
        if dimension % parts:
            raise BuildError(f"{parts} parts do not divide the {dimension} dimensions of the vectors")
        if count < 2**options.bits:
            raise BuildError(
                f"codes of {options.bits} bits need {2**options.bits:,} vectors, there are {count:,}; "
                "use fewer bits, or another kind of index"
            )
        index = faiss.IndexIVFPQ(coarse, dimension, lists, parts, options.bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.seed = options.seed + 1
        index.pq.cp.min_points_per_centroid = 1
    index.cp.seed = options.seed + 1
    index.cp.min_points_per_centroid = 1  # a warning on stderr otherwise
    return index


def sample(count: int, lists: int) -> slice:
    """Return every so many vectors that 64 to 128 per list are left, enough for clustering and read in one pass."""
    return slice(None, None, max(1, count // max(lists * 64, 65_536)))
