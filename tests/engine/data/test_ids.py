"""The id index against plain dictionaries."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.core.errors import DatasetError
from engine.data.ids import MAX_ID_BYTES, IdIndex

MAX = 2**63 - 1
int64s = st.integers(-(2**63), MAX)
known_ints = st.lists(st.integers(0, MAX) | st.integers(0, 50))
strings = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


def twin(ids: list, key=None) -> dict:
    return {id_: row for row, id_ in enumerate(sorted(set(ids), key=key))}


@settings(deadline=None)
@given(known_ints, st.lists(int64s | st.integers(0, 50)))
@example([0, MAX], [-1, 0, 1, MAX - 1, MAX, -(2**63)])
@example([], [0, MAX])
@example([5 << 40, 6 << 40, 7 << 40], [5 << 40, 8 << 40])
def test_integer_rows_are_those_of_a_dictionary(known, wanted):
    index, rows = IdIndex.of(np.array(known, np.int64)), twin(known)
    queries = np.array(known + wanted, np.int64)
    assert index.rows(queries).tolist() == [rows.get(id_, -1) for id_ in queries.tolist()]
    assert index.rows(queries).dtype == np.int32
    assert index.ids(np.arange(len(index), dtype=np.int32)).tolist() == list(rows)


@settings(deadline=None)
@given(st.lists(strings), st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)))
@example(["a"], ["a\0", "", "aa", "a"])
@example(["b", "é", "\U0001f600", "z"], ["É"])
def test_string_rows_are_those_of_a_dictionary_in_byte_order(known, wanted):
    index, rows = IdIndex.of(pa.array(known, pa.string())), twin(known, key=str.encode)
    queries = known + wanted
    assert index.rows(queries).tolist() == [rows.get(id_, -1) for id_ in queries]
    assert index.ids(np.arange(len(index), dtype=np.int32)).tolist() == list(rows)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1],
        np.array([3, 1, 1], np.int32),
        np.array([3, 1], np.uint64),
        np.array([[3, 0], [1, 0]])[:, 0],
        pa.array([3, 1, 3]),
        pa.chunked_array([pa.array([3], pa.int16()), pa.array([1], pa.int16())]),
    ],
)
def test_integers_come_in_any_array(ids):
    index = IdIndex.of(ids)
    assert (index.kind, len(index)) == ("int64", 2)
    assert IdIndex.of([1, 3]).rows(ids)[:2].tolist() == [1, 0]


@pytest.mark.parametrize(
    "ids",
    [
        ["u3", "u1"],
        np.array(["u3", "u1"]),
        np.array(["u3", "u1"], object),
        np.array([b"u3", b"u1"]),
        pa.array(["u3", "u1"]).dictionary_encode(),
        pa.chunked_array([pa.array(["", "u3"]).slice(1), pa.array(["u1"])]),
    ],
)
def test_strings_come_in_any_array(ids):
    index = IdIndex.of(ids)
    assert (index.kind, len(index)) == ("string", 2)
    assert index.rows(ids).tolist() == [1, 0]


def test_ids_that_cannot_be_known_have_no_row():
    assert IdIndex.of([1, 2]).rows(np.array([2**64 - 1], np.uint64)).tolist() == [-1]
    assert IdIndex.of([1, 2]).rows(pa.array([None, 2], pa.int64())).tolist() == [-1, 1]
    assert IdIndex.of(["a"]).rows([None, "a", "a" * 1000, ""]).tolist() == [-1, 0, -1, -1]


def test_no_ids_ask_nothing():
    assert IdIndex.of([1]).rows([]).tolist() == []
    assert IdIndex.of(["a"]).rows([]).tolist() == []
    assert IdIndex.of(pa.array([], pa.string())).rows(["a", "b"]).tolist() == [-1, -1]


def test_ids_of_the_other_kind_are_a_type_error():
    with pytest.raises(TypeError):
        IdIndex.of([1]).rows(["1"])
    with pytest.raises(TypeError):
        IdIndex.of([1]).rows(np.array([1.0]))
    with pytest.raises(TypeError):
        IdIndex.of(["1"]).rows([1])
    with pytest.raises(TypeError):
        IdIndex.of(["1"]).rows(np.array([1]))


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, -1], "0 or more"),
        (pa.array([1, None]), "0 or more"),
        (["a", ""], "1 are not"),
        (["a\0b", "\0", "c"], "2 are not"),
        (["x" * (MAX_ID_BYTES + 1)], "1 to 256 bytes"),
    ],
)
def test_bad_ids_are_refused_with_their_place(ids, text):
    with pytest.raises(DatasetError, match=text) as caught:
        IdIndex.of(ids, "items.parquet", "item_id")
    assert (caught.value.file, caught.value.column) == ("items.parquet", "item_id")


def test_the_longest_allowed_string_is_found():
    longest = "é" * (MAX_ID_BYTES // 2)
    assert IdIndex.of([longest, "a"]).rows([longest, longest + "x"]).tolist() == [1, -1]


@pytest.mark.parametrize("ids", [[0, 5, MAX], ["a", "bb"], []])
def test_an_index_survives_the_disk(ids, through_disk):
    index = IdIndex.of(ids)
    loaded = IdIndex.load(through_disk(index, "items"), "items")
    assert loaded.kind == index.kind
    assert loaded.rows(ids).tolist() == list(range(len(ids)))
    assert loaded.ids(np.arange(len(ids), dtype=np.int32)).tolist() == ids


def test_an_index_can_be_sent_to_another_process():
    for ids in ([0, 5, MAX], ["a", "bb"]):
        copy = pickle.loads(pickle.dumps(IdIndex.of(ids)))
        assert copy.rows(ids).tolist() == list(range(len(ids)))


def test_a_large_index_finds_each_of_its_ids():
    ids = np.unique(np.random.default_rng(1).integers(0, MAX, 200_000)) & ~np.int64(1)
    index = IdIndex.of(ids)
    assert np.array_equal(index.rows(index.ids(np.arange(len(index)))), np.arange(len(index)))
    assert (index.rows(ids + 1) == -1).all()
