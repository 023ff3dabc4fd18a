"""Changes of items, as they come from the live log, in columns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from recall.v1 import ingest_pb2 as pb

from engine.core.types import Float32Array, Float64Array, Int32Array, Int64Array
from engine.data.ids import IdKind

log = logging.getLogger(__name__)

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class ItemChanges:
    """Changes of items, one per item: `taken_down`, and n items that are published or changed, as columns.

    Attributes:
        taken_down: external ids.
        ids: external ids of the n others.
        authors: their authors' external ids; None where not known.
        published_at: int64[n], seconds since the epoch; the time of the change where it did not say.
        cities, titles: "" where not known.
        latitude, longitude: float64[n] degrees; NaN where not known.
        quality, duration_seconds: float32[n]; NaN where not known.
        tags: their tags end to end; item i has `tag_counts[i]` of them.
        tag_counts: int32[n].
    """

    taken_down: list[int | str]
    ids: list[int | str]
    authors: list[int | str | None]
    published_at: Int64Array
    cities: list[str]
    titles: list[str]
    latitude: Float64Array
    longitude: Float64Array
    quality: Float32Array
    duration_seconds: Float32Array
    tags: list[str]
    tag_counts: Int32Array

    @classmethod
    def of(cls, changes: Iterable[pb.ItemChange], kind: IdKind) -> Self:
        """Take changes apart.

        Args:
            changes: oldest first; of several of one item the last counts.
            kind: of the catalogue's ids; changes of items with ids of the other kind are left out, and logged.
        """
        text = kind == "string"
        newest: dict[int | str, pb.ItemChange] = {}
        strange = 0
        wanted = "item_key" if text else "item_id"
        for change in changes:
            if change.HasField(wanted):
                newest[change.item_key if text else change.item_id] = change
            else:
                strange += 1
        if strange:
            log.warning("left out %d changes of items whose ids are not of type %s", strange, kind)
        taken_down = [id_ for id_, change in newest.items() if not change.HasField("put")]
        for id_ in taken_down:
            del newest[id_]
        items = [change.put for change in newest.values()]
        authors: list[int | str | None]
        if text:
            authors = [item.author_key if item.HasField("author_key") else None for item in items]
        else:
            authors = [item.author_id if item.HasField("author_id") else None for item in items]
        published = [
            item.published_at if item.HasField("published_at") else change.updated_at_ms // 1000
            for item, change in zip(items, newest.values(), strict=True)
        ]
        return cls(
            taken_down=taken_down,
            ids=list(newest),
            authors=authors,
            published_at=np.array(published, np.int64),
            cities=[item.city for item in items],
            titles=[item.title for item in items],
            latitude=np.array([i.latitude if i.HasField("latitude") else _NAN for i in items], np.float64),
            longitude=np.array([i.longitude if i.HasField("longitude") else _NAN for i in items], np.float64),
            quality=np.array([i.quality if i.HasField("quality") else _NAN for i in items], np.float32),
            duration_seconds=np.array(
                [i.duration_seconds if i.HasField("duration_seconds") else _NAN for i in items], np.float32
            ),
            tags=[tag for item in items for tag in item.tags],
            tag_counts=np.array([len(item.tags) for item in items], np.int32),
        )

    @classmethod
    def parse(cls, serialized: Iterable[bytes], kind: IdKind) -> Self:
        """Take serialized changes apart; otherwise as `of`."""
        return cls.of(map(pb.ItemChange.FromString, serialized), kind)

    def __len__(self) -> int:
        return len(self.ids) + len(self.taken_down)


def codes_of(texts: Sequence[str], codes: dict[str, int]) -> Int32Array:
    """Return int32[n]: the code of each string, -1 for ""; a string not seen before gets the next code."""
    for text in dict.fromkeys(texts):
        if text and text not in codes:
            codes[text] = len(codes)
    get = codes.get
    return np.array([get(text, -1) for text in texts], np.int32)
