"""Follows as a matrix: each pair once, the newest first, the future left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset, write_dataset
from engine.data.follows import read_follows


def _dataset(path: Path, follows: list[tuple[int, int, int]] | None) -> Dataset:
    interactions = pa.table({"user_id": [1], "item_id": [1], "event": ["click"], "timestamp": [1]})
    table = None
    if follows is not None:
        users, authors, times = zip(*follows, strict=True)
        table = pa.table({"user_id": users, "author_id": authors, "timestamp": times})
    return write_dataset(path, interactions, follows=table, meta={"name": "tiny"})


def test_each_pair_once_newest_first(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, [(1, 7, 10), (1, 8, 30), (1, 7, 40), (1, 9, 30), (5, 8, 2)])
    catalogue = Catalogue.from_dataset(dataset)
    follows = read_follows(dataset, catalogue)
    assert follows is not None
    assert catalogue.authors.ids(follows.rows).tolist() == [7, 9, 8, 8]
    assert follows.timestamps.tolist() == [40, 30, 30, 2]
    assert follows.indptr.tolist() == [0, 3, 4]
    assert (follows.users, follows.items) == (2, 3)
    np.testing.assert_array_equal(follows.weights, np.ones(4, np.float32))


def test_what_comes_later_is_left_out(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, [(1, 7, 10), (1, 7, 40), (1, 8, 41)])
    catalogue = Catalogue.from_dataset(dataset)
    follows = read_follows(dataset, catalogue, until=20)
    assert follows is not None
    assert follows.timestamps.tolist() == [10]


def test_a_data_set_without_follows_has_none(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, None)
    assert read_follows(dataset, Catalogue.from_dataset(dataset)) is None
