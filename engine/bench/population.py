"""Users for a world that is served: what some of them did lies in a real state store, and the requests they make."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from recall.v1 import recall_pb2 as pb

from engine.core.channel import Progress
from engine.core.items import ItemColumns
from engine.core.keys import key_of
from engine.core.types import AnyArray, Int64Array
from engine.data.live import LiveCatalogue
from engine.online.state import State
from engine.state.layout import kind_of, user_tag
from engine.state.writes import Writes

ACTIVE_SHARE = 0.01
"""Of the users; they have live state."""

ASKING_SHARE = 0.8
"""Of the requests that come from them; the rest come from anybody."""

RECENT, FOLLOWED, CITIES, LEFT_OVER = 20, 50, 3, 50
SHOWN = (200, 200)
"""Exposures in each time slice, the newest last."""

_COMMIT = 50
_DRAWS = 65_536


@dataclass(frozen=True)
class Active:
    """The users with live state.

    Attributes (rows are of the catalogue; user u owns row u of each):
        users: [n], ids.
        recent: int32[n, 20], items clicked, newest first.
        follows: int32[n, 50], authors; no columns where the catalogue has none.
        leftovers: int32[n, 50], items, best first.
        shown: int32[n, 400], items.
        cities: int32[n, 3], codes; no columns where the catalogue has none.
    """

    users: AnyArray
    recent: AnyArray
    follows: AnyArray
    leftovers: AnyArray
    shown: AnyArray
    cities: AnyArray


def draw_active(catalogue: LiveCatalogue, share: float = ACTIVE_SHARE, seed: int = 4) -> Active:
    """Draw who has live state, and what it is; items and authors are drawn evenly.

    Args:
        catalogue: of the world.
        share: of its users.
        seed: the same seed draws the same.
    """
    rng = np.random.default_rng(seed)
    items, authors, cities = (
        len(catalogue.items),
        len(catalogue.authors),
        len(catalogue.columns.city_codes),
    )
    n = max(1, round(len(catalogue.users) * share))
    rows = np.sort(rng.choice(len(catalogue.users), n, replace=False)).astype(np.int32)
    return Active(
        users=catalogue.users.ids(rows),
        recent=rng.integers(0, items, (n, RECENT)).astype(np.int32),
        follows=rng.integers(0, max(authors, 1), (n, FOLLOWED if authors else 0)).astype(np.int32),
        leftovers=rng.integers(0, items, (n, LEFT_OVER)).astype(np.int32),
        shown=rng.integers(0, items, (n, sum(SHOWN))).astype(np.int32),
        cities=rng.integers(0, max(cities, 1), (n, CITIES if cities else 0)).astype(np.int32),
    )


def fill(
    state: State, catalogue: LiveCatalogue, active: Active, now: int, slice_seconds: float, progress: Progress
) -> None:
    """Write the live state of these users into a store, as the ingest service does.

    Args:
        state: the store.
        catalogue: of the world.
        active: who, and what.
        now: of the world, seconds since the epoch: actions are minutes, leftovers an hour before it.
        slice_seconds: of a slice of exposures; these go by the clock.
        progress: told of each user.
    """
    columns = catalogue.columns
    cities = [key_of(city) for city in columns.city_codes]
    kind, scores = kind_of("click"), np.linspace(1, 0, LEFT_OVER, dtype=np.float32)
    progress.start("users with live state", active.users.size)
    for first in range(0, active.users.size, _COMMIT):
        part = range(first, min(first + _COMMIT, active.users.size))
        for age, (begin, end) in zip((1, 0), _bounds(SHOWN), strict=True):
            shown = Writes()
            for u in part:
                shown.expose(user_tag(active.users[u].item()), columns.keys[active.shown[u, begin:end]])
            state.users.commit(shown, time.time() - age * slice_seconds)
        rest = Writes()
        for u in part:
            tag = user_tag(active.users[u].item())
            for at, key in reversed(list(enumerate(columns.keys[active.recent[u]].tolist()))):
                rest.act(tag, key, kind, now - 60 * at, 1.0)
            for author in catalogue.authors.keys(active.follows[u]).tolist():
                rest.follow(tag, author, now, False)
            for city in active.cities[u].tolist():
                rest.city(tag, cities[city], now)
            rest.leftovers(tag, columns.keys[active.leftovers[u]], scores, now - 3600)
        state.users.commit(rest, time.time())
        progress.advance(len(part))


def messages(
    catalogue: LiveCatalogue, active: Active, limit: int, now: int, count: int, seed: int
) -> list[bytes]:
    """Return serialized RecallRequests of random users, each from where a random item is.

    Args:
        catalogue: of the world.
        active: who has live state; they make 80 % of the requests.
        limit: candidates asked for.
        now: the time that the requests say it is.
        count: how many.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    everybody = rng.integers(0, len(catalogue.users), count).astype(np.int32)
    anybody = catalogue.users.ids(everybody).tolist()
    known = active.users[rng.integers(0, active.users.size, count)].tolist()
    is_active = rng.random(count) < ASKING_SHARE
    field = "user_id" if catalogue.users.kind == "int64" else "user_key"
    places = _Places(catalogue.columns, rng)
    made = []
    for n in range(count):
        user = known[n] if is_active[n] else anybody[n]
        request = pb.RecallRequest(**{field: user}, limit=limit)
        request.context.time = now
        places.put(request.context, n)
        made.append(request.SerializeToString())
    return made


class _Places:
    """Where requests come from: the place and the city of an item drawn evenly."""

    def __init__(self, columns: ItemColumns, rng: np.random.Generator) -> None:
        items: Int64Array = rng.integers(0, len(columns), _DRAWS)
        self._latitude = columns.latitude[items].tolist()
        self._longitude = columns.longitude[items].tolist()
        names = {code: name for name, code in columns.city_codes.items()}
        self._cities = [names.get(code, "") for code in columns.cities[items].tolist()]

    def put(self, context: Any, n: int) -> None:
        n %= _DRAWS
        latitude, longitude = self._latitude[n], self._longitude[n]
        if latitude == latitude and longitude == longitude:
            context.location.latitude, context.location.longitude = latitude, longitude
        context.city = self._cities[n]


def _bounds(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends], ends, strict=False))
