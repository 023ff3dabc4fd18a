"""Features: what values become, what is unknown, and what an update keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import ConfigError
from engine.core.keys import key_of
from engine.core.memory import MemorySink
from engine.core.query import History, QueryBatch
from engine.core.types import RaggedRows
from engine.data.columns import MISSING_INT, CodedColumn, TagColumn
from engine.models.features import (
    Encoder,
    QueryEncoder,
    encode_histories,
    encode_histories_reference,
    hash_codes,
    hour_codes,
    load_encoded,
    moved_codes,
    save_encoded,
    take_encoded,
)
from engine.models.spec import Feature

ROWS = np.arange(4, dtype=np.int32)


def coded(name, values):
    column = CodedColumn.of(pa.array(values))
    vocabulary = column.vocabulary
    return {
        name: column.codes,
        f"{name}.vocabulary.offsets": vocabulary.offsets,
        f"{name}.vocabulary.data": vocabulary.data,
    }


def tagged(name, values):
    column = TagColumn.of(pa.array(values, pa.list_(pa.string())))
    return {
        f"{name}.offsets": column.offsets,
        f"{name}.codes": column.codes,
        f"{name}.vocabulary.offsets": column.vocabulary.offsets,
        f"{name}.vocabulary.data": column.vocabulary.data,
    }


COLUMNS = {
    "user_id.keys": np.array([10, 20, 30, 40]),
    **coded("city", ["Paris", "Rome", None, "Paris"]),
    **coded("os", ["a", "b", "a", None]),
    **tagged("tastes", [["x", "y"], [], None, ["y"]]),
    "age": np.array([10, 20, MISSING_INT, 40]),
    "income": np.array([1.0, np.nan, 3.0, 5.0], np.float32),
    "group": np.array([7, 5, MISSING_INT, 7]),
}


def fitted(*features, columns=COLUMNS, previous=None, rows=4):
    return Encoder.fit("user", features, rows, columns, "user_features", previous)


def codes_of(feature, columns=COLUMNS, rows=ROWS):
    return fitted(feature, columns=columns).encode(columns, rows).codes[:, 0].tolist()


def test_values_become_codes_and_what_is_missing_zero():
    assert codes_of(Feature(name="user_id", kind="id")) == [1, 2, 3, 4]
    assert codes_of(Feature(name="city", kind="categorical")) == [1, 2, 0, 1]
    assert codes_of(Feature(name="group", kind="categorical")) == [2, 1, 0, 2]
    assert codes_of(Feature(name="age", kind="numeric", scale="bucket", buckets=2)) == [1, 2, 0, 2]


def test_what_the_build_did_not_see_is_unknown():
    encoder = fitted(
        Feature(name="user_id", kind="id"), Feature(name="city", kind="id"), Feature(name="group", kind="id")
    )
    later = {"city": np.array([5], np.int32), "group": np.array([6])}
    assert encoder.encode(later, np.array([9], np.int32)).codes.tolist() == [[0, 0, 0]]
    assert encoder.encode({}, np.array([-1], np.int32)).codes.tolist() == [[0, 0, 0]]


def test_lists_become_codes_and_unknown_ones_are_left_out():
    encoder = fitted(Feature(name="tastes", kind="multi"))
    many = encoder.encode(COLUMNS, ROWS).multi[0]
    assert many.codes.tolist() == [1, 2, 2]
    assert many.offsets.tolist() == [0, 2, 2, 2, 3]
    other = {"tastes.offsets": np.array([0, 2]), "tastes.codes": np.array([7, 0], np.int32)}
    assert encoder.encode(other, ROWS[:1]).multi[0].codes.tolist() == [1]


@pytest.mark.parametrize("scale", ["none", "log"])
def test_numbers_are_scaled_and_say_where_they_are_missing(scale):
    numbers = fitted(Feature(name="income", kind="numeric", scale=scale)).encode(COLUMNS, ROWS).numbers
    assert numbers[:, 1].tolist() == [0, 1, 0, 0]
    assert numbers[1, 0] == 0
    known = numbers[[0, 2, 3], 0]
    assert abs(known.mean()) < 1e-6
    assert abs(known.std() - 1) < 1e-6


def test_ids_are_hashed_by_what_they_are_called():
    feature = Feature(name="user_id", kind="id", lookup="hash", size=5)
    codes = codes_of(feature)
    assert codes == hash_codes(COLUMNS["user_id.keys"], 5).tolist()
    assert min(codes) >= 1
    assert max(codes) <= 4
    moved = {**COLUMNS, "user_id.keys": COLUMNS["user_id.keys"][::-1].copy()}
    assert codes_of(feature, moved) == codes[::-1]
    assert codes_of(Feature(name="city", kind="id", lookup="hash", size=9))[2] == 0
    paris = int(hash_codes(np.array([key_of("Paris")]), 9)[0])
    assert codes_of(Feature(name="city", kind="id", lookup="hash", size=9))[0] == paris


@pytest.mark.parametrize(
    ("feature", "field", "says"),
    [
        (Feature(name="colour", kind="id"), "user_features.0.name", "users.parquet has no column 'colour'"),
        (Feature(name="context.weather", kind="id"), "user_features.0.name", "context.hour"),
        (Feature(name="context.device.model", kind="id"), "user_features.0.name", "'model'"),
        (Feature(name="city", kind="numeric"), "user_features.0.kind", "strings"),
        (Feature(name="tastes", kind="id"), "user_features.0.kind", "lists of strings"),
        (Feature(name="income", kind="id"), "user_features.0.kind", "float32 numbers"),
        (Feature(name="group", kind="multi"), "user_features.0.kind", "no lists"),
        (Feature(name="user_id", kind="categorical"), "user_features.0.kind", "an id"),
        (Feature(name="user_id", kind="id", lookup="hash"), "user_features.0.size", "2 or more"),
        (Feature(name="city", kind="categorical", lookup="hash"), "user_features.0.lookup", "hashed"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(feature, field, says):
    with pytest.raises(ConfigError, match=says) as caught:
        fitted(feature)
    assert caught.value.field == field


def every_feature():
    return (
        Feature(name="user_id", kind="id"),
        Feature(name="context.city", kind="categorical"),
        Feature(name="context.device.os", kind="categorical"),
        Feature(name="context.hour", kind="categorical"),
        Feature(name="group", kind="categorical"),
        Feature(name="age", kind="numeric", scale="bucket", buckets=3),
        Feature(name="income", kind="numeric", scale="log"),
        Feature(name="tastes", kind="multi"),
    )


def test_an_encoder_and_its_rows_come_back_from_disk():
    encoder, sink = fitted(*every_feature()), MemorySink()
    encoded = encoder.encode(COLUMNS, ROWS)
    encoder.save(sink)
    save_encoded(sink, "encoded.user", encoded)
    again = Encoder.load("user", encoder.features, sink.arrays)
    for other in (again.encode(COLUMNS, ROWS), load_encoded(sink.arrays, "encoded.user")):
        assert other.codes.tolist() == encoded.codes.tolist()
        assert other.numbers.tolist() == encoded.numbers.tolist()
        assert other.multi[0].codes.tolist() == encoded.multi[0].codes.tolist()
    assert again.words("context.city") == {"Paris": 1, "Rome": 2}


def test_rows_are_taken_and_strangers_know_nothing():
    encoder = fitted(*every_feature())
    taken = take_encoded(encoder.encode(COLUMNS, ROWS), np.array([3, -1, 0, 99], np.int32))
    assert taken.codes[:, 0].tolist() == [4, 0, 1, 0]
    assert taken.numbers[[1, 3]].tolist() == [[0, 1], [0, 1]]
    assert taken.multi[0].offsets.tolist() == [0, 1, 1, 3, 3]
    assert taken.multi[0].codes.tolist() == [2, 1, 2]


def test_a_request_says_where_and_when_and_else_the_catalogue_does():
    encoder = fitted(*every_feature())
    queries = QueryEncoder(encoder, encoder.encode(COLUMNS, ROWS), items=9, length=3)
    history = RaggedRows.of([np.array(rows, np.int32) for rows in ([4, 12, 2, 1, 0], [], [3])])
    batch = replace(
        QueryBatch.plain(
            np.array([0, 1, -1], np.int32),
            History(history.rows, np.ones(6, np.float32), np.ones(6, np.int64), history.offsets),
            now=3600 * 5 + 1,
        ),
        cities=("Rome", "", "Atlantis"),
        devices=({}, {"os": "a"}, {"os": "?"}),
    )
    encoded = queries.encode(batch)
    names = [feature.name for feature in encoder.features if feature.coded]
    by_name = {name: encoded.codes[:, at].tolist() for at, name in enumerate(names)}
    assert by_name["user_id"] == [1, 2, 0]
    assert by_name["context.city"] == [2, 2, 0]
    assert by_name["context.device.os"] == [1, 1, 0]
    assert by_name["context.hour"] == [6, 6, 6]
    assert encoded.lengths.tolist() == [3, 0, 1]
    assert encoded.sequence.tolist() == [[2, 3, 5], [0, 0, 0], [0, 0, 4]]


def test_a_hashed_user_needs_no_row():
    encoder = fitted(Feature(name="user_id", kind="id", lookup="hash", size=50))
    queries = QueryEncoder(encoder, encoder.encode(COLUMNS, ROWS), items=9, length=0)
    batch = replace(
        QueryBatch.plain(np.array([1, -1, -1], np.int32), History.empty(3)),
        user_ids=np.array([20, 777, -1]),
    )
    assert queries.encode(batch).codes[:, 0].tolist() == [*hash_codes(np.array([20, 777]), 50).tolist(), 0]


@given(st.lists(st.lists(st.integers(-1, 9), max_size=9), max_size=5), st.integers(0, 6), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_histories_are_encoded_as_plain_python_does(lists, length, items):
    rows = RaggedRows.of([np.array(mine, np.int32) for mine in lists])
    many = rows.rows.size
    history = History(rows.rows, np.ones(many, np.float32), np.zeros(many, np.int64), rows.offsets)
    codes, lengths = encode_histories(history, items, length)
    expected = encode_histories_reference(history, items, length)
    assert codes.tolist() == expected[0].tolist()
    assert lengths.tolist() == expected[1].tolist()


def test_an_update_finds_embeddings_again_by_what_they_stand_for():
    before = fitted(*every_feature())
    columns = {
        **COLUMNS,
        "user_id.keys": np.array([5, 10, 30, 50]),
        **coded("city", ["Rome", "Oslo", "Paris", None]),
        "age": np.array([100, 200, 300, 400]),
        "group": np.array([5, 6, 7, 8]),
    }
    now = fitted(*every_feature(), columns=columns, previous=before)
    at = {feature.name: place for place, feature in enumerate(now.features)}

    def moved(name):
        return now.moved(at[name], before, at[name]).tolist()

    assert moved("user_id") == [0, 0, 1, 3, 0]
    assert moved("context.city") == [0, 2, 0, 1]
    assert moved("group") == [0, 1, 0, 2, 0]
    assert moved("context.hour") == list(range(25))
    # Quantiles stay as they were, so that a bucket's embedding means what it meant.
    assert moved("age") == list(range(now.features[at["age"]].size))
    assert now.encode(columns, ROWS).codes[:, 5].tolist() == [3, 3, 3, 3]


def test_codes_move_by_key_where_nothing_was_before():
    assert moved_codes(np.array([3, 4]), np.empty(0, np.int64)).tolist() == [0, 0, 0]


def test_hours_are_those_of_utc():
    assert hour_codes(np.array([0, 1, 3600 * 23, 86_400 + 3600])).tolist() == [0, 1, 24, 2]
