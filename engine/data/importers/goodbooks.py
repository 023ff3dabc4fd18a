"""goodbooks-10k: six million ratings of ten thousand books, without times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.dataset import Dataset, write_dataset
from engine.data.importers.source import Source, constant, lists

_SHELVES = (
    "to-read", "currently-reading", "read", "owned", "books-i-own", "own", "own-it", "i-own", "owned-books",
    "my-books", "my-library", "library", "home-library", "favorites", "favourites", "all-time-favorites",
    "favorite", "favorite-books", "re-read", "reread", "default", "books", "to-buy", "wish-list", "ebook",
    "ebooks", "e-book", "e-books", "kindle", "audiobook", "audiobooks", "audio", "to-read-owned",
)  # fmt: skip
"""Tags that say what readers do with a book, not what it is."""


def import_goodbooks(source: Path, destination: Path, *, tags: int = 10) -> Dataset:
    """Import ratings (`rate`), to-read lists (`collect`) and books; all events are of the `train` split.

    The first author counts; authors are numbered from 1 in the order of their names. The year of first
    publication becomes `published_at` (1 January) from 1970 on, where the form's times begin.

    Args:
        source: the folder or zip archive.
        destination: the data set's directory.
        tags: how many of a book's most frequent tags to keep; shelves ("to-read", "owned") do not count.

    Raises:
        DatasetError: a file is missing, lacks a column or is not as published.
    """
    with Source(source) as files:
        items, authors = _items(files, tags)
        return write_dataset(
            destination,
            _events(files),
            items=items,
            authors=authors,
            meta={
                "name": source.resolve().stem,
                "licence": "CC BY-SA 4.0",
                "source": "goodbooks-10k (Zajac 2017), https://github.com/zygmuntz/goodbooks-10k",
                "protocol": "none: no times, all events are of the train split",
            },
        )


def _events(files: Source) -> Iterator[Any]:
    ids = {"user_id": pa.int64(), "book_id": pa.int64()}
    for batch in files.batches("ratings.csv", ids | {"rating": pa.float32()}):
        yield _table(batch, "rate", batch["rating"])
    for batch in files.batches("to_read.csv", ids):
        yield _table(batch, "collect", pa.nulls(batch.num_rows, pa.float32()))


def _table(batch: Any, event: str, rating: Any) -> Any:
    return pa.table(
        {
            "user_id": batch["user_id"],
            "item_id": batch["book_id"],
            "event": constant(event, batch.num_rows),
            "rating": rating,
            "split": constant("train", batch.num_rows),
        }
    )


def _items(files: Source, tags: int) -> tuple[Any, Any]:
    columns = {
        "book_id": pa.int64(),
        "goodreads_book_id": pa.int64(),
        "authors": pa.string(),
        "original_publication_year": pa.float64(),
        "title": pa.string(),
        "language_code": pa.string(),
    }
    books = files.table("books.csv", columns).combine_chunks()
    first = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(books["authors"], ","), 0))
    names = pc.unique(first).sort()
    items = {
        "item_id": books["book_id"],
        "title": books["title"],
        "author_id": pc.add(pc.index_in(first, value_set=names).cast(pa.int64()), 1),
        "published_at": _years(books["original_publication_year"]),
        "tags": _top_tags(files, books["goodreads_book_id"], tags),
        "language": books["language_code"],
    }
    authors = {"author_id": pa.array(np.arange(1, len(names) + 1)), "name": names}
    return pa.table(items), pa.table(authors)


def _years(years: Any) -> Any:
    """int64 seconds of 1 January; null before 1970 and where unknown."""
    values = years.to_numpy()
    known = values >= 1970  # False for NaN
    counted = np.where(known, values - 1970, 0).astype(np.int64)
    seconds = counted.astype("datetime64[Y]").astype("datetime64[s]").astype(np.int64)
    return pa.array(seconds, mask=~known)


def _top_tags(files: Source, books: Any, keep: int) -> Any:
    """For each book (int64[n], Goodreads ids) its most frequent tags, most frequent first."""
    tags = files.table("tags.csv", {"tag_id": pa.int64(), "tag_name": pa.string()})
    used = files.table(
        "book_tags.csv", {"goodreads_book_id": pa.int64(), "tag_id": pa.int64(), "count": pa.int64()}
    )
    named = tags.filter(pc.invert(pc.is_in(tags["tag_name"], value_set=pa.array(_SHELVES))))
    book = pc.index_in(used["goodreads_book_id"], value_set=books).fill_null(-1).to_numpy()
    tag = pc.index_in(used["tag_id"], value_set=named["tag_id"]).fill_null(-1).to_numpy()
    count = used["count"].to_numpy()
    known = (book >= 0) & (tag >= 0) & (count > 0)  # the published file has a few negative counts
    order = np.flatnonzero(known)
    order = order[np.lexsort((tag[order], -count[order], book[order]))]
    book, tag = book[order], tag[order]
    # The file repeats some pairs.
    pairs = book.astype(np.int64) * (int(tag.max(initial=0)) + 1) + tag
    once = np.zeros(book.size, np.bool_)
    once[np.unique(pairs, return_index=True)[1]] = True
    book, tag = book[once], tag[once]
    counts = np.bincount(book, minlength=len(books))
    rank = np.arange(book.size) - np.repeat(np.cumsum(counts) - counts, counts)
    top = rank < keep
    return lists(np.minimum(counts, keep), named["tag_name"].combine_chunks().take(pa.array(tag[top])))
