from __future__ import annotations

import math

import numpy as np
import pytest
from recall.v1 import ingest_pb2 as pb

from engine.core.keys import key_of
from engine.online.ingest_wire import MAX_AHEAD_SECONDS, MAX_ITEMS, EventReader, ItemReader
from engine.state.layout import ITEM, RECORD, kind_of

NOW = 1_700_000_000
KINDS = ("click", "like", "view")


def refusals(event: pb.Event, kind="int64") -> list[tuple[int, str, str]]:
    writes, refused, counts = EventReader(KINDS, kind).read([event], NOW)
    assert len(writes) + len(refused) == 1
    assert counts.total() == len(writes)
    return refused


def click(**fields) -> pb.Event:
    return pb.Event(**{"user_id": 1, "action": pb.Action(item_id=2, kind="click"), **fields})


GOOD = [
    click(),
    click(user_id=0, event_id="e" * 64, timestamp=0, city="é" * 128),
    click(timestamp=NOW + MAX_AHEAD_SECONDS),
    click(action=pb.Action(item_id=2**63 - 1, kind="view", watch_seconds=0)),
    pb.Event(user_id=1, exposure=pb.Exposure(item_ids=range(MAX_ITEMS))),
    pb.Event(user_id=1, follow=pb.Follow(author_id=0, undo=True)),
    pb.Event(user_id=1, dislike=pb.Dislike(item_id=0)),
    pb.Event(user_id=1, dislike=pb.Dislike(author_id=5, undo=True)),
    pb.Event(user_id=1, dislike=pb.Dislike(topic="x" * 256)),
    pb.Event(user_id=1, leftovers=pb.Leftovers(item_ids=range(MAX_ITEMS), scores=[1.5] * MAX_ITEMS)),
    pb.Event(user_id=1, leftovers=pb.Leftovers(item_ids=[3, 3, 4])),
]


@pytest.mark.parametrize("event", GOOD, ids=range(len(GOOD)))
def test_what_keeps_the_rules_is_taken(event):
    assert refusals(event) == []


BAD = [
    (pb.Event(action=pb.Action(item_id=2, kind="click")), "user"),
    (pb.Event(user_id=1), "what"),
    (click(user_id=-1), "user_id"),
    (click(user_key="a"), "user_key"),
    (click(event_id="é" * 33), "event_id"),
    (click(timestamp=-1), "timestamp"),
    (click(timestamp=NOW + MAX_AHEAD_SECONDS + 1), "timestamp"),
    (click(timestamp=NOW * 1000), "timestamp"),
    (click(city="é" * 129), "city"),
    (click(action=pb.Action(kind="click")), "action.item"),
    (click(action=pb.Action(item_id=-5, kind="click")), "action.item_id"),
    (click(action=pb.Action(item_key="a", kind="click")), "action.item_key"),
    (click(action=pb.Action(item_id=2)), "action.kind"),
    (click(action=pb.Action(item_id=2, kind="zap")), "action.kind"),
    (click(action=pb.Action(item_id=2, kind="click", watch_seconds=-0.5)), "action.watch_seconds"),
    (click(action=pb.Action(item_id=2, kind="click", watch_seconds=math.nan)), "action.watch_seconds"),
    (click(action=pb.Action(item_id=2, kind="click", watch_seconds=math.inf)), "action.watch_seconds"),
    (pb.Event(user_id=1, exposure=pb.Exposure()), "exposure.item_ids"),
    (pb.Event(user_id=1, exposure=pb.Exposure(item_ids=range(MAX_ITEMS + 1))), "exposure.item_ids"),
    (pb.Event(user_id=1, exposure=pb.Exposure(item_ids=[1, 2, 3, -4])), "exposure.item_ids[3]"),
    (pb.Event(user_id=1, exposure=pb.Exposure(item_ids=[1], item_keys=["a"])), "exposure.item_keys"),
    (pb.Event(user_id=1, follow=pb.Follow()), "follow.author"),
    (pb.Event(user_id=1, follow=pb.Follow(author_key="a")), "follow.author_key"),
    (pb.Event(user_id=1, follow=pb.Follow(author_id=-1)), "follow.author_id"),
    (pb.Event(user_id=1, dislike=pb.Dislike()), "dislike.what"),
    (pb.Event(user_id=1, dislike=pb.Dislike(topic="")), "dislike.topic"),
    (pb.Event(user_id=1, dislike=pb.Dislike(topic="é" * 129)), "dislike.topic"),
    (pb.Event(user_id=1, dislike=pb.Dislike(item_key="a")), "dislike.item_key"),
    (pb.Event(user_id=1, dislike=pb.Dislike(author_key="a")), "dislike.author_key"),
    (pb.Event(user_id=1, leftovers=pb.Leftovers(item_ids=range(MAX_ITEMS + 1))), "leftovers.item_ids"),
    (pb.Event(user_id=1, leftovers=pb.Leftovers(item_ids=[1, 2], scores=[1.0])), "leftovers.scores"),
    (pb.Event(user_id=1, leftovers=pb.Leftovers(item_ids=[1], scores=[math.inf])), "leftovers.scores[0]"),
]


@pytest.mark.parametrize(("event", "field"), BAD, ids=[f"{n}-{field}" for n, (_, field) in enumerate(BAD)])
def test_what_breaks_a_rule_is_refused_by_the_fields_name(event, field):
    ((index, named, reason),) = refusals(event)
    assert (index, named) == (0, field)
    assert reason.startswith("expected ")
    assert len(reason) < 400


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (pb.Event(user_id=1, action=pb.Action(item_key="a", kind="click")), "user_id"),
        (pb.Event(user_key="", action=pb.Action(item_key="a", kind="click")), "user_key"),
        (pb.Event(user_key="a\0", action=pb.Action(item_key="a", kind="click")), "user_key"),
        (pb.Event(user_key="u", action=pb.Action(item_key="é" * 129, kind="click")), "action.item_key"),
        (pb.Event(user_key="u", exposure=pb.Exposure(item_keys=["a", ""])), "exposure.item_keys[1]"),
        (pb.Event(user_key="u", exposure=pb.Exposure(item_ids=[1])), "exposure.item_ids"),
        (pb.Event(user_key="u", follow=pb.Follow(author_id=1)), "follow.author_id"),
    ],
)
def test_a_string_catalogue_takes_keys_alone(event, field):
    ((_, named, _reason),) = refusals(event, "string")
    assert named == field


def test_the_good_ones_go_in_around_the_bad_ones():
    events = [
        click(),
        click(user_id=-1),
        pb.Event(user_id=1),
        pb.Event(user_id=7, follow=pb.Follow(author_id=3)),
    ]
    writes, refused, counts = EventReader(KINDS, "int64").read(events, NOW)
    assert len(writes) == 2
    assert [(index, field) for index, field, _ in refused] == [(1, "user_id"), (2, "what")]
    assert counts == {"action": 1, "follow": 1}


def test_what_is_written_says_what_was_reported():
    events = [
        click(action=pb.Action(item_id=2, kind="like"), timestamp=NOW - 5, city="Ulm"),
        click(action=pb.Action(item_id=3, kind="view", watch_seconds=2.5)),
    ]
    writes, _, _ = EventReader(KINDS, "int64").read(events, NOW + 0.9)
    ((user, _, operations, cities),) = writes.parts()
    assert user == b"u1"
    records = [np.frombuffer(operations[at + 13 : at + 37], RECORD)[0] for at in (0, 37)]
    assert [int(r["key"]) for r in records] == [2, 3]
    assert [int(r["kind"]) for r in records] == [kind_of("like"), kind_of("view")]
    assert [int(r["time"]) for r in records] == [NOW - 5, NOW]
    assert math.isnan(records[0]["value"])
    assert records[1]["value"] == 2.5
    (city,) = np.frombuffer(cities, RECORD).tolist()
    assert city == (key_of("Ulm"), ITEM, 1.0, NOW - 5)


# --- items -------------------------------------------------------------------------------------------------


def changes(*given: pb.ItemChange, kind="int64"):
    return ItemReader(kind).read(given, NOW + 0.25)


def put(**fields) -> pb.ItemChange:
    return pb.ItemChange(item_id=1, put=pb.Item(**fields))


def test_absent_times_are_the_servers_clock():
    good, refused = changes(
        put(), put(published_at=5), pb.ItemChange(item_id=2, take_down=True, updated_at_ms=7)
    )
    assert not refused
    assert [(change.id, change.updated_at_ms) for change in good] == [
        (1, NOW * 1000 + 250),
        (1, NOW * 1000 + 250),
        (2, 7),
    ]
    assert [change.item and change.item.published_at for change in good] == [NOW, 5, None]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (pb.ItemChange(put=pb.Item()), "id"),
        (pb.ItemChange(item_id=1), "change"),
        (pb.ItemChange(item_id=-1, put=pb.Item()), "item_id"),
        (pb.ItemChange(item_key="a", put=pb.Item()), "item_key"),
        (pb.ItemChange(item_id=1, take_down=False), "take_down"),
        (pb.ItemChange(item_id=1, take_down=True, updated_at_ms=-1), "updated_at_ms"),
        (
            pb.ItemChange(item_id=1, take_down=True, updated_at_ms=(NOW + 2 * MAX_AHEAD_SECONDS) * 1000),
            "updated_at_ms",
        ),
        (put(author_key="a"), "put.author_key"),
        (put(author_id=-1), "put.author_id"),
        (put(published_at=-1), "put.published_at"),
        (put(published_at=NOW * 1000), "put.published_at"),
        (put(title="x" * 4097), "put.title"),
        (put(tags=["x"] * 65), "put.tags"),
        (put(tags=["x", ""]), "put.tags[1]"),
        (put(tags=["x" * 257]), "put.tags[0]"),
        (put(city="x" * 257), "put.city"),
        (put(latitude=1), "put.longitude"),
        (put(longitude=1), "put.latitude"),
        (put(latitude=90.5, longitude=0), "put.latitude"),
        (put(latitude=math.nan, longitude=0), "put.latitude"),
        (put(latitude=0, longitude=-181), "put.longitude"),
        (put(quality=1.5), "put.quality"),
        (put(quality=math.nan), "put.quality"),
        (put(duration_seconds=-1), "put.duration_seconds"),
        (put(duration_seconds=math.inf), "put.duration_seconds"),
    ],
)
def test_an_item_that_breaks_a_rule_is_refused_by_the_fields_name(change, field):
    good, refused = changes(change, put())
    assert len(good) == 1
    ((index, named, reason),) = refused
    assert (index, named) == (0, field)
    assert reason.startswith("expected ")


def test_an_item_at_every_limit_is_taken():
    item = pb.Item(
        author_key="a",
        published_at=4_102_444_800,
        title="x" * 4096,
        tags=["x" * 256] * 64,
        city="x" * 256,
        latitude=-90,
        longitude=180,
        quality=1,
        duration_seconds=0,
    )
    good, refused = changes(pb.ItemChange(item_key="k", put=item), kind="string")
    assert not refused
    assert good[0].item == item
