"""The live catalogue: what is published has a row, what is taken down keeps its own, and twice is once."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recall.v1 import ingest_pb2 as pb

from engine.core.keys import key_of
from engine.core.memory import MemorySink
from engine.data.catalogue import AUTHOR, Catalogue
from engine.data.changes import ItemChanges
from engine.data.columns import CodedColumn, TagColumn, TextColumn
from engine.data.fold import fold
from engine.data.ids import IdIndex, IdKind
from engine.data.live import LiveCatalogue, LiveIds, find_keys

KINDS: tuple[IdKind, ...] = ("int64", "string")
ID = {"int64": lambda n: n, "string": lambda n: f"key-{n:03}"}


def strings(values: list[str]) -> Any:
    return pa.array(values, pa.large_string())


def catalogue_of(kind: IdKind, items: int = 4) -> Catalogue:
    """Items 0, 10, 20 ... of the authors 1 and 2 by turns, in the city "here", tagged "old"."""
    name = ID[kind]
    authors = IdIndex.of([name(1), name(2)])
    return Catalogue(
        items=IdIndex.of([name(10 * n) for n in range(items)]),
        users=IdIndex.of([name(0)]),
        authors=authors,
        author_names=TextColumn.of(strings(["Ann", ""])),
        numeric={
            AUTHOR: np.arange(items, dtype=np.int32) % 2,
            "published_at": np.arange(items, dtype=np.int64) + 100,
            "views": np.arange(items, dtype=np.int64),
        },
        coded={"city": CodedColumn.of(strings(["here"] * items))},
        texts={"title": TextColumn.of(strings([f"title {n}" for n in range(items)]))},
        tags={"tags": TagColumn.of(pa.array([["old"]] * items, pa.large_list(pa.large_string())))},
        skipped=(),
    )


def change(
    kind: IdKind, id_: int, author: int | None = None, time: int = 5_000, **item: Any
) -> pb.ItemChange:
    made = pb.ItemChange(updated_at_ms=time, put=pb.Item(**item))
    name = ID[kind](id_)
    if kind == "int64":
        made.item_id = name
    else:
        made.item_key = name
    if author is not None:
        setattr(made.put, "author_id" if kind == "int64" else "author_key", ID[kind](author))
    return made


def gone(kind: IdKind, id_: int) -> pb.ItemChange:
    made = change(kind, id_)
    made.take_down = True
    return made


def apply(live: LiveCatalogue, *changes: pb.ItemChange) -> list[int]:
    return live.apply(ItemChanges.of(changes, live.id_type)).tolist()


def view(live: LiveCatalogue, row: int) -> dict[str, Any]:
    """All that the columns say of a row, in outside terms."""
    columns = live.columns
    cities = {code: city for city, code in columns.city_codes.items()}
    tags = {code: tag for tag, code in columns.tag_vocabulary.items()}
    start, count = int(columns.tag_starts[row]), int(columns.tag_counts[row])
    author = columns.authors[row : row + 1]
    return {
        "id": live.items.ids(np.array([row], np.int32)).tolist()[0],
        "key": int(columns.keys[row]),
        "available": bool(columns.available[row]),
        "author": live.authors.ids(author).tolist()[0] if author[0] >= 0 else None,
        "city": cities.get(int(columns.cities[row])),
        "published_at": int(columns.published_at[row]),
        "quality": float(columns.quality[row]),
        "latitude": float(columns.latitude[row]),
        "tags": [tags[code] for code in columns.tag_codes[start : start + count].tolist()],
        "title": live.describe_items(np.array([row], np.int32))[0].title,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_item_gets_the_next_row(kind: IdKind) -> None:
    live = LiveCatalogue.of(catalogue_of(kind))
    new = change(
        kind, 7, author=9, title="new", tags=["a", "old", "b"], city="there", latitude=1.5, longitude=2.5,
        quality=0.5, published_at=77,
    )  # fmt: skip
    assert apply(live, new, change(kind, 5)) == [4, 5]
    assert view(live, 4) == {
        "id": ID[kind](7), "key": key_of(ID[kind](7)), "available": True, "author": ID[kind](9), "city": "there",
        "published_at": 77, "quality": 0.5, "latitude": 1.5, "tags": ["a", "old", "b"], "title": "new",
    }  # fmt: skip
    assert len(live.columns) == len(live.items) == 6
    assert len(live.authors) == 3
    # Nothing was said of the other: it was published when it was sent.
    bare = view(live, 5)
    assert (bare["author"], bare["city"], bare["tags"], bare["title"]) == (None, None, [], "")
    assert bare["published_at"] == 5
    assert np.isnan(bare["quality"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_put_replaces_all_that_was_known(kind: IdKind) -> None:
    live = LiveCatalogue.of(catalogue_of(kind))
    assert view(live, 1)["title"] == "title 1"
    assert apply(live, change(kind, 10, title="")) == [1]
    seen = view(live, 1)
    assert (seen["author"], seen["city"], seen["tags"], seen["title"]) == (None, None, [], "")
    assert view(live, 0)["tags"] == ["old"]
    assert [text.author for text in live.describe_items(np.array([0, 1, 2], np.int32))] == ["Ann", "", "Ann"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_take_down_keeps_the_row_and_a_put_brings_it_back(kind: IdKind) -> None:
    live = LiveCatalogue.of(catalogue_of(kind))
    assert apply(live, gone(kind, 20), gone(kind, 999)) == [2]
    assert not view(live, 2)["available"]
    assert view(live, 2)["title"] == "title 2"
    assert len(live.items) == 4
    assert apply(live, change(kind, 20, title="again")) == [2]
    assert view(live, 2)["available"]


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_changes_of_an_item_the_last_counts(kind: IdKind) -> None:
    live = LiveCatalogue.of(catalogue_of(kind))
    assert apply(live, change(kind, 7, title="a"), gone(kind, 7), change(kind, 7, title="b")) == [4]
    assert view(live, 4)["title"] == "b"
    assert apply(live, change(kind, 8), gone(kind, 8)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_other_type_are_left_out(kind: IdKind) -> None:
    other: IdKind = "string" if kind == "int64" else "int64"
    live = LiveCatalogue.of(catalogue_of(kind))
    assert apply(live, change(other, 7), change(kind, 8)) == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_found_as_ids_and_as_keys(kind: IdKind) -> None:
    name = ID[kind]
    ids = LiveIds(IdIndex.of([name(5), name(1)]))

    def cells(*numbers: int) -> Any:
        return np.array([name(n) if kind == "int64" else name(n).encode() for n in numbers])

    assert ids.add(cells(9, 1, 3, 9)).tolist() == [2, 0, 3, 2]
    assert ids.add(cells(100_000, 3)).tolist() == [4, 3]
    wanted = [name(n) for n in (3, 1, 77, 100_000, 5)]
    assert ids.rows(wanted).tolist() == [3, 0, -1, 4, 1]
    assert ids.rows(np.array(wanted)).tolist() == [3, 0, -1, 4, 1]
    keys = np.array([key_of(id_) for id_ in wanted], np.int64)
    found = np.empty(keys.size, np.int32)
    find_keys(keys, *ids.key_tables, found)
    assert found.tolist() == [3, 0, -1, 4, 1]
    rows = np.array([4, 0, 3], np.int32)
    assert ids.ids(rows).tolist() == [name(100_000), name(1), name(3)]
    assert ids.keys(rows).tolist() == [key_of(name(n)) for n in (100_000, 1, 3)]
    assert len(ids) == 5


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "gone"]),
        st.integers(0, 12).map(lambda n: 5 * n),
        st.none() | st.integers(0, 5),
        st.lists(st.sampled_from(["x", "y", "old"]), max_size=3),
        st.sampled_from(["", "here", "there"]),
        st.text(max_size=4),
    ),
    max_size=40,
)


def changes_of(kind: IdKind, steps: list[tuple[Any, ...]]) -> list[pb.ItemChange]:
    return [
        change(kind, id_, author, tags=tags, city=city, title=title) if what == "put" else gone(kind, id_)
        for what, id_, author, tags, city, title in steps
    ]


def state_of(live: LiveCatalogue) -> dict[Any, dict[str, Any]]:
    """What the catalogue says of each item; of one that was taken down nobody asks more than that."""
    views = (view(live, row) for row in range(len(live.items)))
    return {
        seen["id"]: {**seen, "quality": str(seen["quality"]), "latitude": str(seen["latitude"])}
        if seen["available"]
        else {"available": False}
        for seen in views
    }


@settings(max_examples=40, deadline=None)
@given(steps=_STEPS, pieces=st.integers(1, 7), kind=st.sampled_from(KINDS))
def test_pieces_and_repetitions_make_no_difference(
    steps: list[tuple[Any, ...]], pieces: int, kind: Literal["int64", "string"]
) -> None:
    changes = changes_of(kind, steps)
    together, apart = (LiveCatalogue.of(catalogue_of(kind)) for _ in range(2))
    for one in changes:
        apply(apart, one)
    for start in range(0, len(changes), pieces):
        apply(together, *changes[start : start + pieces])
    # An item that was published and taken down within one piece never got a row.
    seen, known = state_of(together), state_of(apart)
    assert {id_: what for id_, what in known.items() if id_ in seen} == seen
    assert all(not known[id_]["available"] for id_ in known.keys() - seen.keys())
    apply(apart, *changes)
    assert state_of(apart) == known


@settings(max_examples=40, deadline=None)
@given(steps=_STEPS, kind=st.sampled_from(KINDS))
def test_folding_gives_what_taking_in_gives(
    steps: list[tuple[Any, ...]], kind: Literal["int64", "string"]
) -> None:
    newest: dict[Any, pb.ItemChange] = {}
    for one in changes_of(kind, steps):
        newest[one.item_key or one.item_id] = one
    base = catalogue_of(kind)
    folded, digest = fold(base, [one.SerializeToString() for one in newest.values()])
    reordered = [one.SerializeToString() for one in reversed(newest.values())]
    assert fold(base, reordered)[1] == digest
    assert (digest == "") == (not steps)
    live = LiveCatalogue.of(base)
    apply(live, *newest.values())
    assert state_of(LiveCatalogue.of(folded)) == state_of(live)
    # Rows rise with ids, and what the live protocol does not know stays with its item.
    ids = folded.items.ids(np.arange(len(folded.items), dtype=np.int32)).tolist()
    assert ids == sorted(ids)
    assert folded.numeric["views"][folded.items.rows([ID[kind](10 * n) for n in range(4)])].tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_a_folded_catalogue_comes_back_from_disk(through_disk: Any) -> None:
    folded, _ = fold(catalogue_of("int64"), [gone("int64", 10).SerializeToString()])
    again = Catalogue.load(through_disk(folded))
    assert again.available is not None
    assert again.available.tolist() == [True, False, True, True]


def test_a_catalogue_without_take_downs_says_nothing_of_them() -> None:
    sink = MemorySink()
    catalogue_of("int64").save(sink)
    assert Catalogue.load(sink.arrays).available is None
