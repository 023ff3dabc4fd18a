"""A made-up catalogue and user state around synthetic likes: authors, cities, places, follows, leftovers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from engine.core.live import Leftovers, LiveState
from engine.core.ragged import put_first
from engine.core.types import AnyArray, Float64Array, Int32Array, Int64Array, RaggedRows
from engine.data.catalogue import AUTHOR, Catalogue
from engine.data.columns import CodedColumn, TextColumn
from engine.data.ids import IdIndex
from engine.state.history import ReadUsers, SnapshotHistory, UserRead

ITEMS_PER_AUTHOR = 20
CITIES = 300
CITY_DEGREES = 0.1
YEARS = 2
FOLLOWS = 50
PAST_CITIES = 3
LEFTOVERS = 50
PROFILES = 4096
"""Distinct user states; user u has number u modulo this."""


def made_up_catalogue(users: int, items: int, now: int, seed: int = 2) -> Catalogue:
    """Return a catalogue whose items have an author of 20 on average, a city of 300, a place near its centre, a time of
    publication within the last two years and a quality; all drawn evenly."""
    rng = np.random.default_rng(seed)
    authors = max(1, items // ITEMS_PER_AUTHOR)
    cities = rng.integers(0, CITIES, items).astype(np.int32)
    latitude, longitude = city_centres()
    numeric: dict[str, AnyArray] = {
        AUTHOR: rng.integers(0, authors, items).astype(np.int32),
        "published_at": now - rng.integers(0, YEARS * 365 * 86_400, items),
        "quality": rng.random(items).astype(np.float32),
        "latitude": latitude[cities] + rng.normal(0, CITY_DEGREES, items),
        "longitude": longitude[cities] + rng.normal(0, CITY_DEGREES, items),
    }
    names = TextColumn.of(pa.array([city_name(city) for city in range(CITIES)], pa.large_string()))
    return Catalogue(
        items=IdIndex.of(np.arange(items, dtype=np.int64)),
        users=IdIndex.of(np.arange(users, dtype=np.int64)),
        authors=IdIndex.of(np.arange(authors, dtype=np.int64)),
        author_names=TextColumn.of(pa.array([""] * authors, pa.large_string())),
        numeric=numeric,
        coded={"city": CodedColumn(cities, names)},
        texts={},
        tags={},
        skipped=(),
    )


def city_name(city: int) -> str:
    """Return what a made-up city is called."""
    return f"city {city}"


def city_centres() -> tuple[Float64Array, Float64Array]:
    """float64[CITIES] twice: latitude and longitude."""
    rng = np.random.default_rng(11)
    return rng.uniform(-60, 60, CITIES), rng.uniform(-180, 180, CITIES)


@dataclass(frozen=True)
class MadeUpState:
    """A `UserState`: everybody follows 50 authors, was in 3 cities and has 50 leftovers of an hour ago."""

    histories: SnapshotHistory
    follows: Int32Array
    cities: Int32Array
    leftovers: Int32Array

    @classmethod
    def of(cls, histories: SnapshotHistory, catalogue: Catalogue, seed: int = 3) -> MadeUpState:
        """Draw the states of all profiles."""
        rng = np.random.default_rng(seed)

        def rows(size: int, of: int) -> Int32Array:
            # Distinct within a profile: one row of each of as many equal parts.
            part = max(of // size, 1)
            drawn = rng.integers(0, part, (PROFILES, size)) + part * np.arange(size)
            bounded: Int32Array = np.minimum(drawn, of - 1).astype(np.int32)
            return bounded

        return cls(
            histories,
            rows(FOLLOWS, len(catalogue.authors)),
            rows(PAST_CITIES, CITIES),
            rows(LEFTOVERS, len(catalogue.items)),
        )

    def ask(self, user_ids: AnyArray) -> ReadUsers:
        """Return `read`: nobody need be asked."""
        del user_ids
        return self.read

    def read(self, users: Int32Array, now: Int64Array, cities: Int32Array) -> UserRead:
        """Return what is known of each user."""
        profiles = users % PROFILES
        n, leftovers = users.size, self.leftovers[profiles]
        live = replace(
            LiveState.empty(n),
            follows=_ragged(self.follows[profiles]),
            cities=put_first(_ragged(self.cities[profiles]), cities),
            leftovers=Leftovers(
                leftovers.ravel(),
                np.linspace(1, 0, leftovers.size, dtype=np.float32),
                np.repeat(now - 3600, LEFTOVERS),
                np.zeros(leftovers.size, np.int32),
                np.arange(n + 1) * LEFTOVERS,
            ),
        )
        return UserRead(self.histories.read(users, now, cities).history, live)


def _ragged(table: Int32Array) -> RaggedRows:
    return RaggedRows(table.ravel(), np.arange(table.shape[0] + 1, dtype=np.int64) * table.shape[1])
