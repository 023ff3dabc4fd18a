"""MovieLens, every edition: 100k (tabs), 1M and 10M (double colons), 20M, 25M, 32M, latest (CSV)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.errors import DatasetError
from engine.data.dataset import Dataset, write_dataset
from engine.data.importers.source import Source, constant, lines, lists, split_tags

_NO_GENRES = "(no genres listed)"
_GENRES_100K = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags of `u.item` after "unknown", which is no genre."""

_RATING = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}


def import_movielens(source: Path, destination: Path, *, min_rating: float | None = None) -> Dataset:
    """Import a MovieLens edition; which one shows in its files.

    Ratings become `rate` events, genres tags; 100k and 1M bring users' features.

    Args:
        source: the folder or zip archive.
        destination: the data set's directory.
        min_rating: leave out ratings below it; None keeps all.

    Raises:
        DatasetError: a file is missing or not as published.
    """
    with Source(source) as files:
        if files.has("ratings.csv"):
            ratings, items, users = _ratings_csv(files), _movies_csv(files), None
        elif files.has("ratings.dat"):
            ratings, items = _ratings_dat(files), _movies_dat(files)
            users = _users_dat(files) if files.has("users.dat") else None
        elif files.has("u.data"):
            ratings, items, users = _ratings_100k(files), _movies_100k(files), _users_100k(files)
        else:
            raise DatasetError("holds none of ratings.csv, ratings.dat and u.data", str(source))
        return write_dataset(
            destination,
            _events(ratings, min_rating),
            items=items,
            users=users,
            meta={
                "name": source.resolve().stem,
                "licence": "GroupLens: research use, no redistribution without permission",
                "source": "MovieLens (Harper and Konstan 2015), https://grouplens.org/datasets/movielens/",
                "protocol": "leave-one-out, temporal",
                "changes": "none" if min_rating is None else f"ratings below {min_rating:g} left out",
            },
        )


def _events(ratings: Iterator[Any], min_rating: float | None) -> Iterator[Any]:
    for batch in ratings:
        user, item, rating, timestamp = batch.columns
        table = pa.table(
            {
                "user_id": user,
                "item_id": item,
                "event": constant("rate", len(user)),
                "rating": rating,
                "timestamp": timestamp,
            }
        )
        yield table if min_rating is None else table.filter(pc.greater_equal(table["rating"], min_rating))


def _ratings_csv(files: Source) -> Iterator[Any]:
    names = ("userId", "movieId", "rating", "timestamp")
    return files.batches("ratings.csv", dict(zip(names, _RATING.values(), strict=True)))


def _movies_csv(files: Source) -> Any:
    movies = files.table("movies.csv", {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()})
    return _items(movies["movieId"], movies["title"], split_tags(movies["genres"], "|", _NO_GENRES))


def _ratings_dat(files: Source) -> Iterator[Any]:
    return files.batches("ratings.dat", _RATING, layout=_double_colon(*_RATING), delimiter=":")


def _movies_dat(files: Source) -> Any:
    # Titles have colons, so the lines are taken apart by a pattern. 1M is Latin-1, 10M UTF-8.
    (name,) = files.find("movies.dat")
    with files.open(name) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    movies = lines(text)
    parts = pc.extract_regex(movies, r"^(?P<item>\d+)::(?P<title>.*)::(?P<genres>[^:]*)$")
    if parts.null_count:
        first = movies.filter(pc.is_null(parts))[0].as_py()
        raise DatasetError(f"is not as published: expected id::title::genres, got {first[:80]!r}", name)
    item, title, genres = parts.flatten()
    return _items(item.cast(pa.int64()), title, split_tags(genres, "|", _NO_GENRES))


def _users_dat(files: Source) -> Any:
    columns = {
        "user_id": pa.int64(),
        "gender": pa.string(),
        "age": pa.int16(),
        "occupation": pa.int16(),
        "zip_code": pa.string(),
    }
    return files.table("users.dat", columns, layout=_double_colon(*columns), delimiter=":")


def _double_colon(*names: str) -> list[str]:
    """Columns of a file with "::" between them, read with ":": there is an empty one between each two."""
    return [part for at, name in enumerate(names) for part in (f"between{at}", name)][1:]


def _ratings_100k(files: Source) -> Iterator[Any]:
    return files.batches("u.data", _RATING, layout=tuple(_RATING), delimiter="\t")


def _movies_100k(files: Source) -> Any:
    layout = ("item", "title", "released", "video_released", "url", "unknown", *_GENRES_100K)
    columns = {"item": pa.int64(), "title": pa.string()} | dict.fromkeys(_GENRES_100K, pa.int8())
    movies = files.table("u.item", columns, layout=layout, delimiter="|", encoding="latin-1")
    flags = np.column_stack([movies[genre].to_numpy() for genre in _GENRES_100K]) > 0
    tags = lists(flags.sum(axis=1), pa.array(_GENRES_100K).take(pa.array(np.nonzero(flags)[1])))
    return _items(movies["item"], movies["title"], tags)


def _users_100k(files: Source) -> Any:
    layout = ("user_id", "age", "gender", "occupation", "zip_code")
    types = (pa.int64(), pa.int16(), pa.string(), pa.string(), pa.string())
    return files.table("u.user", dict(zip(layout, types, strict=True)), layout=layout, delimiter="|")


def _items(item: Any, title: Any, tags: Any) -> Any:
    return pa.table({"item_id": item, "title": title, "tags": tags})
