"""Data sets: what is accepted, what is refused and in which words, what is written and counted."""

from __future__ import annotations

import math
import tomllib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.core.errors import DatasetError
from engine.data.dataset import BATCH_ROWS, Dataset, write_dataset
from engine.data.summary import describe

GOOD = {
    "user_id": [7, 7, 9, 9, 9],
    "item_id": [50, 10, 10, 30, 10],
    "event": ["click", "click", "like", "expose", "click"],
    "timestamp": [100, 200, 300, 400, 500],
}
ITEMS = {"item_id": [10, 50], "author_id": [1, None], "latitude": [1.5, None], "longitude": [180.0, -180.0]}


def test_a_good_data_set_opens(make_folder):
    dataset = Dataset.open(make_folder(items=ITEMS))
    assert (dataset.name, dataset.id_type) == ("tiny", "int64")
    assert dataset.rows == {"interactions": 5, "items": 2}
    assert dataset.has("items", "author_id")
    assert not dataset.has("items", "title")
    assert not dataset.has("users")


def test_unknown_keys_and_columns_are_welcome_and_names_have_a_default(make_folder):
    folder = make_folder(toml="mood = 3\n", interactions=GOOD | {"session": [1] * 5})
    assert Dataset.open(str(folder)).name == folder.name


def without(*names):
    return {name: values for name, values in GOOD.items() if name not in names}


BROKEN = [
    # what is wrong, the files, the file at fault, its column, words of the message
    ("no_interactions", {"interactions": None}, "interactions.parquet", "", "missing"),
    ("no_rows", {"interactions": pa.table(GOOD).slice(0, 0)}, "interactions.parquet", "", "no rows"),
    ("no_user", {"interactions": without("user_id")}, "interactions.parquet", "user_id", "is missing"),
    ("no_item", {"interactions": without("item_id")}, "interactions.parquet", "item_id", "is missing"),
    ("no_event", {"interactions": without("event")}, "interactions.parquet", "event", "is missing"),
    ("untimed", {"interactions": without("timestamp")}, "interactions.parquet", "", "neither timestamp nor"),
    (
        "only_nulls",
        {"interactions": without("timestamp") | {"timestamp": pa.nulls(5)}},
        "interactions.parquet",
        "",
        "neither",
    ),
    (
        "float_user",
        {"interactions": GOOD | {"user_id": [1.0] * 5}},
        "interactions.parquet",
        "user_id",
        "must hold integers.* not double",
    ),
    (
        "string_item",
        {"interactions": GOOD | {"item_id": ["a"] * 5}},
        "interactions.parquet",
        "item_id",
        'id_type = "string"',
    ),
    ("int_event", {"interactions": GOOD | {"event": [1] * 5}}, "interactions.parquet", "event", "strings"),
    (
        "datetime",
        {"interactions": GOOD | {"timestamp": pa.array([1, 2, 3, 4, 5], pa.timestamp("s"))}},
        "interactions.parquet",
        "timestamp",
        "integers .seconds",
    ),
    (
        "null_user",
        {"interactions": GOOD | {"user_id": [7, None, 9, None, 9]}},
        "interactions.parquet",
        "user_id",
        "2 of 5 rows are null",
    ),
    (
        "null_event",
        {"interactions": GOOD | {"event": ["a", None, "a", "a", "a"]}},
        "interactions.parquet",
        "event",
        "1 of 5 rows are null",
    ),
    (
        "empty_event",
        {"interactions": GOOD | {"event": ["a", "", "a", "", "a"]}},
        "interactions.parquet",
        "event",
        "2 of 5 rows are empty",
    ),
    (
        "null_timestamp",
        {"interactions": GOOD | {"timestamp": [None, 1, 1, 1, 1]}},
        "interactions.parquet",
        "timestamp",
        "1 of 5 rows are null",
    ),
    (
        "negative_item",
        {"interactions": GOOD | {"item_id": [-1, 1, 1, -2, -3]}},
        "interactions.parquet",
        "item_id",
        "3 of 5 rows are negative",
    ),
    (
        "huge_user",
        {"interactions": GOOD | {"user_id": pa.array([2**63, 1, 1, 1, 2**64 - 1], pa.uint64())}},
        "interactions.parquet",
        "user_id",
        "2 of 5 rows are negative or beyond",
    ),
    (
        "negative_time",
        {"interactions": GOOD | {"timestamp": [-1, 1, 1, 1, 1]}},
        "interactions.parquet",
        "timestamp",
        "1 of 5 rows are negative",
    ),
    (
        "milliseconds",
        {"interactions": GOOD | {"timestamp": [1_700_000_000_000] * 5}},
        "interactions.parquet",
        "timestamp",
        "5 of 5 rows lie after 2100",
    ),
    (
        "nan_rating",
        {"interactions": GOOD | {"rating": [1.0, math.nan, None, math.inf, 5.0]}},
        "interactions.parquet",
        "rating",
        "2 of 5 rows are NaN or infinite",
    ),
    (
        "unknown_split",
        {"interactions": GOOD | {"split": ["train", "valid", None, "test", "tune"]}},
        "interactions.parquet",
        "split",
        "2 of 5 rows hold none of train",
    ),
    (
        "not_utf8",
        {"interactions": GOOD | {"event": pa.array([b"a", b"\xff", b"a", b"a", b"a"]).view(pa.string())}},
        "interactions.parquet",
        "event",
        "not UTF-8",
    ),
    (
        "duplicate_item",
        {"items": {"item_id": [1, 2, 1, 1]}},
        "items.parquet",
        "item_id",
        "2 of 4 rows repeat",
    ),
    ("duplicate_user", {"users": {"user_id": [1, 1]}}, "users.parquet", "user_id", "1 of 2 rows repeat"),
    ("duplicate_author", {"authors": {"author_id": [1, 1]}}, "authors.parquet", "author_id", "repeat"),
    ("null_item", {"items": {"item_id": [1, None]}}, "items.parquet", "item_id", "1 of 2 rows are null"),
    (
        "negative_author",
        {"items": {"item_id": [1, 2], "author_id": [None, -5]}},
        "items.parquet",
        "author_id",
        "1 of 2 rows are negative",
    ),
    (
        "latitude",
        {"items": {"item_id": [1, 2, 3], "latitude": [90.1, math.nan, -math.inf]}},
        "items.parquet",
        "latitude",
        "2 of 3 rows lie outside -90",
    ),
    (
        "longitude",
        {"items": {"item_id": [1, 2], "longitude": [181, 180]}},
        "items.parquet",
        "longitude",
        "1 of 2 rows lie outside -180",
    ),
    ("quality", {"items": {"item_id": [1], "quality": [1.5]}}, "items.parquet", "quality", "outside 0"),
    ("title_type", {"items": {"item_id": [1], "title": [1]}}, "items.parquet", "title", "must hold strings"),
    ("tags_type", {"items": {"item_id": [1], "tags": ["a"]}}, "items.parquet", "tags", "lists of strings"),
    (
        "published_late",
        {"items": {"item_id": [1, 2], "published_at": [None, 10**12]}},
        "items.parquet",
        "published_at",
        "1 of 2 rows lie after 2100",
    ),
    (
        "feature_not_utf8",
        {"items": {"item_id": [1], "colour": pa.array([b"\xff"]).view(pa.string())}},
        "items.parquet",
        "colour",
        "not UTF-8",
    ),
    (
        "follow_without_time",
        {"follows": {"user_id": [1], "author_id": [1]}},
        "follows.parquet",
        "timestamp",
        "is missing",
    ),
    (
        "column_twice",
        {"users": pa.table([[1], [2]], names=["user_id", "user_id"])},
        "users.parquet",
        "user_id",
        "stands 2 times",
    ),
]


@pytest.mark.parametrize(
    ("files", "file", "column", "text"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_each_broken_rule_is_one_error_that_names_the_place(make_folder, files, file, column, text):
    with pytest.raises(DatasetError, match=text) as caught:
        Dataset.open(make_folder(**files))
    assert (caught.value.file, caught.value.column) == (file, column)
    assert "\n" not in str(caught.value)


def test_string_ids_keep_rules_of_their_own(make_folder):
    strings = {"user_id": ["u1", "u2"], "item_id": ["a", "bé"], "event": ["click"] * 2, "timestamp": [1, 2]}
    toml = 'id_type = "string"\n'
    items = {"item_id": ["a"], "author_id": pa.array([None], pa.string())}
    assert Dataset.open(make_folder(toml=toml, interactions=strings, items=items)).id_type == "string"
    for bad in ("", "x\0y", "x" * 257):
        with pytest.raises(DatasetError, match="1 of 2 rows are not 1 to 256 bytes"):
            Dataset.open(make_folder(toml=toml, interactions=strings | {"item_id": ["a", bad]}, items=items))
    with pytest.raises(DatasetError, match=r'user_id.*strings \(id_type is "string"\), not int64'):
        Dataset.open(make_folder(toml=toml, interactions=GOOD))


def test_offenders_are_counted_over_all_batches(make_folder):
    n = BATCH_ROWS + 10
    users = np.ones(n, np.int64)
    users[[0, n - 1]] = -1
    table = pa.table(
        {"user_id": users, "item_id": np.ones(n, np.int32), "event": ["e"] * n, "timestamp": users * 0}
    )
    with pytest.raises(DatasetError, match=f"2 of {n:,} rows are negative"):
        Dataset.open(make_folder(interactions=table))


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        (None, "is missing"),
        ("name = ", "cannot be read as TOML"),
        ("\ufffe = é", "cannot be read as TOML"),
        ('id_type = "uuid"', "id_type must be"),
        ("id_type = 3", "id_type must be"),
    ],
)
def test_a_bad_toml_is_refused(make_folder, toml, text):
    with pytest.raises(DatasetError, match=text) as caught:
        Dataset.open(make_folder(toml=toml))
    assert caught.value.file == "dataset.toml"


def test_what_is_not_a_directory_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="is not a directory"):
        Dataset.open(tmp_path / "nowhere")


def test_files_that_are_no_parquet_are_refused(make_folder):
    folder = make_folder(items=ITEMS)
    for content in (b"", b"PAR1", b"user,item\n1,2\n" * 100):
        (folder / "items.parquet").write_bytes(content)
        with pytest.raises(DatasetError, match="cannot be read as Parquet") as caught:
            Dataset.open(folder)
        assert caught.value.file == "items.parquet"
        assert len(str(caught.value)) < 300


def test_a_cut_file_is_refused(make_folder):
    folder = make_folder()
    file = folder / "interactions.parquet"
    content = file.read_bytes()
    for size in range(0, len(content), 97):
        file.write_bytes(content[:size])
        with pytest.raises(DatasetError, match="cannot be read as Parquet"):
            Dataset.open(folder)


def test_damage_within_a_page_is_found_by_its_checksum(tmp_path):
    rng = np.random.default_rng(0)
    n = 10_000
    table = pa.table(
        {
            "user_id": rng.integers(0, 2**40, n),
            "item_id": rng.integers(0, 2**40, n),
            "event": ["click"] * n,
            "timestamp": np.arange(n),
        }
    )
    write_dataset(tmp_path, table, meta={})
    file = tmp_path / "interactions.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read as Parquet") as caught:
        Dataset.open(tmp_path)
    assert caught.value.file == "interactions.parquet"


def test_damage_after_opening_is_an_error_of_the_data_set_too(make_folder):
    dataset = Dataset.open(make_folder())
    (dataset.path / "interactions.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        list(dataset.batches("interactions", ["user_id"]))
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        dataset.column("interactions", "user_id")


def test_an_index_holds_the_ids_of_all_its_sources(make_folder):
    dataset = Dataset.open(make_folder(items=ITEMS))
    sources = [("items", "item_id"), ("interactions", "item_id"), ("authors", "author_id"), ("items", "nope")]
    index = dataset.index(*sources)
    assert index.ids(np.arange(len(index))).tolist() == [10, 30, 50]
    assert len(dataset.index(("items", "author_id"))) == 1
    assert len(dataset.index(("authors", "author_id"))) == 0


def test_the_fingerprint_follows_content_alone(make_folder, tmp_path_factory):
    folder = make_folder(items=ITEMS)
    before = Dataset.open(folder).fingerprint()
    assert len(before) == 16
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README").write_text("not of the data")
    assert Dataset.open(copy).fingerprint() == before
    (copy / "dataset.toml").write_text('name = "other"')
    assert Dataset.open(copy).fingerprint() != before
    (copy / "dataset.toml").write_bytes((folder / "dataset.toml").read_bytes())
    (copy / "items.parquet").rename(copy / "users.parquet")
    pq.write_table(pa.table({"user_id": [1]}), copy / "users.parquet")
    assert Dataset.open(copy).fingerprint() != before


def test_a_summary_counts_everything(make_folder):
    splits = ["train", "train", "train", "tune", "test"]
    folder = make_folder(
        interactions=GOOD | {"split": splits, "rating": [1.0, None, None, 2.0, 3.0]}, items=ITEMS
    )
    summary = describe(Dataset.open(folder))
    assert (summary.users, summary.items, summary.events) == (2, 3, 5)
    assert list(summary.kinds.items()) == [("click", 3), ("expose", 1), ("like", 1)]
    assert summary.splits == {"train": 3, "test": 1, "tune": 1}
    assert (summary.first, summary.last) == (100, 500)
    assert summary.density == pytest.approx(5 / 6)
    assert (summary.per_user.median, summary.per_user.most, summary.per_item.median) == (2.5, 3, 1.0)
    interactions, items = summary.files
    assert (interactions.name, interactions.rows, items.rows) == ("interactions.parquet", 5, 2)
    assert interactions.bytes == (folder / "interactions.parquet").stat().st_size
    nulls = {column.name: (column.type, column.nulls) for column in interactions.columns}
    assert nulls["rating"] == ("double", 2)
    assert nulls["event"] == ("string", 0)


def test_a_summary_without_times_has_no_range(make_folder):
    untimed = {name: values for name, values in GOOD.items() if name != "timestamp"} | {"split": ["test"] * 5}
    summary = describe(Dataset.open(make_folder(interactions=untimed)))
    assert (summary.first, summary.last, summary.splits) == (None, None, {"test": 5})


def test_written_data_comes_back(tmp_path):
    meta = {
        "name": 'quotes " and \\ and é\n\x7f',
        "events": 5,
        "share": 0.25,
        "tiny": 1e-30,
        "ready": True,
        "list": [1, "two"],
        "an odd key": {"a": 1, "b c": [2.5]},
    }
    batches = pa.table(GOOD).to_batches(max_chunksize=2)
    dataset = write_dataset(tmp_path / "a" / "b", iter(batches), items=pa.table(ITEMS), meta=meta)
    assert tomllib.loads((dataset.path / "dataset.toml").read_text(encoding="utf-8")) == meta == dataset.meta
    assert dataset.rows == {"interactions": 5, "items": 2}
    parquet = pq.ParquetFile(dataset.path / "interactions.parquet")
    assert parquet.metadata.num_row_groups == 1
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert parquet.read().to_pydict() == GOOD


def test_writing_again_leaves_nothing_of_the_old(tmp_path):
    write_dataset(tmp_path, pa.table(GOOD), items=pa.table(ITEMS), meta={"name": "old"})
    dataset = write_dataset(tmp_path, pa.table(GOOD).slice(0, 2), meta={"name": "new"})
    assert dataset.rows == {"interactions": 2}
    assert not (tmp_path / "items.parquet").exists()


def test_what_breaks_a_rule_is_not_written_in_silence(tmp_path):
    with pytest.raises(DatasetError, match="holds no rows"):
        write_dataset(tmp_path / "a", iter([]), meta={})
    with pytest.raises(DatasetError, match="neither timestamp nor split"):
        write_dataset(tmp_path / "b", pa.table(GOOD).drop_columns("timestamp"), meta={})
    with pytest.raises(TypeError, match="no place in a TOML file"):
        write_dataset(tmp_path / "c", pa.table(GOOD), meta={"name": None})
    assert not (tmp_path / "c").exists()


def test_a_write_that_breaks_off_leaves_no_data_set(tmp_path):
    def batches():
        yield pa.table(GOOD)
        raise KeyboardInterrupt

    write_dataset(tmp_path, pa.table(GOOD), meta={})
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, batches(), meta={})
    with pytest.raises(DatasetError, match="is missing"):
        Dataset.open(tmp_path)


def test_the_real_sets_are_in_order(real_data):
    expected = {
        "kuairand-pure-partial": (27_077, 7_515, 1_640_256),
        "gowalla": (29_858, 40_981, 1_027_370),
        "amazon-book-kgat": (70_679, 24_915, 846_434),
        "ml-1m-positives": (6_038, 3_533, 575_281),
        "foursquare-nyc": (1_083, 5_135, 147_938),
    }
    for name, counts in expected.items():
        dataset = Dataset.open(real_data / name)
        users = len(dataset.index(("interactions", "user_id")))
        items = len(dataset.index(("interactions", "item_id")))
        assert (users, items, dataset.rows["interactions"]) == counts
