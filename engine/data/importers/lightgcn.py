"""The text splits of LightGCN and NGCF (Gowalla, Yelp2018, Amazon-Book): a user per line, then the items."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.errors import DatasetError
from engine.data.dataset import Dataset, write_dataset
from engine.data.importers.source import BLOCK_BYTES, Source, constant, lines, parsing

_PARTS = ("train", "test")


def import_lightgcn(source: Path, destination: Path) -> Dataset:
    """Import `train.txt` and `test.txt` as `click` events without times, the file in the `split` column.

    A line is a user's id and those of the items, with blanks between; a user without items gives no event.

    Raises:
        DatasetError: a file is missing, or a line holds anything but ids.
    """
    with Source(source) as files:
        return write_dataset(
            destination,
            _events(files),
            meta={
                "name": source.resolve().stem,
                "licence": "none stated",
                "source": "text split in the form of LightGCN (He et al. 2020)",
                "protocol": "fixed-split",
            },
        )


def _events(files: Source) -> Iterator[Any]:
    for part in _PARTS:
        (name,) = files.find(f"{part}.txt")
        for text in _whole_lines(files, name):
            with parsing(name):
                user, item = _pairs(text, name)
            yield pa.table(
                {
                    "user_id": user,
                    "item_id": item,
                    "event": constant("click", len(user)),
                    "split": constant(part, len(user)),
                }
            )


def _whole_lines(files: Source, name: str) -> Iterator[bytes]:
    with files.open(name) as file:
        while block := file.read(BLOCK_BYTES):
            yield block + file.readline()


def _pairs(text: bytes, name: str) -> tuple[Any, Any]:
    """int64[m] users and int64[m] items of the lines."""
    words = pc.utf8_split_whitespace(lines(text.decode()))
    ids = words.flatten().cast(pa.int64()).to_numpy()
    if ids.size and int(ids.min()) < 0:
        raise DatasetError("is not as published: an id is negative", name)
    lengths = pc.list_value_length(words).to_numpy()
    starts = np.cumsum(lengths) - lengths
    is_item = np.ones(ids.size, np.bool_)
    is_item[starts] = False
    return np.repeat(ids[starts], lengths - 1), ids[is_item]
