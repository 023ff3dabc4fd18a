"""Importers: tiny files in the published forms, read back through the data set they become."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.core.errors import ConfigError, DatasetError
from engine.data.dataset import Dataset
from engine.data.importers import IMPORTERS, import_dataset, importer_options


def put(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode(encoding))
    return folder


def rows(path: Path, file: str) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = pq.read_table(path / f"{file}.parquet").to_pylist()
    return read


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return tmp_path / "made"


# --- MovieLens ----------------------------------------------------------------------------------------------

ML_100K = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n196\t302\t1\t881250950\n",
    "u.item": (
        "242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M/title-exact?Kolya%20(1996)"
        "|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "302|Misérables, Les (1995)|01-Jan-1997|||0|0|0|0|0|0|1|0|0|0|1|0|0|1|0|0|1|0|0\n"
        "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    ),
    "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
    "u.genre": "unknown|0\nAction|1\n\n",
}

ML_1M = {
    "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n",
    "movies.dat": (
        "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n"
        "661::Star Wars: Épisode IV (1977)::Action|Sci-Fi\n"
    ),
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072-1234\n",
}

ML_CSV = {
    "ratings.csv": (
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n2,306,0.5,1141415820\n"
    ),
    "movies.csv": (
        "movieId,title,genres\n"
        '296,"American President, The (1995)",Comedy|Drama|Romance\n'
        '306,"Say ""Hi"" (1995)",(no genres listed)\n'
    ),
    "tags.csv": "userId,movieId,tag,timestamp\n3,260,classic,1439472355\n",
}


def test_movielens_100k(source: Path, made: Path) -> None:
    summary = import_dataset("movielens", put(source, ML_100K, "latin-1"), made)
    assert (summary.users, summary.items, summary.events, dict(summary.kinds)) == (2, 2, 3, {"rate": 3})
    assert rows(made, "interactions")[0] == {
        "user_id": 196,
        "item_id": 242,
        "event": "rate",
        "rating": 3.0,
        "timestamp": 881250949,
    }
    assert rows(made, "items") == [
        {"item_id": 242, "title": "Kolya (1996)", "tags": ["Comedy"]},
        {
            "item_id": 302,
            "title": "Misérables, Les (1995)",
            "tags": ["Crime", "Film-Noir", "Mystery", "Thriller"],
        },
        {"item_id": 267, "title": "unknown", "tags": []},
    ]
    assert rows(made, "users")[1] == {
        "user_id": 186,
        "age": 39,
        "gender": "F",
        "occupation": "executive",
        "zip_code": "00000",
    }


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_1m(source: Path, made: Path, encoding: str) -> None:
    import_dataset("movielens", put(source, ML_1M, encoding), made)
    assert [(row["user_id"], row["item_id"], row["rating"]) for row in rows(made, "interactions")] == [
        (1, 1193, 5.0),
        (1, 661, 3.0),
        (2, 1193, 4.0),
    ]
    assert rows(made, "items") == [
        {"item_id": 1193, "title": "One Flew Over the Cuckoo's Nest (1975)", "tags": ["Drama"]},
        {"item_id": 661, "title": "Star Wars: Épisode IV (1977)", "tags": ["Action", "Sci-Fi"]},
    ]
    assert rows(made, "users")[1] == {
        "user_id": 2,
        "gender": "M",
        "age": 56,
        "occupation": 16,
        "zip_code": "70072-1234",
    }


def test_movielens_10m_has_half_stars_and_no_users(source: Path, made: Path) -> None:
    files = {
        "ratings.dat": "1::122::4.5::838985046\n",
        "movies.dat": "122::Boomerang (1992)::Comedy|Romance\r\n25::None::(no genres listed)\r\n",
        "tags.dat": "15::4973::excellent!::1215184630\n",
    }
    import_dataset("movielens", put(source, files), made)
    assert rows(made, "interactions")[0]["rating"] == 4.5
    assert [row["tags"] for row in rows(made, "items")] == [["Comedy", "Romance"], []]
    assert not Dataset.open(made).has("users")


def test_movielens_csv(source: Path, made: Path) -> None:
    summary = import_dataset("movielens", put(source, ML_CSV), made, min_rating=3.5)
    assert (summary.events, summary.first, summary.last) == (2, 1147868817, 1147880044)
    assert rows(made, "items") == [
        {"item_id": 296, "title": "American President, The (1995)", "tags": ["Comedy", "Drama", "Romance"]},
        {"item_id": 306, "title": 'Say "Hi" (1995)', "tags": []},
    ]
    assert "3.5" in Dataset.open(made).meta["changes"]


def test_movielens_zip_as_downloaded(tmp_path: Path, made: Path) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for name, text in ML_1M.items():
            written.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    summary = import_dataset("movielens", archive, made)
    assert (summary.name, summary.events) == ("ml-1m", 3)


def test_movielens_refuses_ambiguous_and_empty_folders(source: Path, made: Path) -> None:
    source.mkdir()
    with pytest.raises(DatasetError, match=r"none of ratings\.csv, ratings\.dat and u\.data"):
        import_dataset("movielens", source, made)
    put(source / "a", ML_1M)
    put(source / "b", ML_1M)
    with pytest.raises(DatasetError, match=r"holds ratings\.dat in a, b"):
        import_dataset("movielens", source, made)


def test_movielens_names_a_line_that_is_not_as_published(source: Path, made: Path) -> None:
    put(source, ML_1M | {"movies.dat": "1::A::B\n2,B,C\n"})
    with pytest.raises(DatasetError, match=r"movies\.dat: .*id::title::genres, got '2,B,C'"):
        import_dataset("movielens", source, made)
    put(source, ML_1M | {"ratings.dat": "1::A::5::978300760\n"})
    with pytest.raises(DatasetError, match=r"ratings\.dat: is not as published: .*int64"):
        import_dataset("movielens", source, made)


# --- LightGCN -----------------------------------------------------------------------------------------------


def test_lightgcn(source: Path, made: Path) -> None:
    put(
        source,
        {
            "train.txt": "0 0 1 2\n1 2\n2\n3 5 0 \n",
            "test.txt": "0 3\n2\n\n1 4 5",
            "user_list.txt": "org_id remap_id\n",
        },
    )
    summary = import_dataset("lightgcn", source, made)
    assert dict(summary.splits) == {"train": 6, "test": 3}
    found = [(row["user_id"], row["item_id"], row["split"]) for row in rows(made, "interactions")]
    assert found == [
        *[(0, item, "train") for item in (0, 1, 2)],
        (1, 2, "train"),
        (3, 5, "train"),
        (3, 0, "train"),
        (0, 3, "test"),
        (1, 4, "test"),
        (1, 5, "test"),
    ]
    assert "timestamp" not in rows(made, "interactions")[0]


def test_lightgcn_reads_files_larger_than_a_block(
    source: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.importers.lightgcn.BLOCK_BYTES", 10)
    lines = [f"{user} " + " ".join(str(item) for item in range(user % 7)) for user in range(100)]
    put(source, {"train.txt": "\n".join(lines), "test.txt": "0 1\n"})
    import_dataset("lightgcn", source, made)
    found = [(row["user_id"], row["item_id"]) for row in rows(made, "interactions")]
    assert found == [(user, item) for user in range(100) for item in range(user % 7)] + [(0, 1)]


@pytest.mark.parametrize("text", ["0 a\n", "0 1.5\n", "0 -1\n", "\xff 1\n"])
def test_lightgcn_refuses_what_is_no_id(source: Path, made: Path, text: str) -> None:
    put(source, {"train.txt": text, "test.txt": "0 1\n"}, "latin-1")
    with pytest.raises(DatasetError, match=r"train\.txt: is not as published"):
        import_dataset("lightgcn", source, made)


# --- KuaiRand -----------------------------------------------------------------------------------------------

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
KUAIRAND = {
    "data/log_standard_4_08_to_4_21_pure.csv": LOG_HEADER
    + "0,7136,20220421,1600,1650615870123,1,0,0,0,0,0,1,14500,15000,0,0,0,0,1\n"
    + "0,909,20220421,1600,1650615880999,0,0,0,0,0,1,0,0,9000,0,0,0,0,1\n",
    "data/log_standard_4_22_to_5_08_pure.csv": LOG_HEADER
    + "1,7136,20220424,1700,1650817477000,1,1,1,1,1,0,0,3000,15000,0,0,1,0,1\n"
    + "1,7136,20220424,1701,1650817999000,0,0,1,0,0,0,0,10,15000,0,0,0,0,1\n"
    + "1,555,20220424,1701,1650818000000,0,0,1,0,0,0,0,10,15000,0,0,0,0,1\n",
    "data/log_random_4_22_to_5_08_pure.csv": LOG_HEADER
    + "9,9,20220424,1700,1650817477000,1,1,1,1,1,0,0,3000,15000,0,0,1,1,1\n",
    "data/video_features_basic_pure.csv": (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n"
        '7136,701057,NORMAL,2022-04-10,ShortImport,0.0,15000.0,576,1024,9155697141,9.0,"39,12"\n'
        "909,8,AD,2022-04-09,LongImport,,,720,1280,0,,\n"
    ),
    "data/video_features_statistic_pure.csv": "video_id,counts\n7136,24.0\n",
    "data/user_features_pure.csv": (
        "user_id,user_active_degree,is_lowactive_period,register_days,onehot_feat0,onehot_feat4\n"
        "0,full_active,0,799,1,1.0\n1,UNKNOWN,-124,1474,1,\n"
    ),
}


def test_kuairand(source: Path, made: Path) -> None:
    summary = import_dataset("kuairand", put(source, KUAIRAND), made)
    assert dict(summary.kinds) == {
        "expose": 5,
        "follow": 3,
        "click": 2,
        "comment": 1,
        "dislike": 1,
        "finish": 1,
        "like": 1,
        "profile_enter": 1,
        "share": 1,
    }
    clicks = [row for row in rows(made, "interactions") if row["event"] == "click"]
    assert clicks == [
        {"user_id": 0, "item_id": 7136, "timestamp": 1650615870, "watch_seconds": 14.5, "event": "click"},
        {"user_id": 1, "item_id": 7136, "timestamp": 1650817477, "watch_seconds": 3.0, "event": "click"},
    ]
    assert rows(made, "items") == [
        {
            "item_id": 7136,
            "author_id": 701057,
            "published_at": 1649548800,
            "duration_seconds": 15.0,
            "tags": ["39", "12"],
            "kind": "NORMAL",
            "music_id": 9155697141,
        },
        {
            "item_id": 909,
            "author_id": 8,
            "published_at": 1649462400,
            "duration_seconds": None,
            "tags": [],
            "kind": "AD",
            "music_id": 0,
        },
    ]
    # Once per author, at the first time; the author of video 555 is not known.
    assert rows(made, "follows") == [{"user_id": 1, "author_id": 701057, "timestamp": 1650817477}]
    assert [row["register_days"] for row in rows(made, "users")] == [799, 1474]


def test_kuairand_names_what_is_missing(source: Path, made: Path) -> None:
    log = "data/log_standard_4_08_to_4_21_pure.csv"
    put(source, KUAIRAND | {log: KUAIRAND[log].replace("is_hate", "hates")})
    with pytest.raises(
        DatasetError, match=r"log_standard_4_08_to_4_21_pure.*'is_hate'.*the file has user_id, video_id"
    ):
        import_dataset("kuairand", source, made)
    put(source, KUAIRAND)
    (source / "data/video_features_basic_pure.csv").unlink()
    with pytest.raises(DatasetError, match=r"video_features_basic_\*\.csv: is missing from"):
        import_dataset("kuairand", source, made)
    videos = "data/video_features_basic_pure.csv"
    put(source, {videos: KUAIRAND[videos].replace("2022-04-09", "9.4.2022")})
    with pytest.raises(DatasetError, match=r"upload_dt.*'9\.4\.2022'"):
        import_dataset("kuairand", source, made)


# --- goodbooks ----------------------------------------------------------------------------------------------

GOODBOOKS = {
    "ratings.csv": "user_id,book_id,rating\n1,2,5\n2,1,4\n",
    "to_read.csv": "user_id,book_id\n1,1\n",
    "books.csv": (
        "book_id,goodreads_book_id,best_book_id,work_id,books_count,isbn,isbn13,authors,original_publication_year,"
        "original_title,title,language_code,average_rating,ratings_count\n"
        '1,2767052,2767052,2792775,272,439023483,9.78043902348e+12,"Suzanne Collins, A. Other",2008.0,'
        'The Hunger Games,"The Hunger Games (The Hunger Games, #1)",eng,4.34,4780653\n'
        "2,3,3,4640799,491,439554934,9.78043955493e+12,Homer,-720.0,,The Iliad,,4.44,4602479\n"
        "3,5,5,5,5,,,Suzanne Collins,,,Gregor,en-US,4.44,4602479\n"
    ),
    "book_tags.csv": (
        "goodreads_book_id,tag_id,count\n3,30574,167697\n3,11305,37174\n3,11557,34173\n3,8717,12986\n3,33114,9000\n"
        "2767052,11557,5\n2767052,11557,4\n2767052,8717,6\n2767052,33114,-1\n99,8717,6\n"
    ),
    "tags.csv": "tag_id,tag_name\n8717,classics\n11305,fantasy\n11557,epic\n30574,to-read\n33114,greek\n",
}


def test_goodbooks(source: Path, made: Path) -> None:
    summary = import_dataset("goodbooks", put(source, GOODBOOKS), made, tags=3)
    assert (dict(summary.kinds), dict(summary.splits)) == ({"rate": 2, "collect": 1}, {"train": 3})
    assert rows(made, "interactions")[2] == {
        "user_id": 1,
        "item_id": 1,
        "event": "collect",
        "rating": None,
        "split": "train",
    }
    assert rows(made, "authors") == [
        {"author_id": 1, "name": "Homer"},
        {"author_id": 2, "name": "Suzanne Collins"},
    ]
    assert rows(made, "items") == [
        {
            "item_id": 1,
            "title": "The Hunger Games (The Hunger Games, #1)",
            "author_id": 2,
            "published_at": 1199145600,
            "tags": ["classics", "epic"],
            "language": "eng",
        },
        {
            "item_id": 2,
            "title": "The Iliad",
            "author_id": 1,
            "published_at": None,
            "tags": ["fantasy", "epic", "classics"],
            "language": "",
        },
        {
            "item_id": 3,
            "title": "Gregor",
            "author_id": 2,
            "published_at": None,
            "tags": [],
            "language": "en-US",
        },
    ]


@pytest.mark.parametrize("name", sorted(GOODBOOKS))
def test_goodbooks_needs_every_file(source: Path, made: Path, name: str) -> None:
    put(source, GOODBOOKS)
    (source / name).unlink()
    with pytest.raises(DatasetError, match=rf"^{name}: is missing from") as caught:
        import_dataset("goodbooks", source, made)
    assert caught.value.file == name
    # Whatever was written before is no data set.
    assert not (made / "dataset.toml").exists()


# --- all ----------------------------------------------------------------------------------------------------


def test_options_are_known_before_anything_is_read(tmp_path: Path) -> None:
    assert list(IMPORTERS) == ["movielens", "lightgcn", "kuairand", "goodbooks"]
    assert importer_options("movielens")["min_rating"].annotation == float | None
    assert importer_options("lightgcn") == {}
    with pytest.raises(ConfigError, match=r"no importer 'netflix'; there are movielens, .*"):
        import_dataset("netflix", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="min_rating: importer 'kuairand' has no such option; it has none"):
        import_dataset("kuairand", tmp_path, tmp_path, min_rating=3)


@pytest.mark.parametrize("kind", list(IMPORTERS))
def test_source_must_be_a_folder_or_an_archive(tmp_path: Path, made: Path, kind: str) -> None:
    file = tmp_path / "set.tar.gz"
    file.write_bytes(b"x")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(DatasetError, match="neither a folder nor a zip archive"):
            import_dataset(kind, path, made)


def test_empty_file_is_named(source: Path, made: Path) -> None:
    put(source, ML_CSV | {"ratings.csv": ""})
    with pytest.raises(DatasetError, match=r"ratings\.csv, column 'userId': is missing; the file has none"):
        import_dataset("movielens", source, made)
