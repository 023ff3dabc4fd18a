"""Serialized recall.v1.ItemChange messages as columns, taken apart by one compiled pass.

A Python message object per change would cost most of what taking a change in costs. What is read here is plain protobuf
encoding (https://protobuf.dev/programming-guides/encoding); a message that is encoded in any way but the usual one, or
has fields that are not known here, goes through protobuf's own parser first. Field numbers are those of ingest.proto.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from google.protobuf.message import DecodeError
from numba import njit
from recall.v1 import ingest_pb2 as pb

from engine.core.keys import FNV_OFFSET, FNV_PRIME
from engine.core.types import (
    NO_ROW,
    AnyArray,
    BoolArray,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
    UInt8Array,
)

log = logging.getLogger(__name__)

NOT_GIVEN, NUMBER, KEY = 0, 1, 2
"""Whether an id is there, and of which type."""

_PUT = 1


@dataclass(frozen=True, slots=True)
class ChangeBytes:
    """Messages of changes, n of them. Texts are spans of `data`: where they begin, and how many bytes they have.

    Attributes:
        data: uint8[...], the messages end to end.
        put: bool[n], whether the item is published or changed; else it is taken down.
        id_form, author_form: uint8[n], NOT_GIVEN, NUMBER or KEY.
        ids, authors, updated_at_ms, published_at: int64[n]; -1 where not given.
        id_spans, author_spans, title_spans, city_spans: int64[n, 2].
        latitude, longitude: float64[n]; quality, duration_seconds: float32[n]; NaN where not given.
        tag_spans: int64[m, 2], message after message.
        tag_offsets: int64[n + 1]; message i has the tags [tag_offsets[i], tag_offsets[i + 1]).
        places: int64[n], where each stood in what was given, as some may have been left out.
    """

    data: UInt8Array
    put: BoolArray
    id_form: UInt8Array
    author_form: UInt8Array
    ids: Int64Array
    authors: Int64Array
    updated_at_ms: Int64Array
    published_at: Int64Array
    id_spans: Int64Array
    author_spans: Int64Array
    title_spans: Int64Array
    city_spans: Int64Array
    latitude: Float64Array
    longitude: Float64Array
    quality: Float32Array
    duration_seconds: Float32Array
    tag_spans: Int64Array
    tag_offsets: Int64Array
    places: Int64Array

    @classmethod
    def of(cls, messages: Sequence[bytes]) -> Self:
        """Take messages apart; one that is no ItemChange is left out, and logged."""
        decoded, usual = cls._decode(messages)
        if usual.all():
            return decoded
        again: list[bytes] = []
        places: list[int] = []
        for place, fine in enumerate(usual.tolist()):
            try:
                again.append(messages[place] if fine else _usual_form(messages[place]))
                places.append(place)
            except DecodeError:
                continue
        damaged = len(messages) - len(places)
        if damaged:
            log.error("left out %d changes of items that are no recall.v1.ItemChange", damaged)
        return replace(cls._decode(again)[0], places=np.array(places, np.int64))

    @classmethod
    def _decode(cls, messages: Sequence[bytes]) -> tuple[Self, BoolArray]:
        n = len(messages)
        data = np.frombuffer(b"".join(messages), np.uint8)
        starts = np.zeros(n + 1, np.int64)
        np.cumsum(np.fromiter(map(len, messages), np.int64, n), out=starts[1:])
        forms = np.zeros((3, n), np.uint8)
        numbers = np.full((4, n), -1, np.int64)
        spans = np.zeros((4, n, 2), np.int64)
        places = np.full((2, n), np.nan, np.float64)
        shares = np.full((2, n), np.nan, np.float32)
        # A tag has at least a byte that says so and one for its length.
        tag_spans = np.empty((data.size // 2 + 1, 2), np.int64)
        tag_offsets = np.zeros(n + 1, np.int64)
        usual = np.zeros(n, np.bool_)
        _take_apart(
            data, starts, forms, numbers, spans, places.view(np.uint64), shares.view(np.uint32), tag_spans,
            tag_offsets, usual,
        )  # fmt: skip
        tags = int(tag_offsets[-1])
        decoded = cls(
            data, forms[0] == _PUT, forms[1], forms[2], numbers[0], numbers[1], numbers[2], numbers[3], spans[0],
            spans[1], spans[2], spans[3], places[0], places[1], shares[0], shares[1], tag_spans[:tags], tag_offsets,
            np.arange(n),
        )  # fmt: skip
        return decoded, usual


def cells_of(data: UInt8Array, spans: Int64Array) -> AnyArray:
    """Return S{width}[n], the texts of some spans, as wide as the longest."""
    width = max(1, int(spans[:, 1].max(initial=1)))
    cells = np.zeros((spans.shape[0], width), np.uint8)
    _copy_cells(data, spans, cells)
    return cells.view(f"S{width}")[:, 0]


def group_texts(data: UInt8Array, spans: Int64Array) -> tuple[Int32Array, Int64Array]:
    """Number the distinct texts of some spans in order of first appearance.

    Args:
        data: uint8[...].
        spans: int64[n, 2].

    Returns:
        int32[n], the number of each text, -1 for an empty one; int64[m], where each distinct text comes first.
    """
    size = 16
    while size < 2 * spans.shape[0]:
        size *= 2
    codes = np.empty(spans.shape[0], np.int32)
    first = np.empty(spans.shape[0], np.int64)
    distinct = _group(data, spans, np.full(size, NO_ROW, np.int32), codes, first)
    return codes, first[:distinct]


def _usual_form(message: bytes) -> bytes:
    """Return a message as protobuf itself writes it, without what is not known.

    Raises:
        DecodeError: it is none.
    """
    change = pb.ItemChange.FromString(message)
    change.DiscardUnknownFields()
    return change.SerializeToString()


# Wire types.
_VARINT, _FIXED64, _TEXT, _FIXED32 = 0, 1, 2, 5


@njit(nogil=True, cache=True)
def _take_apart(  # type: ignore[no-untyped-def]
    data, starts, forms, numbers, spans, places, shares, tag_spans, tag_offsets, usual
):
    tags = np.int64(0)  # a literal would have `_take_item_apart` compiled twice
    for i in range(starts.size - 1):
        at, end = starts[i], starts[i + 1]
        first_tag = tags
        put_at = put_end = 0
        seen = np.int64(0)
        fine = True
        while at < end and fine:
            tag, at = _varint(data, at, end)
            field, wire = np.int64(tag >> np.uint64(3)), tag & np.uint64(7)
            if at < 0 or field < 1 or field > 5:
                fine = False
                break
            # Where both halves of a choice are there, or one twice, it is protobuf's to say what counts.
            bit = np.int64(1) << (np.int64(1) if field == 2 else np.int64(4) if field == 5 else field)
            if seen & bit:
                fine = False
                break
            seen |= bit
            value, at = _varint(data, at, end)
            if at < 0:
                fine = False
            elif field == 2 or field == 4:
                if wire != _TEXT or value > np.uint64(end - at):
                    fine = False
                    break
                if field == 2:
                    forms[1, i] = KEY
                    spans[0, i, 0], spans[0, i, 1] = at, value
                else:
                    forms[0, i] = _PUT
                    put_at, put_end = at, at + np.int64(value)
                at += np.int64(value)
            elif wire != _VARINT:
                fine = False
            elif field == 1:
                forms[1, i] = NUMBER
                numbers[0, i] = np.int64(value)
            elif field == 3:
                numbers[2, i] = np.int64(value)
        if fine and put_end > put_at:
            tags = _take_item_apart(
                data, put_at, put_end, i, forms, numbers, spans, places, shares, tag_spans, tags
            )
            fine = tags >= 0
        if not fine:
            tags = first_tag
        usual[i] = fine
        tag_offsets[i + 1] = tags


@njit(nogil=True, cache=True)
def _take_item_apart(  # type: ignore[no-untyped-def]
    data, at, end, i, forms, numbers, spans, places, shares, tag_spans, tags
):
    """Take the Item of message i apart; returns how many tags there are now, -1 where it is not in the usual form."""
    seen = np.int64(0)
    while at < end:
        tag, at = _varint(data, at, end)
        field, wire = np.int64(tag >> np.uint64(3)), tag & np.uint64(7)
        if at < 0 or field < 1 or field > 10:
            return -1
        bit = np.int64(1) << (np.int64(1) if field == 2 else field)
        if seen & bit and field != 5:
            return -1
        seen |= bit
        if field >= 7:
            size = 8 if field <= 8 else 4
            if wire != (_FIXED64 if field <= 8 else _FIXED32) or end - at < size:
                return -1
            bits = np.uint64(0)
            for b in range(size):
                bits |= np.uint64(data[at + b]) << np.uint64(8 * b)
            if field <= 8:
                places[field - 7, i] = bits
            else:
                shares[field - 9, i] = np.uint32(bits)
            at += size
            continue
        value, at = _varint(data, at, end)
        if at < 0:
            return -1
        if field == 1 or field == 3:
            if wire != _VARINT:
                return -1
            if field == 1:
                forms[2, i] = NUMBER
                numbers[1, i] = np.int64(value)
            else:
                numbers[3, i] = np.int64(value)
            continue
        if wire != _TEXT or value > np.uint64(end - at):
            return -1
        length = np.int64(value)
        if field == 2:
            forms[2, i] = KEY
            spans[1, i, 0], spans[1, i, 1] = at, length
        elif field == 4:
            spans[2, i, 0], spans[2, i, 1] = at, length
        elif field == 6:
            spans[3, i, 0], spans[3, i, 1] = at, length
        else:
            tag_spans[tags, 0], tag_spans[tags, 1] = at, length
            tags += 1
        at += length
    return tags


@njit(nogil=True, cache=True, inline="always")
def _varint(data, at, end):  # type: ignore[no-untyped-def]
    """Return a number and where it ends; -1 for where if it does not end in time."""
    value = np.uint64(0)
    for b in range(10):
        if at >= end:
            return np.uint64(0), np.int64(-1)
        byte = data[at]
        at += 1
        value |= np.uint64(byte & np.uint8(127)) << np.uint64(7 * b)
        if byte < 128:
            return value, np.int64(at)
    return np.uint64(0), np.int64(-1)


@njit(nogil=True, cache=True)
def _copy_cells(data, spans, cells):  # type: ignore[no-untyped-def]
    for i in range(spans.shape[0]):
        for b in range(spans[i, 1]):
            cells[i, b] = data[spans[i, 0] + b]


@njit(nogil=True, cache=True)
def _group(data, spans, table, codes, first):  # type: ignore[no-untyped-def]
    distinct = 0
    mask = np.uint64(table.size - 1)
    for i in range(spans.shape[0]):
        start, size = spans[i, 0], spans[i, 1]
        codes[i] = -1
        if size == 0:
            continue
        h = np.uint64(FNV_OFFSET)
        for b in range(size):
            h = (h ^ np.uint64(data[start + b])) * np.uint64(FNV_PRIME)
        at = (h ^ (h >> np.uint64(32))) & mask
        while table[at] >= 0:
            known = spans[first[table[at]], 0]
            same = spans[first[table[at]], 1] == size
            b = 0
            while same and b < size:
                same = data[known + b] == data[start + b]
                b += 1
            if same:
                break
            at = (at + np.uint64(1)) & mask
        if table[at] < 0:
            table[at] = distinct
            first[distinct] = i
            distinct += 1
        codes[i] = table[at]
    return distinct
