"""Geo nearby: the newest good posts of the GeoHash cell that the request comes from.

Source: the recommender course (Wang Shusen, GeoHash recall): GeoHash -> good posts, newest first. There is nothing
personal in it, which is why the quality of the posts matters. Cells are pygeohash's.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
import pygeohash
from numba import njit
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
        here = cells(batch.latitude, batch.longitude, self.config.precision)
        keys, offsets = around(here, self.config.precision)
        if not keys.size:
            return CandidateBatch.empty(k.size)
        weights = np.full(keys.size, self.config.neighbour_weight, np.float32)
        weights[offsets[:-1][here != NO_KEY]] = 1.0
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


def around(here: Int64Array, precision: int) -> tuple[Int64Array, Int64Array]:
    """Return each cell and, behind it, its neighbours; beyond the poles there are none.

    Args:
        here: int64[n], cells, `NO_KEY` for none.
        precision: letters of their GeoHashes.

    Returns:
        int64[m], cells; int64[n + 1], where those of each begin.
    """
    keys = np.empty(9 * here.size, np.int64)
    offsets = np.empty(here.size + 1, np.int64)
    count = _around(here, 5 * precision, keys, offsets)
    return keys[:count], offsets


@njit(nogil=True, cache=True)
def _around(here, bits, keys, offsets):  # type: ignore[no-untyped-def]
    # The bits of longitude and latitude take turns, longitude's first from the top.
    columns = np.int64(1) << ((bits + 1) // 2)
    rows = np.int64(1) << (bits // 2)
    count = 0
    offsets[0] = 0
    for q in range(here.size):
        if here[q] >= 0:
            x = np.int64(0)
            y = np.int64(0)
            for bit in range(bits - 1, -1, -1):
                value = (here[q] >> bit) & 1
                if (bits - 1 - bit) % 2:
                    y = y << 1 | value
                else:
                    x = x << 1 | value
            for north in (0, 1, -1):
                if not 0 <= y + north < rows:
                    continue
                for east in (0, -1, 1):
                    keys[count] = _interleaved((x + east) % columns, y + north, bits)
                    count += 1
        offsets[q + 1] = count
    return count


@njit(nogil=True, cache=True)
def _interleaved(x, y, bits):  # type: ignore[no-untyped-def]
    number = np.int64(0)
    left, right = (bits + 1) // 2, bits // 2
    for place in range(bits):
        if place % 2:
            right -= 1
            number = number << 1 | ((y >> right) & 1)
        else:
            left -= 1
            number = number << 1 | ((x >> left) & 1)
    return number
