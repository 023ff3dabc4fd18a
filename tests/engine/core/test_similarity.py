import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.blocks import over_blocks
from engine.core.channel import SilentProgress
from engine.core.similarity import (
    Finish,
    SparseRows,
    balanced_blocks,
    top_k_products,
    top_k_products_reference,
)


def sparse(dense):
    indptr = np.concatenate(([0], np.cumsum((dense != 0).sum(axis=1)))).astype(np.int64)
    rows, columns = np.nonzero(dense)
    return SparseRows(indptr, columns.astype(np.int32), dense[rows, columns].astype(np.float32))


def lists_of(blocks):
    out = []
    for block in blocks:
        at = 0
        for length in block.lengths.tolist():
            part = slice(at, at + length)
            out.append(
                list(zip(block.neighbours[part].tolist(), block.similarities[part].tolist(), strict=True))
            )
            at += length
    return out


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7)),
    seed=st.integers(0, 10_000),
    keep=st.integers(1, 5),
    shrinkage=st.sampled_from([0.0, 2.0]),
    amplification=st.sampled_from([1.0, 0.5]),
    normalize=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=150)
def test_the_kernel_does_what_its_plain_twin_does(
    shape, seed, keep, shrinkage, amplification, normalize, threads
):
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 4, shape) * (rng.random(shape) < 0.5)
    inner = (rng.integers(1, 5, shape[1]) / 4).astype(np.float32)
    source = (rng.integers(1, 5, shape[0]) / 4).astype(np.float32)
    target = (rng.integers(1, 5, shape[0]) / 4).astype(np.float32)
    finish = Finish(normalize, amplification, source)
    got = lists_of(
        top_k_products(
            sparse(dense),
            sparse(dense.T),
            inner,
            target,
            shrinkage,
            keep,
            finish,
            threads,
            SilentProgress(),
            "test",
        )
    )
    wanted = top_k_products_reference(dense, inner, target, shrinkage, keep, finish)
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        # float32 and float64 may order near-ties differently: similarities are compared, rows where they are clear.
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in theirs], rtol=1e-5)
        clear = {j for j, s in theirs if sum(abs(s - t) < 1e-5 * s for _, t in theirs) == 1}
        last = theirs[-1][1] if theirs else 0.0
        assert {j for j, _ in mine if j in clear} >= {
            j for j, s in theirs if j in clear and s > last * (1 + 1e-4)
        }


@given(cost=st.lists(st.integers(0, 50), max_size=300), threads=st.integers(1, 4))
def test_blocks_cover_every_row_once(cost, threads):
    blocks = balanced_blocks(np.array(cost, np.int64), threads)
    assert [row for begin, end in blocks for row in range(begin, end)] == list(range(len(cost)))


def test_results_come_in_order_whatever_finishes_first():
    assert list(
        over_blocks(lambda b, e: (b, e), [(i, i + 1) for i in range(40)], 3, SilentProgress(), "t")
    ) == [(i, i + 1) for i in range(40)]


def test_a_failing_block_fails_the_build_and_cancels_the_rest():
    begun = []

    def work(begin, end):
        begun.append(begin)
        if begin == 2:
            raise ValueError("broken")
        return end

    with pytest.raises(ValueError, match="broken"):
        list(over_blocks(work, [(i, i + 1) for i in range(1000)], 2, SilentProgress(), "t"))
    assert len(begun) < 100


def test_an_interrupted_consumer_cancels_the_rest():
    begun = []

    def work(begin, end):
        begun.append(begin)
        return end

    results = over_blocks(work, [(i, i + 1) for i in range(1000)], 2, SilentProgress(), "t")
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert len(begun) < 100
