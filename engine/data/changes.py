"""Changes of items, as they come from the live log, in columns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from recall.v1 import ingest_pb2 as pb

from engine.core.int_table import IntTable
from engine.core.keys import keys_of_cells
from engine.core.ragged import take_lists
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
from engine.data.change_bytes import KEY, NUMBER, ChangeBytes, cells_of, group_texts
from engine.data.columns import CodedColumn, TextColumn
from engine.data.ids import MAX_ID_BYTES, IdKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ItemChanges:
    """Changes of items, one per item: `taken_down`, and n items that are published or changed, as columns.

    Ids are int64, or bytes (S) where they are strings.

    Attributes:
        taken_down: [m], external ids.
        ids: [n], external ids of the others.
        authors: [n], their authors' external ids; anything where not known.
        has_author: bool[n].
        published_at: int64[n], seconds since the epoch; the time of the change where it did not say.
        cities: of the n items; -1 where not known.
        titles: "" where not known.
        latitude, longitude: float64[n] degrees; NaN where not known.
        quality, duration_seconds: float32[n]; NaN where not known.
        tags: their tags end to end; item i has `tag_counts[i]` of them.
        tag_counts: int32[n].
    """

    taken_down: AnyArray
    ids: AnyArray
    authors: AnyArray
    has_author: BoolArray
    published_at: Int64Array
    cities: CodedColumn
    titles: TextColumn
    latitude: Float64Array
    longitude: Float64Array
    quality: Float32Array
    duration_seconds: Float32Array
    tags: CodedColumn
    tag_counts: Int32Array

    @classmethod
    def of(cls, changes: Iterable[pb.ItemChange], kind: IdKind) -> Self:
        """Take messages apart; otherwise as `parse`."""
        return cls.parse([change.SerializeToString() for change in changes], kind)

    @classmethod
    def parse(cls, messages: Sequence[bytes], kind: IdKind) -> Self:
        """Take serialized changes apart.

        Args:
            messages: serialized recall.v1.ItemChange, oldest first; of several of one item the last counts.
            kind: of the catalogue's ids; changes of items with ids of the other kind are left out, and logged.
        """
        raw = ChangeBytes.of(messages)
        newest = _newest(raw, kind)
        put = newest[raw.put[newest]]
        gone = newest[~raw.put[newest]]
        published = raw.published_at[put]
        given = _is_id(raw.author_form, raw.authors, raw.author_spans, kind)[put]
        tag_offsets, at = take_lists(raw.tag_offsets, put)
        return cls(
            taken_down=_ids(raw, gone, kind),
            ids=_ids(raw, put, kind),
            authors=raw.authors[put] if kind == "int64" else cells_of(raw.data, raw.author_spans[put]),
            has_author=given,
            published_at=np.where(published < 0, raw.updated_at_ms[put] // 1000, published),
            cities=_coded(raw.data, raw.city_spans[put]),
            titles=_text_column(raw.data, raw.title_spans[put]),
            latitude=raw.latitude[put],
            longitude=raw.longitude[put],
            quality=raw.quality[put],
            duration_seconds=raw.duration_seconds[put],
            tags=_coded(raw.data, raw.tag_spans[at]),
            tag_counts=np.diff(tag_offsets).astype(np.int32),
        )

    def __len__(self) -> int:
        return int(self.ids.size + self.taken_down.size)


def in_order(messages: Sequence[bytes], kind: IdKind) -> list[bytes]:
    """Return the newest change of each item in rising order of id; arguments as in `ItemChanges.parse`."""
    raw = ChangeBytes.of(messages)
    newest = _newest(raw, kind)
    ordered = newest[np.argsort(_ids(raw, newest, kind), kind="stable")]
    return [messages[place] for place in raw.places[ordered].tolist()]


def codes_of(texts: CodedColumn, codes: dict[str, int]) -> Int32Array:
    """Return int32[n]: the code of each text, -1 where missing; a text not seen before gets the next code."""
    vocabulary = [codes.setdefault(text, len(codes)) for text in texts.vocabulary.arrow().to_pylist()]
    # One more stands for a missing text, whose code, -1, is the last place.
    found: Int32Array = np.array([*vocabulary, NO_ROW], np.int32)[texts.codes]
    return found


def _newest(raw: ChangeBytes, kind: IdKind) -> Int64Array:
    """Return which messages are the last of their item, in order."""
    mine = np.flatnonzero(_is_id(raw.id_form, raw.ids, raw.id_spans, kind))
    if mine.size < raw.ids.size:
        left_out = raw.ids.size - mine.size
        log.warning("left out %d changes of items whose ids are not of type %s", left_out, kind)
    ids = _ids(raw, mine, kind)
    keys = ids if kind == "int64" else keys_of_cells(ids.view(np.uint8).reshape(ids.size, ids.dtype.itemsize))
    places = np.arange(mine.size, dtype=np.int32)
    last = IntTable()
    last.put(keys, places)
    newest: Int64Array = mine[last.get(keys) == places]
    return newest


def _is_id(form: UInt8Array, numbers: Int64Array, spans: Int64Array, kind: IdKind) -> BoolArray:
    """bool[n]: which ids are there, of this type and what an id may be."""
    if kind == "int64":
        number: BoolArray = (form == NUMBER) & (numbers >= 0)
        return number
    key: BoolArray = (form == KEY) & (spans[:, 1] > 0) & (spans[:, 1] <= MAX_ID_BYTES)
    return key


def _ids(raw: ChangeBytes, which: Int64Array, kind: IdKind) -> AnyArray:
    return raw.ids[which] if kind == "int64" else cells_of(raw.data, raw.id_spans[which])


def _coded(data: UInt8Array, spans: Int64Array) -> CodedColumn:
    codes, first = group_texts(data, spans)
    return CodedColumn(codes, _text_column(data, spans[first]))


def _text_column(data: UInt8Array, spans: Int64Array) -> TextColumn:
    offsets = np.zeros(spans.shape[0] + 1, np.int64)
    np.cumsum(spans[:, 1], out=offsets[1:])
    at = np.arange(int(offsets[-1])) + np.repeat(spans[:, 0] - offsets[:-1], spans[:, 1])
    return TextColumn(offsets, data[at])
