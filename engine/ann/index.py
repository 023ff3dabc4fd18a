"""The vector index: one interface over all kinds, with new vectors while serving and rows that queries may not have.

An index is three layers. The library's part finds entries, and is as it was built, but for what is added behind. The
growth holds the vectors that came since: the newest of them, the tail, are compared one by one; what is beyond goes into
the library's part. A kernel puts the layers together, leaves out what is replaced or may not be had, and keeps the
best. Where a query is left short, the library is asked deeper, and at last every vector is compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from engine.ann import graph_hnswlib
from engine.ann.faiss_indexes import FaissIndex
from engine.ann.graph_hnswlib import HnswlibGraph
from engine.ann.kernels import answer, no_rows, rescore, share_forbidden
from engine.ann.library import Library
from engine.ann.lists import ByteLists
from engine.ann.options import IndexKind, IndexOptions
from engine.core.channel import Progress, SilentProgress
from engine.core.errors import BuildError, SnapshotError
from engine.core.types import AnyArray, BoolArray, Float32Array, Int32Array, RaggedRows

log = logging.getLogger(__name__)

HEADER = "header"
FORMAT = 1

NO_HNSWLIB = (
    "hnswlib is not installed, faiss's HNSW takes its place; to install it: pip install 'recall-engine[hnsw]'"
)

_DEEPER = 4
"""How many times as deep a query that was left short is asked again."""

_SCANNED = 32
"""Where more than one in so many vectors would be asked for, comparing all of them is as fast."""

_MOVED = 64
"""Vectors of the tail that one `add` puts into the library at most, beyond as many as it was given."""

_NOTHING = np.empty(0, np.bool_)
_NO_FOUND = (np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))


@lru_cache(maxsize=1024)
def _no_lists(queries: int) -> RaggedRows:
    """Return as many empty lists, which nobody writes into."""
    return RaggedRows(*no_rows(queries))


class VectorIndex:
    """Rows of a catalogue by the inner product of their vectors with a query's.

    It is used by one thread at a time. What a query gets does not depend on the others of its batch.

    Attributes:
        kind: of `IndexKind`.
        library: name and version of the library that holds it, "" where there is none.
        run: what `build_index` was given, so that an index is not served with the model of another run.
    """

    def __init__(
        self,
        kind: IndexKind,
        part: Library | None,
        vectors: Float32Array,
        options: IndexOptions,
        run: str = "",
        library: str = "",
    ) -> None:
        self.kind = kind
        self.library = library or (part.name if part is not None else "")
        self.run = run
        self._part = part
        self._vectors = np.asarray(vectors)  # a plain array: kernels take a memmap more slowly
        self._options = options
        self._replaced = _NOTHING
        self._grown = np.empty((0, vectors.shape[1]), np.float32)
        self._grown_rows = np.empty(0, np.int32)
        self._grown_at: dict[int, int] = {}
        self._grown_count = 0
        self._moved = 0
        self._left_behind = 0

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        """Return how many rows have a vector."""
        return len(self._vectors) + self._grown_count - self._left_behind

    def search(self, queries: Float32Array, k: int) -> tuple[Int32Array, Float32Array]:
        """Return the nearest rows of each query.

        Args:
            queries: float32[n, d].
            k: how many at most.

        Returns:
            int32[n, k] rows, best first, ties by lower row, padded with -1, and float32[n, k] inner products, padded
            with -inf.
        """
        if len(queries) == 0:
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
        return self.search_masked(queries, np.full(len(queries), k, np.int32))

    def search_masked(
        self,
        queries: Float32Array,
        k: Int32Array,
        forbidden: BoolArray | None = None,
        excluded: RaggedRows | None = None,
    ) -> tuple[Int32Array, Float32Array]:
        """Return the nearest rows of each query among those that it may have.

        More is asked for than wanted, by how many are likely to be left out; a query that is short all the same is asked
        again, deeper. So it gets k rows wherever there are so many that it may have.

        Args:
            queries: float32[n, d].
            k: int32[n], how many at most; 0 asks for none.
            forbidden: bool[m], True where no query may have the row; rows from m on are allowed.
            excluded: per query, rows that it may not have.

        Returns:
            As `search`, of as many columns as the largest k.
        """
        n = len(queries)
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries of shape {queries.shape} for vectors of {self.dimension} dimensions")
        wanted = np.ascontiguousarray(k, np.int32)
        counts: list[int] = wanted.tolist()
        columns = max(0, max(counts, default=0))
        rows = np.empty((n, columns), np.int32)
        scores = np.empty((n, columns), np.float32)
        banned = _NOTHING if forbidden is None else forbidden
        lists = _no_lists(n) if excluded is None else excluded
        depths = self._depths(counts, banned, lists)
        for depth in set(depths):
            if depths.count(depth) == n:
                self._ask(queries, wanted, banned, lists, depth, rows, scores)
                continue
            mine = np.array([q for q in range(n) if depths[q] == depth])
            its = np.empty((mine.size, columns), np.int32), np.empty((mine.size, columns), np.float32)
            self._ask(queries[mine], wanted[mine], banned, _lists_of(lists, mine), depth, *its)
            rows[mine], scores[mine] = its
        return rows, scores

    def add(self, rows: Int32Array, vectors: Float32Array) -> None:
        """Take vectors of new rows, or other vectors of rows that have one; the next search finds them.

        Args:
            rows: int32[m]; of a row that comes twice the last counts.
            vectors: float32[m, d], finite.

        Raises:
            BuildError: a vector is not finite or of another dimension; the text names the row, and nothing is added.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape != (len(rows), self.dimension):
            raise BuildError(
                f"vectors of shape {vectors.shape} for {len(rows)} rows of {self.dimension} dimensions"
            )
        check_finite(vectors, rows)
        self._reserve(self._grown_count + len(rows))
        for row, vector in zip(np.asarray(rows).tolist(), vectors, strict=True):
            at = self._grown_at.get(row)
            if at is not None:
                self._grown_rows[at] = -1
                self._left_behind += 1
            elif row < len(self._vectors):
                if self._replaced.size == 0:
                    self._replaced = np.zeros(len(self._vectors), np.bool_)
                self._replaced[row] = True
                self._left_behind += 1
            at = self._grown_count
            self._grown[at] = vector
            self._grown_rows[at] = row
            self._grown_at[row] = at
            self._grown_count += 1
        self._move_tail(len(rows) + _MOVED)

    def arrays(self) -> Mapping[str, AnyArray]:
        """Return what `load_index` takes, without the vectors that it was built from.

        Raises:
            BuildError: vectors were added since it was built.
        """
        if self._grown_count:
            raise BuildError("an index that vectors were added to is not stored: build it from all of them")
        part = self._part
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "library": self.library,
            "run": self.run,
            "items": len(self._vectors),
            "dimension": self.dimension,
            "parameters": {} if part is None else part.parameters(),
        }
        text = json.dumps(header, sort_keys=True).encode()
        return {HEADER: np.frombuffer(text, np.uint8), **({} if part is None else part.arrays())}

    def _depths(self, wanted: list[int], forbidden: BoolArray, excluded: RaggedRows) -> list[int]:
        """Per query, how deep the library is asked: a function of the query, not of its batch; 0 is not at all."""
        if self._part is None:
            return [0] * len(wanted)
        allowed = 1 - share_forbidden(forbidden) if forbidden.size else 1.0
        if not excluded.rows.size:
            return [self._depth(count, allowed) for count in wanted]
        # Of those the query may not have, as many may be near it as it asks for; the second question is for the rest.
        lengths = excluded.lengths.tolist()
        return [self._depth(c + min(n, c), allowed) for c, n in zip(wanted, lengths, strict=True)]

    def _depth(self, needed: int, allowed: float) -> int:
        assert self._part is not None
        if needed <= 0:
            return 0
        entries = len(self._vectors) + self._moved
        likely = needed / allowed * (1.1 if allowed < 1 else 1.0) if allowed > 0 else entries
        likely += min(self._left_behind, needed)
        return self._bounded(self._part.depth(int(min(likely, entries))))

    def _bounded(self, depth: int) -> int:
        """Return the depth, or 0 where the answer is as fast had from all vectors."""
        entries = len(self._vectors) + self._moved
        return depth if depth * _SCANNED < entries or depth <= self._options.ef_search < entries else 0

    def _ask(
        self,
        queries: Float32Array,
        wanted: Int32Array,
        forbidden: BoolArray,
        excluded: RaggedRows,
        depth: int,
        rows: Int32Array,
        scores: Float32Array,
        deeper: int = 0,
    ) -> None:
        """Answer queries of one depth into rows and scores; 0 compares all vectors."""
        scan = depth == 0 or self._part is None
        if scan or self._part is None:
            found, found_scores = _NO_FOUND
        else:
            found, found_scores = self._part.search(queries, depth, deeper)
            if not self._part.exact_scores:
                rescore(queries, found, self._vectors, self._grown, found_scores)
        left_short = answer(
            queries,
            found,
            found_scores,
            scan,
            self._vectors,
            self._replaced,
            self._grown,
            self._grown_rows,
            0 if scan else self._moved,
            self._grown_count,
            forbidden,
            excluded.rows,
            excluded.offsets,
            wanted,
            rows,
            scores,
        )
        if left_short and not scan:
            last = rows[np.arange(len(rows)), np.maximum(wanted, 1) - 1]
            short = np.flatnonzero((wanted > 0) & (last < 0))
            its = (
                np.empty((short.size, rows.shape[1]), np.int32),
                np.empty((short.size, rows.shape[1]), np.float32),
            )
            further = self._bounded(depth * _DEEPER)
            its_lists = _lists_of(excluded, short)
            self._ask(queries[short], wanted[short], forbidden, its_lists, further, *its, deeper + 1)
            rows[short], scores[short] = its

    def _reserve(self, count: int) -> None:
        if count <= len(self._grown):
            return
        room = max(1024, 2 * count)
        grown = np.empty((room, self.dimension), np.float32)
        grown[: self._grown_count] = self._grown[: self._grown_count]
        rows = np.full(room, -1, np.int32)
        rows[: self._grown_count] = self._grown_rows[: self._grown_count]
        self._grown, self._grown_rows = grown, rows

    def _move_tail(self, most: int) -> None:
        if self._part is None or not self._part.can_add:
            return
        count = min(most, self._grown_count - self._moved - self._options.tail)
        if count > 0:
            self._part.add(self._grown[self._moved : self._moved + count])
            self._moved += count


def build_index(
    kind: IndexKind,
    vectors: Float32Array,
    options: IndexOptions | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    run: str = "",
) -> VectorIndex:
    """Return an index of all vectors.

    With one thread an index is the same each time. With more, graphs depend on the order in which threads come; their
    recall does not. Lists are the same as long as the number of threads is.

    Args:
        kind: see `IndexKind`.
        vectors: float32[items, d], row r's in r; kept, not copied: pass the memory-mapped array where there is one.
        options: how.
        threads: how many cores may be used.
        progress: told how far it is.
        run: kept in the index, see `load_index`.

    Raises:
        BuildError: a vector is not finite (the text names the row), or the options do not fit the vectors.
    """
    options = options or IndexOptions()
    progress = progress or SilentProgress()
    if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[1] == 0:
        raise BuildError(
            f"expected float32 vectors of [items, dimension], got {vectors.dtype}{list(vectors.shape)}"
        )
    check_finite(vectors)
    if kind == "hnsw" and not graph_hnswlib.installed():
        log.warning(NO_HNSWLIB)
    return VectorIndex(kind, _build(kind, vectors, options, threads, progress), vectors, options, run)


def load_index(
    arrays: Mapping[str, AnyArray],
    vectors: Float32Array,
    options: IndexOptions | None = None,
    run: str | None = None,
) -> VectorIndex:
    """Return the index that `VectorIndex.arrays` gave the arrays of.

    A graph that hnswlib built is searched without it; only the tail of what is added then grows where it is missing.

    Args:
        arrays: by name; memory-mapped ones of a graph by hnswlib are used as they are, faiss copies its own.
        vectors: float32[items, d], those that it was built from; kept, not copied.
        options: those that are read while serving may differ from the build's.
        run: that of the model it is served with; None does not compare.

    Raises:
        SnapshotError: it is damaged, of other vectors or of another run.
    """
    options = options or IndexOptions()
    try:
        header = json.loads(bytes(arrays[HEADER]))
        kind, library, format_ = header["kind"], header["library"], header["format"]
        shape, its_run, parameters = (
            (header["items"], header["dimension"]),
            header["run"],
            header["parameters"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError("no header of a vector index", HEADER) from error
    if format_ != FORMAT:
        raise SnapshotError(f"a vector index of format {format_}, this version reads {FORMAT}", HEADER)
    if run is not None and its_run != run:
        raise SnapshotError(f"the index is of run {its_run!r}, the model of run {run!r}", HEADER)
    if shape != vectors.shape or vectors.dtype != np.float32:
        raise SnapshotError(
            f"the index is of {shape[0]:,} vectors of {shape[1]} dimensions, there are {vectors.dtype}"
            f"{list(vectors.shape)}",
            HEADER,
        )
    part: Library | None
    try:
        if not library:
            part = None
        elif library == ByteLists.name:
            part = ByteLists(arrays, options)
        elif not library.startswith("hnswlib"):
            part = FaissIndex.load("hnsw_faiss" if kind == "hnsw" else kind, arrays, options)
        else:
            part = HnswlibGraph(parameters, arrays, options, library)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SnapshotError(f"the vector index is damaged: {error}", HEADER) from error
    return VectorIndex(kind, part, vectors, options, its_run, library)


def check_finite(vectors: Float32Array, rows: Int32Array | None = None) -> None:
    """Raise BuildError that names the first row whose vector is not finite; `rows` names them where it is not 0, 1 ..."""
    for start in range(0, len(vectors), 65_536):
        bad = np.flatnonzero(~np.isfinite(vectors[start : start + 65_536]).all(axis=1))
        if bad.size:
            at = start + int(bad[0])
            raise BuildError(f"the vector of row {at if rows is None else int(rows[at])} is not finite")


def _build(
    kind: IndexKind, vectors: Float32Array, options: IndexOptions, threads: int, progress: Progress
) -> Library | None:
    if kind == "exact" or len(vectors) == 0:
        return None
    if kind == "ivf_int8":
        return ByteLists.build(vectors, options, threads, progress)
    if kind == "hnsw" and graph_hnswlib.installed():
        return HnswlibGraph.build(vectors, options, threads, progress)
    return FaissIndex.build("hnsw_faiss" if kind == "hnsw" else kind, vectors, options, threads, progress)


def _lists_of(lists: RaggedRows, queries: AnyArray) -> RaggedRows:
    if lists.rows.size == 0:
        return RaggedRows(lists.rows, np.zeros(queries.size + 1, np.int64))
    return RaggedRows.of([lists.rows[lists.offsets[q] : lists.offsets[q + 1]] for q in queries.tolist()])


def sizes(index: VectorIndex) -> dict[str, Any]:
    """Return the bytes of each stored array, by name."""
    return {name: array.nbytes for name, array in index.arrays().items()}
