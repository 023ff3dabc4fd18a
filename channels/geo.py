"""Geo nearby: the newest good posts of the GeoHash cell that the request comes from.

Source: the recommender course (Wang Shusen, GeoHash recall): GeoHash -> good posts, newest first. There is nothing
personal in it, which is why the quality of the posts matters. Cells and their neighbours are pygeohash's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Self

import numpy as np
import pygeohash
from pydantic import Field

from engine.core.candidates import CandidateBatch, TriggerKind
from engine.core.channel import BuildContext, Channel, LoadContext
from engine.core.items import ItemColumns
from engine.core.options import Online
from engine.core.postings import (
    NO_KEY,
    PostingLists,
    PostOptions,
    Reading,
    Wanted,
    write_posting_lists,
)
from engine.core.query import QueryBatch
from engine.core.types import AnyArray, Int32Array, Int64Array

# It logs as errors what it raises, too; that there is no cell beyond the pole is none.
logging.getLogger("pygeohash").setLevel(logging.CRITICAL)

ALPHABET = "0123456789bcdefghjkmnpqrstuvwxyz"
"""GeoHash's digits; each stands for 5 bits."""

_DIGITS = np.zeros(128, np.int64)
_DIGITS[[ord(digit) for digit in ALPHABET]] = np.arange(32)


class GeoOptions(PostOptions):
    """Options of the geo channel."""

    precision: Annotated[int, Field(ge=1, le=6)] = 5
    """Letters of the GeoHash: a cell of 5 is about 4.9 km x 4.9 km, of 6 about 1.2 km x 0.6 km."""

    thin: Annotated[int, Field(ge=0), Online()] = 20
    """The eight neighbours of a cell are read too where the cell itself has fewer posts that may be recalled."""

    neighbour_weight: Annotated[float, Field(gt=0, le=1), Online()] = 0.5
    """Weight of a neighbour's posts; one half is one half-life of age."""


class Geo(Channel):
    """Recalls what is near; the trigger is the cell, as a number of 5 bits a letter. No location, no candidates."""

    Config = GeoOptions
    inline = True
    trigger_kind = TriggerKind.CELL

    def __init__(self, config: GeoOptions, posts: PostingLists, columns: ItemColumns) -> None:
        super().__init__(config)
        self._posts = posts
        self._columns = columns
        self._reading = Reading.of(config, lead=1, thin=config.thin)

    @classmethod
    def build(cls, config: GeoOptions, context: BuildContext) -> None:
        """Write the posting lists of the cells; empty ones where the catalogue has no coordinates."""
        items, columns = context.interactions.items, context.item_columns
        context.progress.start("geo", items)
        nowhere = np.full(items, np.nan)
        keys = cells(columns.get("latitude", nowhere), columns.get("longitude", nowhere), config.precision)
        write_posting_lists(context.sink, keys, columns.get("published_at"))
        context.progress.advance(items)

    @classmethod
    def load(cls, config: GeoOptions, context: LoadContext) -> Self:
        """Map the lists."""
        return cls(config, PostingLists.load(context.arrays, context.columns), context.columns)

    def update(self, rows: Int32Array) -> None:
        """Put items where they are now."""
        columns = self._columns
        self._posts.update(
            rows, cells(columns.latitude[rows], columns.longitude[rows], self.config.precision)
        )

    def recall_batch(self, batch: QueryBatch, k: Int32Array) -> CandidateBatch:
        """Read the cell of each query, and its neighbours where it is thin."""
        places = zip(batch.latitude.tolist(), batch.longitude.tolist(), strict=True)
        # NaN, which is no location, equals nothing.
        around: list[Sequence[int]] = [
            _around(pygeohash.encode(latitude, longitude, self.config.precision))
            if latitude == latitude and longitude == longitude
            else ()
            for latitude, longitude in places
        ]
        if not any(around):
            return CandidateBatch.empty(k.size)
        keys = np.array([cell for part in around for cell in part], np.int64)
        offsets = np.zeros(k.size + 1, np.int64)
        np.cumsum([len(part) for part in around], out=offsets[1:])
        weights = np.full(keys.size, self.config.neighbour_weight, np.float32)
        weights[[start for start, part in zip(offsets.tolist(), around, strict=False) if part]] = 1.0
        wanted = Wanted(offsets, keys, weights, keys.astype(np.int32))
        return self._posts.read(wanted, self._reading, batch.now, k)


def cells(latitude: AnyArray, longitude: AnyArray, precision: int) -> Int64Array:
    """int64[n]: the cell of each place, `NO_KEY` where it is no place on Earth; see `cell_number`."""
    on_earth = (np.abs(latitude) <= 90) & (np.abs(longitude) <= 180)  # False for NaN
    keys = np.full(latitude.size, NO_KEY, np.int64)
    places = zip(latitude[on_earth].tolist(), longitude[on_earth].tolist(), strict=True)
    letters = "".join([pygeohash.encode(*place, precision) for place in places])
    digits = _DIGITS[np.frombuffer(letters.encode(), np.uint8)].reshape(-1, precision)
    keys[on_earth] = digits @ (1 << 5 * np.arange(precision - 1, -1, -1))
    return keys


def cell_number(geohash: str) -> int:
    """Return a GeoHash as a number: 5 bits a letter, the first letter highest."""
    number = 0
    for letter in geohash:
        number = number << 5 | int(_DIGITS[ord(letter)])
    return number


def geohash_of(number: int, precision: int) -> str:
    """Return the GeoHash of a cell's number."""
    return "".join(ALPHABET[number >> 5 * place & 31] for place in range(precision - 1, -1, -1))


@lru_cache(maxsize=65_536)
def _around(cell: str) -> tuple[int, ...]:
    """Return the numbers of a cell and, behind it, of its neighbours; beyond the poles there are none."""
    rows: list[str | None] = [cell, _next(cell, "top"), _next(cell, "bottom")]
    names: list[str] = []
    for middle in rows:
        if middle is not None:
            names += [middle, pygeohash.get_adjacent(middle, "left"), pygeohash.get_adjacent(middle, "right")]
    return tuple(dict.fromkeys(cell_number(name) for name in names))


def _next(cell: str, direction: Any) -> str | None:
    try:
        return str(pygeohash.get_adjacent(cell, direction))
    except ValueError:  # beyond the pole
        return None
