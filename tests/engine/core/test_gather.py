"""The neighbour gather: held to its plain twin, and to an answer drawn by hand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.gather import gather_top_k, gather_top_k_reference


@st.composite
def gathers(draw):
    lists, items, queries = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 8), min_size=lists, max_size=lists))
    m = sum(lengths)
    # Quarters are exact in float32, so that the twin's other order of adding changes nothing.
    scores = st.integers(-4, 12).map(lambda n: n / 4)
    triggers = [draw(st.lists(st.integers(-1, lists), max_size=6)) for _ in range(queries)]
    t = sum(len(part) for part in triggers)
    return {
        "trigger_offsets": np.concatenate(([0], np.cumsum([len(p) for p in triggers]))).astype(np.int64),
        "trigger_rows": np.array([row for part in triggers for row in part], np.int32),
        "trigger_weights": np.array(draw(st.lists(scores, min_size=t, max_size=t)), np.float32),
        "indptr": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        "neighbours": np.array(draw(st.lists(st.integers(0, items - 1), min_size=m, max_size=m)), np.int32),
        "similarities": np.array(draw(st.lists(scores, min_size=m, max_size=m)), np.float32),
        "last_n": draw(st.integers(1, 6)),
        "width": draw(st.integers(1, 8)),
        "k": np.array(draw(st.lists(st.integers(0, 10), min_size=queries, max_size=queries)), np.int32),
    }


@given(call=gathers())
@settings(deadline=None, max_examples=300)
def test_the_kernel_does_what_its_plain_twin_does(call):
    got, wanted = gather_top_k(**call), gather_top_k_reference(**call)
    assert got.offsets.tolist() == wanted.offsets.tolist()
    assert got.rows.tolist() == wanted.rows.tolist()
    assert got.scores.tolist() == wanted.scores.tolist()
    assert got.triggers.tolist() == wanted.triggers.tolist()


@given(call=gathers())
@settings(deadline=None, max_examples=100)
def test_a_batch_answers_as_its_queries_do_alone(call):
    together = gather_top_k(**call)
    for q in range(call["k"].size):
        offsets = call["trigger_offsets"]
        part = slice(offsets[q], offsets[q + 1])
        alone = gather_top_k(
            **call
            | {
                "trigger_offsets": np.array([0, part.stop - part.start], np.int64),
                "trigger_rows": call["trigger_rows"][part],
                "trigger_weights": call["trigger_weights"][part],
                "k": call["k"][q : q + 1],
            }
        )
        mine = together.query(q)
        assert mine.rows.tolist() == alone.rows.tolist()
        assert mine.scores.tobytes() == alone.scores.tobytes()
        assert mine.triggers.tolist() == alone.triggers.tolist()


def test_scores_of_an_item_reached_twice_add_up_and_the_larger_gain_names_the_trigger():
    # Lists: 0 -> {5: 1.0, 6: 0.5}, 1 -> {5: 2.0, 7: 0.25}; the user likes list 0 with 1 and list 1 with 2.
    got = gather_top_k(
        trigger_offsets=np.array([0, 2], np.int64),
        trigger_rows=np.array([0, 1], np.int32),
        trigger_weights=np.array([1, 2], np.float32),
        indptr=np.array([0, 2, 4], np.int64),
        neighbours=np.array([5, 6, 5, 7], np.int32),
        similarities=np.array([1.0, 0.5, 2.0, 0.25], np.float32),
        last_n=10,
        width=10,
        k=np.array([10], np.int32),
    )
    assert got.rows.tolist() == [5, 6, 7]  # 6 and 7 tie at 0.5: the lower row first
    assert got.scores.tolist() == [5.0, 0.5, 0.5]
    assert got.triggers.tolist() == [1, 0, 1]


def test_a_large_gather_after_a_small_one_grows_the_tables():
    rng = np.random.default_rng(0)
    for lists in (2, 3000, 2):
        call = {
            "trigger_offsets": np.array([0, lists], np.int64),
            "trigger_rows": np.arange(lists, dtype=np.int32),
            "trigger_weights": np.ones(lists, np.float32),
            "indptr": np.arange(0, 10 * lists + 1, 10, dtype=np.int64),
            "neighbours": rng.integers(0, 50_000, 10 * lists).astype(np.int32),
            "similarities": (rng.integers(1, 8, 10 * lists) / 4).astype(np.float32),
            "last_n": lists,
            "width": 10,
            "k": np.array([100], np.int32),
        }
        assert gather_top_k(**call).rows.tolist() == gather_top_k_reference(**call).rows.tolist()
