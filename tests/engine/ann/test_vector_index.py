"""The contract of vector indexes, for every kind; and what is particular to some."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.ann import IndexKind, IndexOptions, VectorIndex, build_index, graph_hnswlib, load_index
from engine.ann.graph_hnswlib import HnswlibGraph
from engine.ann.kernels import answer, answer_reference, no_rows, rescore, rescore_reference
from engine.ann.lists import ByteLists, in_bytes, look, look_reference
from engine.ann.walk import walk_reference
from engine.core.channel import SilentProgress
from engine.core.errors import BuildError, SnapshotError
from engine.core.types import BoolArray, Float32Array, Int32Array, RaggedRows

KINDS = get_args(IndexKind)
ITEMS, DIMENSION = 4000, 16
OPTIONS = IndexOptions(ef_construction=60, ef_search=100, lists=40, probes=12, parts=8, bits=6, tail=50)

needs_hnswlib = pytest.mark.skipif(not graph_hnswlib.installed(), reason="hnswlib is not installed")


def clustered(count: int, seed: int) -> Float32Array:
    centres = np.random.default_rng(1).standard_normal((40, DIMENSION))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 40, count)] + 0.5 * random.standard_normal((count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS = clustered(ITEMS, 2)
QUERIES = clustered(40, 3)


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest) -> VectorIndex:
    return build_index(request.param, VECTORS, OPTIONS, threads=1, run="a")


@pytest.fixture
def index(built: VectorIndex) -> VectorIndex:
    """A fresh one, that a test may add to."""
    return load_index(built.arrays(), VECTORS, OPTIONS)


def truth(
    k: int,
    vectors: Float32Array = VECTORS,
    forbidden: BoolArray | None = None,
    queries: Float32Array = QUERIES,
) -> Int32Array:
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    if forbidden is not None:
        products[:, forbidden] = -np.inf
    return np.argsort(-products, axis=1, kind="stable")[:, :k].astype(np.int32)


def recall(rows: Int32Array, wanted: Int32Array) -> float:
    return float(np.mean([np.isin(mine, its).mean() for mine, its in zip(wanted, rows, strict=True)]))


def test_what_it_finds_is_what_is_near(built: VectorIndex) -> None:
    rows, scores = built.search(QUERIES, 50)
    assert (rows.dtype, scores.dtype, rows.shape, scores.shape) == (np.int32, np.float32, (40, 50), (40, 50))
    assert recall(rows, truth(50)) >= (1.0 if built.kind == "exact" else 0.9)
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", QUERIES, VECTORS[rows]), atol=1e-5)
    assert all(len(set(mine)) == 50 for mine in rows.tolist())
    assert len(built) == ITEMS


def test_a_query_gets_the_same_alone_and_among_others(built: VectorIndex) -> None:
    k = np.arange(40, dtype=np.int32) * 3
    forbidden = np.arange(ITEMS) % 3 == 0
    excluded = RaggedRows.of([truth(150)[q, : 4 * q] for q in range(40)])
    rows, scores = built.search_masked(QUERIES, k, forbidden, excluded)
    for q in range(0, 40, 4):
        mine = slice(q, q + 1)
        row, score = built.search_masked(QUERIES[mine], k[mine], forbidden, excluded.alone(q))
        np.testing.assert_array_equal(row[0], rows[q, : k[q]])
        np.testing.assert_array_equal(score[0], scores[q, : k[q]])
        assert (rows[q, k[q] :] == -1).all()
        assert (scores[q, k[q] :] == -np.inf).all()


def test_stored_and_loaded_it_answers_alike(built: VectorIndex, tmp_path: Path) -> None:
    for name, array in built.arrays().items():
        np.save(tmp_path / f"{name}.npy", array)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in tmp_path.glob("*.npy")}
    loaded = load_index(arrays, VECTORS, OPTIONS, run="a")
    for mine, its in zip(loaded.search(QUERIES, 30), built.search(QUERIES, 30), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert (loaded.kind, loaded.library, loaded.run) == (built.kind, built.library, "a")


def test_built_again_with_one_thread_it_is_the_same(built: VectorIndex) -> None:
    again = build_index(built.kind, VECTORS, OPTIONS, threads=1, run="a")
    for mine, its in zip(again.search(QUERIES, 50), built.search(QUERIES, 50), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_a_new_row_is_found_at_once(index: VectorIndex) -> None:
    new = clustered(300, 4)
    for start in range(0, 300, 100):  # past the tail, so that some go into the library's part
        index.add(np.arange(ITEMS + start, ITEMS + start + 100, dtype=np.int32), new[start : start + 100])
        assert len(index) == ITEMS + start + 100
    rows, _ = index.search(new, 5)
    assert np.mean(rows[:, 0] == np.arange(ITEMS, ITEMS + 300)) >= 0.97
    assert (rows[250:, 0] == np.arange(ITEMS + 250, ITEMS + 300)).all()
    assert recall(index.search(QUERIES, 50)[0], truth(50, np.concatenate([VECTORS, new]))) >= 0.9


def test_a_changed_vector_takes_the_place_of_the_old(index: VectorIndex) -> None:
    changed = np.array([5, 17, 3000], np.int32)
    index.add(changed, -VECTORS[changed])
    index.add(np.array([17, 17], np.int32), np.stack([VECTORS[17], -QUERIES[0]]))
    rows, _ = index.search(VECTORS[changed], 100)
    assert not np.isin(rows, changed).any()
    rows, scores = index.search(np.concatenate([-VECTORS[changed], -QUERIES[:1]]), 1)
    assert rows[[0, 2, 3], 0].tolist() == [5, 3000, 17]
    np.testing.assert_allclose(scores[[0, 2, 3], 0], 1, atol=1e-5)
    assert len(index) == ITEMS


def test_many_changed_vectors_do_not_come_back_with_the_old(index: VectorIndex) -> None:
    rows = np.arange(400, dtype=np.int32)
    for _ in range(3):
        index.add(rows, -VECTORS[rows])
    found, _ = index.search(VECTORS[rows[:50]], 20)
    assert not (found == rows[:50, None]).any()
    assert (index.search(-VECTORS[rows], 1)[0][:, 0] == rows).mean() >= 0.95
    assert len(index) == ITEMS


def test_ties_go_to_the_lower_row(built: VectorIndex) -> None:
    index = build_index(built.kind, np.repeat(VECTORS[:300], 4, axis=0), OPTIONS, threads=1)
    rows, scores = index.search(VECTORS[:20], 40)
    exactly = scores[:, 1:] == scores[:, :-1]
    assert exactly.any()
    assert (np.diff(rows, axis=1)[exactly] > 0).all()


def test_fewer_vectors_than_asked_for_are_padded(built: VectorIndex) -> None:
    few = 300 if built.kind == "ivf_pq" else 7
    options = OPTIONS.model_copy(update={"lists": None})
    index = build_index(built.kind, VECTORS[:few], options, threads=1)
    rows, scores = index.search(QUERIES, few + 3)
    np.testing.assert_array_equal(np.sort(rows[:, :few], axis=1), np.tile(np.arange(few), (40, 1)))
    assert (rows[:, few:] == -1).all()
    assert (scores[:, few:] == -np.inf).all()


def test_no_vectors_at_all_then_some(built: VectorIndex) -> None:
    index = build_index(built.kind, VECTORS[:0], OPTIONS)
    index = load_index(index.arrays(), VECTORS[:0], OPTIONS)
    assert index.search(QUERIES, 2)[0].tolist() == [[-1, -1]] * 40
    index.add(np.array([0], np.int32), VECTORS[:1])
    assert index.search(QUERIES, 2)[0].tolist() == [[0, -1]] * 40
    assert index.search(QUERIES[:0], 2)[0].shape == (0, 2)
    assert index.search(QUERIES, 0)[0].shape == (40, 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97, 0.999, 1.0])
def test_a_masked_search_is_not_short_while_enough_may_be_had(index: VectorIndex, share: float) -> None:
    index.add(np.arange(ITEMS, ITEMS + 100, dtype=np.int32), clustered(100, 5))
    forbidden = np.random.default_rng(6).random(ITEMS + 100) < share
    near = truth(60)
    excluded = RaggedRows.of([near[q, : q % 3 * 30] for q in range(40)])
    rows, _ = index.search_masked(QUERIES, np.full(40, 50, np.int32), forbidden, excluded)
    for q in range(40):
        mine = rows[q][rows[q] >= 0]
        its = excluded.rows[excluded.offsets[q] : excluded.offsets[q + 1]]
        left = ITEMS + 100 - np.count_nonzero(forbidden) - np.count_nonzero(~forbidden[its])
        assert mine.size == min(50, left)
        assert not forbidden[mine].any()
        assert not np.isin(mine, its).any()


def test_what_is_forbidden_costs_no_recall(built: VectorIndex) -> None:
    # Worst where it lies together: all that is near the query.
    forbidden = np.zeros(ITEMS, np.bool_)
    forbidden[np.unique(truth(300, queries=QUERIES[:4]))] = True
    rows, _ = built.search_masked(QUERIES[:4], np.full(4, 50, np.int32), forbidden)
    assert recall(rows, truth(50, forbidden=forbidden, queries=QUERIES[:4])) >= 0.9


def test_inner_products_of_vectors_of_different_length(built: VectorIndex) -> None:
    lengths = np.random.default_rng(7).lognormal(0, 0.3, (ITEMS, 1)).astype(np.float32)
    vectors = VECTORS * lengths
    options = OPTIONS.model_copy(update={"ef_search": 200, "probes": 30})
    rows, _ = build_index(built.kind, vectors, options, threads=1).search(QUERIES, 50)
    assert recall(rows, truth(50, vectors)) >= 0.9


def test_vectors_that_are_not_finite_are_refused(index: VectorIndex) -> None:
    broken = VECTORS[:100].copy()
    broken[42, 3] = np.nan
    with pytest.raises(BuildError, match="row 42 is not finite"):
        build_index(index.kind, broken, OPTIONS)
    with pytest.raises(BuildError, match="row 4042 is not finite"):
        index.add(np.arange(ITEMS, ITEMS + 100, dtype=np.int32), broken)
    assert len(index) == ITEMS


@pytest.mark.parametrize(
    "vectors",
    [VECTORS.astype(np.float64), VECTORS[0], np.empty((5, 0), np.float32)],
    ids=["f8", "1-d", "d=0"],
)
def test_vectors_of_another_form_are_refused(index: VectorIndex, vectors: Any) -> None:
    with pytest.raises(BuildError, match="expected float32 vectors"):
        build_index(index.kind, vectors, OPTIONS)
    with pytest.raises(BuildError, match="rows of 16 dimensions"):
        index.add(np.zeros(1, np.int32), np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match="16 dimensions"):
        index.search(np.zeros((1, 5), np.float32), 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(items=5),
        lambda header: header.update(format=99),
        lambda header: header.pop("kind"),
    ],
    ids=["items", "format", "kind"],
)
def test_other_arrays_than_its_own_are_refused(built: VectorIndex, change: Callable[[Any], Any]) -> None:
    arrays = dict(built.arrays())
    header = json.loads(bytes(arrays["header"]))
    change(header)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with pytest.raises(SnapshotError, match="header: "):
        load_index(arrays, VECTORS, OPTIONS)


def test_damaged_and_foreign_indexes_are_refused(built: VectorIndex) -> None:
    arrays = dict(built.arrays())
    with pytest.raises(SnapshotError, match="of run 'a', the model of run 'b'"):
        load_index(arrays, VECTORS, OPTIONS, run="b")
    with pytest.raises(SnapshotError, match="no header"):
        load_index({}, VECTORS, OPTIONS)
    if built.kind != "exact":
        with pytest.raises(SnapshotError, match="damaged"):
            load_index({"header": arrays["header"]}, VECTORS, OPTIONS)


def test_an_index_that_was_added_to_is_not_stored(index: VectorIndex) -> None:
    index.add(np.array([ITEMS], np.int32), VECTORS[:1])
    with pytest.raises(BuildError, match="not stored"):
        index.arrays()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ivf_flat", {"lists": 5000}, "5,000 lists, of 4,000 vectors"),
        ("ivf_pq", {"parts": 5}, "5 parts do not divide the 16 dimensions"),
        ("ivf_pq", {"bits": 12}, "codes of 12 bits need 4,096 vectors, there are 4,000"),
    ],
)
def test_options_that_do_not_fit_the_vectors(kind: IndexKind, options: dict[str, int], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build_index(kind, VECTORS, IndexOptions(**options))


@pytest.mark.parametrize("options", [{"m": 1}, {"ef_search": 0}, {"bits": 3}, {"nprobe": 4}, {"rerank": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        IndexOptions(**options)


def test_progress_counts_every_vector(built: VectorIndex) -> None:
    class Counting(SilentProgress):
        def __init__(self) -> None:
            self.tasks: list[list[int]] = []

        def start(self, task: str, total: int) -> None:
            self.tasks.append([total, 0])

        def advance(self, amount: int = 1) -> None:
            self.tasks[-1][1] += amount

    progress = Counting()
    build_index(built.kind, VECTORS, OPTIONS, threads=2 if built.kind == "hnsw" else 1, progress=progress)
    assert all(total == done for total, done in progress.tasks)
    assert bool(progress.tasks) == (built.kind != "exact")


def test_without_hnswlib_faiss_takes_its_place_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graph_hnswlib, "installed", lambda: False)
    with caplog.at_level(logging.WARNING):
        index = build_index("hnsw", VECTORS[:500], OPTIONS)
    assert "hnswlib is not installed, faiss's HNSW takes its place" in caplog.text
    assert (index.kind, index.library[:5]) == ("hnsw", "faiss")
    loaded = load_index(index.arrays(), VECTORS[:500], OPTIONS)
    np.testing.assert_array_equal(loaded.search(QUERIES, 9)[0], index.search(QUERIES, 9)[0])


@needs_hnswlib
def test_a_graph_of_hnswlib_is_served_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_index("hnsw", VECTORS[:500], OPTIONS)
    monkeypatch.setattr(graph_hnswlib, "installed", lambda: False)
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    index = load_index(built.arrays(), VECTORS[:500], OPTIONS)
    np.testing.assert_array_equal(index.search(QUERIES, 9)[0], built.search(QUERIES, 9)[0])
    index.add(np.arange(500, 800, dtype=np.int32), VECTORS[500:800])
    assert recall(index.search(QUERIES, 9)[0], truth(9, VECTORS[:800])) >= 0.9


@needs_hnswlib
@pytest.mark.parametrize("threads", [1, 2])
def test_the_walk_is_its_plain_twin(threads: int) -> None:
    graph = HnswlibGraph.build(VECTORS, IndexOptions(m=6, ef_construction=40), threads, SilentProgress())
    for depth in (1, 7, 60):
        entries, scores = graph.search(QUERIES[:15], depth, 0)
        for q in range(15):
            wanted = walk_reference(QUERIES[q], graph.graph, depth)
            assert len(set(entries[q].tolist()) & wanted.keys()) >= 0.95 * depth  # rounding may part the ways
            np.testing.assert_allclose(scores[q], VECTORS[entries[q]] @ QUERIES[q], atol=1e-5)


@needs_hnswlib
def test_many_searches_do_not_run_out_of_marks() -> None:
    graph = HnswlibGraph.build(VECTORS[:200], OPTIONS, 1, SilentProgress())
    wanted, _ = graph.search(QUERIES, 20, 0)
    for _ in range(1700):
        found, _ = graph.search(QUERIES, 20, 0)
    np.testing.assert_array_equal(found, wanted)


@needs_hnswlib
@pytest.mark.parametrize(
    "change", [{"ser_version": 2}, {"cur_element_count": 399}, {"size_links_per_element": 400}]
)
def test_a_graph_in_another_form_is_refused(change: dict[str, int]) -> None:
    arrays = dict(build_index("hnsw", VECTORS[:400], OPTIONS).arrays())
    header = json.loads(bytes(arrays["header"]))
    header["parameters"] |= change
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with pytest.raises(SnapshotError, match="damaged"):
        load_index(arrays, VECTORS[:400], OPTIONS)


small = st.integers(1, 12)


@st.composite
def questions(draw: st.DrawFn) -> tuple[Any, ...]:
    n, items, grown, depth = draw(st.integers(1, 3)), draw(small), draw(small), draw(st.integers(0, 8))
    # Small whole numbers: products are exact, and ties many.
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries, vectors, new = (random.integers(-2, 3, (m, 3)).astype(np.float32) for m in (n, items, grown))
    replaced = random.random(items) < 0.3
    grown_rows = np.full(grown, -1, np.int32)
    rows = np.concatenate([np.flatnonzero(replaced), np.arange(items, items + grown)])[:grown]
    grown_rows[: rows.size] = rows
    moved = draw(st.integers(0, grown))
    found = np.stack([random.permutation(np.arange(-1, items + moved))[:depth] for _ in range(n)]).astype(
        np.int32
    )
    both = np.concatenate([vectors, new])
    found_scores = np.einsum("qd,qid->qi", queries, both[found]).astype(np.float32)
    forbidden = random.random(draw(st.integers(0, items + grown))) < 0.3
    excluded = RaggedRows.of(
        [random.integers(0, items + grown, random.integers(0, 6)).astype(np.int32) for _ in range(n)]
    )
    wanted = random.integers(0, 9, n).astype(np.int32)
    scan = draw(st.booleans())
    if scan:
        found, found_scores, moved = found[:, :0], found_scores[:, :0], 0
    return (
        queries, found, found_scores, scan, vectors, replaced if draw(st.booleans()) or replaced.any() else replaced[:0],
        new, grown_rows, (moved, grown), forbidden, excluded, wanted,
    )  # fmt: skip


@settings(deadline=None)
@given(questions())
def test_the_answer_kernel_is_its_plain_twin(question: tuple[Any, ...]) -> None:
    *first, grown_range, forbidden, excluded, wanted = question
    rows = np.empty((wanted.size, 9), np.int32)
    scores = np.empty((wanted.size, 9), np.float32)
    answer(*first, *grown_range, forbidden, excluded.rows, excluded.offsets, wanted, rows, scores)
    for q, pairs in enumerate(answer_reference(*question)):
        assert [
            (int(row), float(score)) for row, score in zip(rows[q], scores[q], strict=True) if row >= 0
        ] == pairs
        assert (scores[q, len(pairs) :] == -np.inf).all()


def test_rescoring_is_its_plain_twin() -> None:
    entries = np.random.default_rng(8).integers(-1, 110, (40, 30)).astype(np.int32)
    scores = np.empty((40, 30), np.float32)
    rescore(QUERIES, entries, VECTORS[:100], VECTORS[100:110], scores)
    wanted = rescore_reference(QUERIES, entries, VECTORS[:100], VECTORS[100:110])
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    assert no_rows(2)[1].tolist() == [0, 0, 0]


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_lists_of_bytes_are_looked_into_as_by_the_plain_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d, lists = int(rng.integers(1, 400)), int(rng.integers(1, 20)), int(rng.integers(1, 8))
    vectors = rng.standard_normal((n, d), np.float32)
    centres, centre_scales = in_bytes(rng.standard_normal((lists, d), np.float32))
    of = np.sort(rng.integers(0, lists, n))
    offsets = np.searchsorted(of, np.arange(lists + 1)).astype(np.int64)
    codes, scales = in_bytes(vectors)
    np.testing.assert_allclose(codes * scales[:, None], vectors, atol=float(scales.max()) * 0.51)
    numbers = rng.permutation(n).astype(np.int32)
    queries = rng.standard_normal((2, d), np.float32)
    probes, depth = int(rng.integers(1, lists + 1)), int(rng.integers(1, 100))
    entries = np.empty((2, depth), np.int32)
    look(queries, centres, centre_scales, offsets, codes, scales, numbers, probes, entries)
    for q in range(2):
        expected = look_reference(
            queries[q], centres, centre_scales, offsets, codes, scales, numbers, probes, depth
        )
        mine = entries[q][entries[q] >= 0]
        assert mine.size == np.unique(mine).size == len(expected)
        if d > 4:  # with few dimensions products of integers are equal, and which of them comes first is open
            assert set(mine.tolist()) == expected


def test_lists_of_bytes_are_not_copied_and_keep_what_is_added_in_the_tail() -> None:
    arrays = dict(build_index("ivf_int8", VECTORS, OPTIONS).arrays())
    index = load_index(arrays, VECTORS, OPTIONS.model_copy(update={"tail": 0}))
    assert isinstance(index._part, ByteLists)
    assert np.shares_memory(index._part.arrays()["codes"], arrays["codes"])
    index.add(np.array([ITEMS], np.int32), VECTORS[:1] * 2)
    rows, _ = index.search(VECTORS[:1], 1)
    assert rows.tolist() == [[ITEMS]]
    damaged = {**arrays, "codes": arrays["codes"][1:]}
    with pytest.raises(SnapshotError, match="lists do not hold all vectors"):
        load_index(damaged, VECTORS)
