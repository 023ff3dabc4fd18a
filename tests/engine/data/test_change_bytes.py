"""What the kernel reads of a serialized change is what protobuf's own parser reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from recall.v1 import ingest_pb2 as pb

from engine.data.change_bytes import KEY, NOT_GIVEN, NUMBER, ChangeBytes, group_texts

_TIMES = st.integers(0, 2**53)
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
_ITEMS = st.builds(
    lambda author, **more: pb.Item(
        **author, **{name: value for name, value in more.items() if value is not None}
    ),
    author=st.sampled_from(
        [{}, {"author_id": 0}, {"author_id": 2**62}, {"author_key": ""}, {"author_key": "é"}]
    ),
    published_at=st.none() | _TIMES,
    title=_TEXTS,
    tags=st.lists(_TEXTS, max_size=4),
    city=_TEXTS,
    latitude=st.none() | st.floats(-90, 90),
    longitude=st.none() | st.floats(-180, 180),
    quality=st.none() | st.floats(0, 1, width=32),
    duration_seconds=st.none() | st.floats(0, width=32, allow_infinity=False),
)
_CHANGES = st.builds(
    lambda id_, updated_at_ms, what: pb.ItemChange(
        **id_, **what, **({} if updated_at_ms is None else {"updated_at_ms": updated_at_ms})
    ),
    id_=st.sampled_from(
        [{}, {"item_id": 0}, {"item_id": 5}, {"item_id": 2**63 - 1}, {"item_key": "k" * 200}]
    ),
    updated_at_ms=st.none() | _TIMES,
    what=st.sampled_from([{}, {"take_down": True}, {"take_down": False}])
    | _ITEMS.map(lambda item: {"put": item}),
)


def same(value: float, message: Any, field: str) -> bool:
    return value == getattr(message, field) if message.HasField(field) else math.isnan(value)


def check(raw: ChangeBytes, changes: list[pb.ItemChange]) -> None:
    def text(span: Any) -> str:
        return bytes(raw.data[span[0] : span[0] + span[1]]).decode()

    assert raw.ids.size == len(changes)
    for i, change in enumerate(changes):
        forms = {None: NOT_GIVEN, "item_id": NUMBER, "item_key": KEY}
        assert raw.id_form[i] == forms[change.WhichOneof("id")]
        assert raw.ids[i] == (change.item_id if change.HasField("item_id") else -1)
        assert text(raw.id_spans[i]) == change.item_key
        assert raw.updated_at_ms[i] == (change.updated_at_ms if change.HasField("updated_at_ms") else -1)
        assert raw.put[i] == change.HasField("put")
        item = change.put
        authors = {None: NOT_GIVEN, "author_id": NUMBER, "author_key": KEY}
        assert raw.author_form[i] == authors[item.WhichOneof("author")]
        assert raw.authors[i] == (item.author_id if item.HasField("author_id") else -1)
        assert text(raw.author_spans[i]) == item.author_key
        assert raw.published_at[i] == (item.published_at if item.HasField("published_at") else -1)
        assert (text(raw.title_spans[i]), text(raw.city_spans[i])) == (item.title, item.city)
        for field in ("latitude", "longitude", "quality", "duration_seconds"):
            assert same(getattr(raw, field)[i], item, field), field
        part = slice(raw.tag_offsets[i], raw.tag_offsets[i + 1])
        assert [text(span) for span in raw.tag_spans[part]] == list(item.tags)


@settings(max_examples=150, deadline=None)
@given(st.lists(_CHANGES, max_size=6))
def test_the_usual_form(changes: list[pb.ItemChange]) -> None:
    check(ChangeBytes.of([change.SerializeToString() for change in changes]), changes)


@settings(max_examples=150, deadline=None)
@given(st.lists(_CHANGES, min_size=1, max_size=4), _CHANGES, st.data())
def test_any_other_form_and_what_is_none_at_all(
    others: list[pb.ItemChange], change: pb.ItemChange, data: st.DataObject
) -> None:
    """Two messages end to end are one; unknown fields are none of ours; cut and changed bytes may be anything."""
    whole = change.SerializeToString() + data.draw(
        st.sampled_from([*(o.SerializeToString() for o in others), b"zz"])
    )
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    noise = data.draw(st.binary(max_size=20))
    unknown = whole + b"\xa2\x06\x02hi"
    messages = [whole, cut, noise, unknown]
    known, places = [], []
    for place, message in enumerate(messages):
        try:
            known.append(pb.ItemChange.FromString(message))
            places.append(place)
        except Exception:
            continue
    raw = ChangeBytes.of(messages)
    # A text that is no UTF-8 is an error to protobuf alone; everything else is the same.
    if raw.places.tolist() == places:
        check(raw, known)
    else:
        assert set(places) < set(raw.places.tolist())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["", "a", "aa", "b", "ba", "\u00e9"]) | _TEXTS, max_size=30))
def test_texts_are_numbered_as_they_first_appear(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    spans = np.array(
        [[end - len(text), len(text)] for end, text in zip(ends, encoded, strict=True)], np.int64
    )
    codes, first = group_texts(np.frombuffer(b"".join(encoded), np.uint8), spans.reshape(-1, 2))
    distinct = [text for text in dict.fromkeys(texts) if text]
    assert codes.tolist() == [distinct.index(text) if text else -1 for text in texts]
    assert [texts[at] for at in first.tolist()] == distinct


def test_nothing() -> None:
    raw = ChangeBytes.of([])
    assert raw.ids.size == raw.tag_spans.shape[0] == 0
    np.testing.assert_array_equal(raw.tag_offsets, [0])
