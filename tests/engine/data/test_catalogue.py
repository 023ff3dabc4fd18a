"""The catalogue: which rows there are, what stands beside them, and the way to disk and back."""

from __future__ import annotations

from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from engine.data.catalogue import NO_TIME, Catalogue
from engine.data.columns import MISSING_INT, TagColumn, TextColumn
from engine.data.dataset import Dataset

# Interactions name items 10, 30, 50 and users 7, 9: item 30 is unknown here, 20 has no events.
ITEMS = {
    "item_id": pa.array([50, 20, 10], pa.int32()),
    "author_id": [3, None, 8],
    "published_at": pa.array([500, None, 100], pa.uint64()),
    "title": ["fifty", None, "tén"],
    "tags": [["b", "a"], None, ["a", None]],
    "city": ["Paris", "", None],
    "latitude": pa.array([1, None, 2], pa.int32()),
    "longitude": [None, 0.5, 1.5],
    "quality": [0.5, None, 1.0],
    "duration_seconds": pa.array([2**60 + 1, 10, None]),
    "score": pa.array([5, 2, None], pa.int8()),
    "flag": [True, False, None],
    "half": pa.array([0.5, None, 1.5], pa.float32()),
    "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    "tiny": pa.array([0.5, None, 1.5], pa.float16()),
    "code": pa.array([2**64 - 1, None, 7], pa.uint64()),
    "large": [2**60 + 1, None, 0],
    "moods": [["m"], [], ["n", "m"]],
    "when": pa.array([1, 2, 3], pa.timestamp("s")),
}
USERS = {"user_id": [9, 1]}
AUTHORS = {"author_id": [8, 5], "name": ["Ann", "Bob"]}


@pytest.fixture
def catalogue(make_folder) -> Catalogue:
    return Catalogue.from_dataset(Dataset.open(make_folder(items=ITEMS, users=USERS, authors=AUTHORS)))


def same(got, expected):
    np.testing.assert_array_equal(got, np.array(expected, got.dtype))


def check(catalogue: Catalogue) -> None:
    same(catalogue.items.ids(np.arange(4)), [10, 20, 30, 50])
    same(catalogue.users.ids(np.arange(3)), [1, 7, 9])
    same(catalogue.authors.ids(np.arange(3)), [3, 5, 8])
    nan = np.nan
    expected = {
        "author": ("int32", [2, -1, -1, 0]),
        "published_at": ("int64", [100, NO_TIME, NO_TIME, 500]),
        "latitude": ("float64", [2, nan, nan, 1]),
        "longitude": ("float64", [1.5, 0.5, nan, nan]),
        "quality": ("float32", [1, nan, nan, 0.5]),
        "duration_seconds": ("float32", [nan, 10, nan, 2.0**60]),
        "score": ("int64", [MISSING_INT, 2, MISSING_INT, 5]),
        "flag": ("int64", [MISSING_INT, 0, MISSING_INT, 1]),
        "half": ("float32", [1.5, nan, nan, 0.5]),
        "tiny": ("float32", [1.5, nan, nan, 0.5]),
        "code": ("float64", [7, nan, nan, 2.0**64]),
        "large": ("int64", [0, MISSING_INT, MISSING_INT, 2**60 + 1]),
    }
    assert set(catalogue.numeric) == set(expected)
    for name, (dtype, values) in expected.items():
        assert catalogue.numeric[name].dtype == dtype, name
        same(catalogue.numeric[name], values)
    rows = np.arange(4)
    assert catalogue.texts["title"].take(rows) == ["tén", "", "", "fifty"]
    assert catalogue.tags["tags"].take(rows) == [["a"], [], [], ["b", "a"]]
    assert catalogue.tags["moods"].take(rows) == [["n", "m"], [], [], ["m"]]
    assert catalogue.coded["city"].take(rows) == ["", "", "", "Paris"]
    assert (catalogue.coded["city"].codes >= 0).tolist() == [False, True, False, True]
    assert catalogue.coded["kind"].take(rows) == ["x", "y", "", "x"]
    assert catalogue.author_names.take(np.arange(3)) == ["", "Bob", "Ann"]
    assert catalogue.skipped == ("when",)
    assert catalogue.id_type == "int64"


def test_columns_stand_at_the_rows_of_their_items(catalogue):
    check(catalogue)


def test_a_catalogue_survives_the_disk(catalogue, through_disk):
    check(Catalogue.load(through_disk(catalogue)))


def test_people_see_titles_authors_and_tags(catalogue):
    seen = catalogue.describe_items(np.array([3, 0, 2], np.int32))
    assert [(item.id, item.title, item.author, item.tags) for item in seen] == [
        (50, "fifty", "3", ("b", "a")),
        (10, "tén", "Ann", ("a",)),
        (30, "", "", ()),
    ]
    assert catalogue.describe_items(np.empty(0, np.int32)) == []
    with pytest.raises(IndexError):
        catalogue.describe_items(np.array([4], np.int32))


def test_builds_get_plain_arrays(catalogue):
    columns = catalogue.item_columns()
    assert {"author", "published_at", "city", "kind", "tags.offsets", "tags.codes"} <= set(columns)
    assert columns["tags.offsets"].size == 5
    assert all(isinstance(column, np.ndarray) for column in columns.values())


def test_what_is_known_about_users_is_kept(make_folder, through_disk):
    users = {
        "user_id": [7, 2],
        "city": ["Paris", None],
        "age": [30, None],
        "tastes": [["a", "b"], None],
        "when": [date(2024, 1, 1)] * 2,
    }
    made = Catalogue.from_dataset(Dataset.open(make_folder(users=users)))
    assert made.skipped == ("users.when",)
    columns = Catalogue.load(through_disk(made)).user_columns()
    known = columns["user_id.keys"].tolist()
    assert columns["age"][known.index(7)] == 30
    assert columns["age"][known.index(2)] == MISSING_INT
    assert columns["city"][known.index(7)] == 0
    assert columns["city"][known.index(2)] == -1
    assert columns["city.vocabulary.data"].tobytes() == b"Paris"
    assert np.diff(columns["tastes.offsets"])[known.index(7)] == 2


def test_interactions_alone_are_enough(make_folder, through_disk):
    bare = Catalogue.from_dataset(Dataset.open(make_folder()))
    for catalogue in (bare, Catalogue.load(through_disk(bare))):
        assert (len(catalogue.items), len(catalogue.users), len(catalogue.authors)) == (3, 2, 0)
        assert set(catalogue.item_columns()) == {"item_id.keys", "author.keys"}
        assert set(catalogue.user_columns()) == {"user_id.keys"}
        assert catalogue.describe_items(np.array([1], np.int32))[0].id == 30


def test_string_ids_go_all_the_way(make_folder, through_disk):
    events = {"user_id": ["u", "v"], "item_id": ["b", "é"], "event": ["click"] * 2, "timestamp": [1, 2]}
    folder = make_folder(
        toml='id_type = "string"',
        interactions=events,
        items={"item_id": ["é", "a"], "author_id": ["ann", None], "title": ["E", "A"]},
    )
    made = Catalogue.from_dataset(Dataset.open(folder))
    loaded = Catalogue.load(through_disk(made))
    assert loaded.id_type == "string"
    assert loaded.items.rows(["a", "b", "é", "z"]).tolist() == [0, 1, 2, -1]
    assert [(item.id, item.title, item.author) for item in loaded.describe_items(np.arange(3))] == [
        ("a", "A", ""),
        ("b", "", ""),
        ("é", "E", "ann"),
    ]


def test_a_feature_called_author_does_not_hide_the_authors(make_folder):
    items = {"item_id": [10], "author_id": [4], "author": [99]}
    catalogue = Catalogue.from_dataset(Dataset.open(make_folder(items=items)))
    assert catalogue.numeric["author"].tolist() == [0, -1, -1]
    assert catalogue.skipped == ("author",)


def test_text_columns_take_slices_and_chunks():
    whole = pa.chunked_array([pa.array(["x", "ab", None]).slice(1), pa.array(["é"], pa.string())])
    column = TextColumn.of(whole)
    assert (len(column), column.take(np.array([2, 0, 1]))) == (3, ["é", "ab", ""])
    assert column.offsets.tolist() == [0, 2, 2, 4]
    with pytest.raises(IndexError):
        column.take(np.array([3]))


def test_tag_columns_take_slices_and_chunks():
    lists = pa.array([["zero"], ["a", None, "b"], None, [None], ["b"]], pa.large_list(pa.string()))
    column = TagColumn.of(pa.chunked_array([lists.slice(1, 2), lists.slice(3)]))
    assert column.take(np.arange(4)) == [["a", "b"], [], [], ["b"]]
    assert column.vocabulary.take(np.arange(2)) == ["a", "b"]


def test_real_titles_can_be_read(real_data):
    catalogue = Catalogue.from_dataset(Dataset.open(real_data / "ml-1m-positives"))
    (item,) = catalogue.describe_items(catalogue.items.rows([1]))
    assert (item.title, item.author, item.tags[0]) == ("Toy Story (1995)", "John Lasseter", "Animation")
