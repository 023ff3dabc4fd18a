"""Geo nearby: the newest good posts of the GeoHash cell that the request comes from.

Source: the recommender course (Wang Shusen, GeoHash recall): GeoHash -> good posts, newest first. There is nothing
personal in it, which is why the quality of the posts matters.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
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
        wanted = around(here, self.config.precision, self.config.neighbour_weight)
        if not wanted.keys.size:
            return CandidateBatch.empty(k.size)
        return self._posts.read(wanted, self._reading, batch.now, k)


def cells(latitude: AnyArray, longitude: AnyArray, precision: int) -> Int64Array:
    """Return the cell of each place: the bits of its GeoHash as a number; see `cell_number`.

    Source: G. Niemeyer, geohash.org, 2008: longitude and latitude are halved in turns, longitude first, and a bit says
    which half; five bits are a letter.

    Args:
        latitude, longitude: [n], degrees.
        precision: letters.

    Returns:
        int64[n]; `NO_KEY` where it is no place on Earth.
    """
    keys = np.empty(latitude.size, np.int64)
    _cells(
        latitude.astype(np.float64, copy=False), longitude.astype(np.float64, copy=False), 5 * precision, keys
    )
    return keys


@njit(nogil=True, cache=True)
def _cells(latitude, longitude, bits, keys):  # type: ignore[no-untyped-def]
    for q in range(keys.size):
        if not (abs(latitude[q]) <= 90 and abs(longitude[q]) <= 180):  # so written for NaN
            keys[q] = NO_KEY
            continue
        west, east, south, north = -180.0, 180.0, -90.0, 90.0
        number = np.int64(0)
        for bit in range(bits):
            if bit % 2:
                middle = (south + north) / 2
                upper = latitude[q] >= middle
                if upper:
                    south = middle
                else:
                    north = middle
            else:
                middle = (west + east) / 2
                upper = longitude[q] >= middle
                if upper:
                    west = middle
                else:
                    east = middle
            number = number << 1 | np.int64(upper)
        keys[q] = number


def cell_number(geohash: str) -> int:
    """Return a GeoHash as a number: 5 bits a letter, the first letter highest."""
    number = 0
    for letter in geohash:
        number = number << 5 | int(_DIGITS[ord(letter)])
    return number


def geohash_of(number: int, precision: int) -> str:
    """Return the GeoHash of a cell's number."""
    return "".join(ALPHABET[number >> 5 * place & 31] for place in range(precision - 1, -1, -1))


def around(here: Int64Array, precision: int, weight: float) -> Wanted:
    """Ask for the list of each cell and, behind it, those of its neighbours; beyond the poles there are none.

    Args:
        here: int64[n], cells, `NO_KEY` for none.
        precision: letters of their GeoHashes.
        weight: of a neighbour; the cell's own is 1.

    Returns:
        The lists; the cell of each is its trigger.
    """
    room = 9 * here.size
    keys, weights, triggers = np.empty(room, np.int64), np.empty(room, np.float32), np.empty(room, np.int32)
    offsets = np.empty(here.size + 1, np.int64)
    count = _around(here, 5 * precision, np.float32(weight), keys, weights, triggers, offsets)
    return Wanted(offsets, keys[:count], weights[:count], triggers[:count])


@njit(nogil=True, cache=True)
def _around(here, bits, weight, keys, weights, triggers, offsets):  # type: ignore[no-untyped-def]
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
                    keys[count] = triggers[count] = _interleaved((x + east) % columns, y + north, bits)
                    weights[count] = weight if count > offsets[q] else np.float32(1)
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
