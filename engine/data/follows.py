"""Who follows whom in a data set."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.core.errors import DatasetError
from engine.core.interactions import Interactions
from engine.core.types import NO_ROW
from engine.data.catalogue import Catalogue
from engine.data.columns import numbers
from engine.data.dataset import Dataset
from engine.data.form import file_name


def read_follows(dataset: Dataset, catalogue: Catalogue, until: int | None = None) -> Interactions | None:
    """Return the follows of a data set: users x author rows, newest first, weights 1.

    A pair that stands in the file several times counts once, with its last time. Of two follows at one time the later
    in the file is the newer.

    Args:
        dataset: an open data set.
        catalogue: made of it.
        until: leave out what came after this moment, seconds since the epoch; None for nothing.

    Returns:
        The matrix; None where the data set has no follows.

    Raises:
        DatasetError: if the file cannot be read, or is no longer the one that the catalogue was made of.
    """
    if not dataset.has("follows"):
        return None
    users = catalogue.users.rows(dataset.column("follows", "user_id")).astype(np.int64)
    authors = catalogue.authors.rows(dataset.column("follows", "author_id")).astype(np.int64)
    times = numbers(dataset.column("follows", "timestamp").cast(pa.int64()))
    if NO_ROW in users or NO_ROW in authors:
        raise DatasetError("has changed since the data set was opened", file_name("follows"))
    if until is not None:
        before = times <= until
        users, authors, times = users[before], authors[before], times[before]
    count = len(catalogue.authors)
    # Newest first within a pair, so that the first of each pair is the one that counts.
    place = np.arange(users.size)
    order = np.lexsort((-place, -times, users * count + authors))
    pairs = (users * count + authors)[order]
    first = np.ones(order.size, np.bool_)
    first[1:] = pairs[1:] != pairs[:-1]
    kept = order[first]
    kept = kept[np.lexsort((-kept, -times[kept], users[kept]))]
    indptr = np.zeros(len(catalogue.users) + 1, np.int64)
    np.cumsum(np.bincount(users[kept], minlength=len(catalogue.users)), out=indptr[1:])
    return Interactions(
        users=len(catalogue.users),
        items=count,
        indptr=indptr,
        rows=authors[kept].astype(np.int32),
        weights=np.ones(kept.size, np.float32),
        timestamps=times[kept],
    )
