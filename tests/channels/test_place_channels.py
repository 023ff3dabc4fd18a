"""Geo nearby and same city."""

from dataclasses import replace

import numpy as np
import pygeohash
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.geo import Geo, around, cell_number, cells, geohash_of
from channels.same_city import SameCity
from engine.core.items import ItemColumns
from engine.core.query import QueryBatch
from engine.core.types import RaggedRows
from engine.testing import (
    ChannelContract,
    built_channel,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)

DAY = 86_400
NOW = 100 * DAY


def at(batch, latitude, longitude):
    return replace(batch, latitude=np.array(latitude, np.float64), longitude=np.array(longitude, np.float64))


def in_cities(batch, lists):
    cities = RaggedRows.of([np.array(part, np.int32) for part in lists])
    return replace(batch, live=replace(batch.live, cities=cities))


class TestGeoContract(ChannelContract):
    def channel(self):
        columns = random_columns(self.items)
        rng = np.random.default_rng(2)
        columns.set("latitude", rng.uniform(40.0, 40.2, self.items))
        columns.set("longitude", rng.uniform(-74.0, -73.8, self.items))
        return built_channel(Geo, tiny_interactions(self.users, self.items), columns=columns, thin=2)

    def batch(self):
        rng = np.random.default_rng(3)
        latitude = np.where(rng.random(self.size) < 0.8, rng.uniform(40.0, 40.2, self.size), np.nan)
        return at(
            random_batch(self.items, self.users, self.size), latitude, rng.uniform(-74.0, -73.8, self.size)
        )


class TestSameCityContract(ChannelContract):
    def channel(self):
        columns = random_columns(self.items)
        columns.set("cities", np.random.default_rng(2).integers(-1, 4, self.items))
        return built_channel(SameCity, tiny_interactions(self.users, self.items), columns=columns)

    def batch(self):
        rng = np.random.default_rng(3)
        lists = [rng.choice(6, rng.integers(0, 4), replace=False) for _ in range(self.size)]
        return in_cities(random_batch(self.items, self.users, self.size), lists)


def one(now=NOW):
    return QueryBatch.plain(np.zeros(1, np.int32), random_batch(1, 1, 0).history, now=now)


def answer(channel, batch, k=50):
    return channel.recall_batch(batch, np.array([k], np.int32)).query(0)


@given(latitude=st.floats(-90, 90), longitude=st.floats(-180, 180), precision=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_cell_is_its_geohash_as_a_number_of_five_bits_a_letter(latitude, longitude, precision):
    name = pygeohash.encode(latitude, longitude, precision)
    number = cell_number(name)
    assert geohash_of(number, precision) == name
    assert cells(np.array([latitude]), np.array([longitude]), precision).tolist() == [number]
    assert 0 <= number < 2**31


@given(latitude=st.floats(-90, 90), longitude=st.floats(-180, 180), precision=st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_around_a_cell_are_the_cells_that_its_geohash_has_for_neighbours(latitude, longitude, precision):
    here = pygeohash.encode(latitude, longitude, precision)
    expected = [here]
    for column in ("", "top", "bottom"):
        try:
            middle = pygeohash.get_adjacent(here, column) if column else here
        except ValueError:  # beyond the pole
            continue
        expected += [middle, *(pygeohash.get_adjacent(middle, side) for side in ("left", "right"))]
    wanted = around(np.array([-1, cell_number(here)]), precision, 0.5)
    numbers = [cell_number(name) for name in dict.fromkeys(expected)]
    assert wanted.offsets.tolist() == [0, 0, len(numbers)]
    assert wanted.keys.tolist() == wanted.triggers.tolist() == numbers
    assert wanted.weights.tolist() == [1.0, *[0.5] * (len(numbers) - 1)]


@given(places=st.lists(st.tuples(st.integers(-1024, 1024), st.integers(-1024, 1024)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_place_on_the_border_of_cells_is_in_the_one_that_pygeohash_says(places):
    latitude, longitude = (
        np.array([place[at] * most / 1024 for place in places]) for at, most in ((0, 90), (1, 180))
    )
    names = [pygeohash.encode(*place, 5) for place in zip(latitude.tolist(), longitude.tolist(), strict=True)]
    assert cells(latitude, longitude, 5).tolist() == [cell_number(name) for name in names]


def test_known_cells_and_places_that_are_none():
    # 57.64911, 10.40744 is u4pruydqqvj in every description of GeoHash; u is 26, 4 is 4, p is 21.
    assert geohash_of(26 << 10 | 4 << 5 | 21, 3) == "u4p"
    latitude, longitude = np.array([57.64911, np.nan, 91.0, 0.0]), np.array([10.40744, 0.0, 0.0, 181.0])
    assert cells(latitude, longitude, 3).tolist() == [26 << 10 | 4 << 5 | 21, -1, -1, -1]


def placed(places, days):
    columns = ItemColumns(len(places))
    columns.set("latitude", np.array([latitude for latitude, _ in places]))
    columns.set("longitude", np.array([longitude for _, longitude in places]))
    columns.set("published_at", np.array(days) * DAY)
    return columns


def near(latitude, longitude):
    return at(one(), [latitude], [longitude])


def test_the_cell_newest_first_and_the_neighbours_only_where_it_is_thin():
    # Cells of 5 letters are 0.044 degrees on a side; items 0 and 1 share one, 2 is in the next, 3 far away.
    columns = placed([(40.01, -74.00), (40.012, -74.001), (40.01, -74.04), (41.0, -74.0)], [90, 95, 99, 99])
    liked = interactions_of([[0]], 4)
    thin = built_channel(Geo, liked, columns=columns, thin=3, neighbour_weight=0.5, half_life_days=5)
    got = answer(thin, near(40.011, -74.0))
    # log2(1) - 5 / 5, log2(0.5) - 1 / 5, log2(1) - 10 / 5
    assert got.rows.tolist() == [1, 2, 0]
    assert got.scores.tolist() == pytest.approx([-1.0, -1.2, -2.0])
    names = [geohash_of(trigger, 5) for trigger in got.triggers.tolist()]
    assert names == [
        pygeohash.encode(*place, 5) for place in [(40.012, -74.001), (40.01, -74.04), (40.01, -74.0)]
    ]
    full = built_channel(Geo, liked, columns=columns, thin=2)
    assert answer(full, near(40.011, -74.0)).rows.tolist() == [1, 0]
    assert answer(full, one()).rows.tolist() == []


@pytest.mark.parametrize(
    ("latitude", "longitude"), [(89.99, 10.0), (-89.99, 10.0), (0.0, 179.99), (0.0, -180.0)]
)
def test_poles_and_the_date_line_are_places_like_others(latitude, longitude):
    across = -longitude if abs(longitude) > 170 else longitude
    columns = placed([(latitude, longitude), (latitude, across)], [90, 91])
    channel = built_channel(Geo, interactions_of([[0]], 2), columns=columns)
    assert sorted(answer(channel, near(latitude, longitude)).rows.tolist()) == [0, 1]


def test_a_published_post_is_near_at_once_and_one_that_moves_is_elsewhere():
    columns = placed([(40.01, -74.0)], [90])
    channel = built_channel(Geo, interactions_of([[0]], 1), columns=columns)
    columns.grow(2)
    columns.latitude[1], columns.longitude[1], columns.published_at[1] = 40.01, -74.0, 95 * DAY
    channel.update(np.array([1], np.int32))
    assert answer(channel, near(40.01, -74.0)).rows.tolist() == [1, 0]
    columns.latitude[0] = 10.0
    channel.update(np.array([0], np.int32))
    assert answer(channel, near(40.01, -74.0)).rows.tolist() == [1]
    assert answer(channel, near(10.0, -74.0)).rows.tolist() == [0]


def test_quality_is_a_gate():
    columns = placed([(40.01, -74.0)] * 3, [90, 91, 92])
    columns.set("quality", np.array([0.9, 0.2, np.nan]))
    channel = built_channel(Geo, interactions_of([[0]], 3), columns=columns, min_quality=0.5)
    assert answer(channel, near(40.01, -74.0)).rows.tolist() == [0]


def test_the_current_city_counts_more_than_past_ones():
    columns = ItemColumns(4)
    columns.set("cities", np.array([0, 1, 1, 2]))
    columns.set("published_at", np.array([90, 95, 80, 99]) * DAY)
    channel = built_channel(SameCity, interactions_of([[0]], 4), columns=columns, half_life_days=10)
    got = answer(channel, in_cities(one(), [[1, 0]]))
    # 0 - 5 / 10, -1 - 10 / 10, 0 - 20 / 10
    assert got.rows.tolist() == [1, 0, 2]
    assert got.scores.tolist() == [-0.5, -2.0, -2.0]
    assert got.triggers.tolist() == [-1, -1, -1]
    alone = built_channel(SameCity, interactions_of([[0]], 4), columns=columns, past_weight=0)
    assert answer(alone, in_cities(one(), [[1, 0]])).rows.tolist() == [1, 2]


def test_a_city_that_the_build_did_not_know_is_known_once_something_is_published_there():
    columns = ItemColumns(1)
    columns.set("cities", np.array([0]))
    channel = built_channel(SameCity, interactions_of([[0]], 1), columns=columns)
    assert answer(channel, in_cities(one(), [[9]])).rows.tolist() == []
    columns.grow(2)
    columns.cities[1], columns.published_at[1] = 9, DAY
    channel.update(np.array([1], np.int32))
    assert answer(channel, in_cities(one(), [[9]])).rows.tolist() == [1]


@pytest.mark.parametrize("kind", [Geo, SameCity])
def test_a_catalogue_without_places_gives_an_empty_channel(kind):
    channel = built_channel(kind, interactions_of([[0]], 2))
    assert answer(channel, in_cities(near(1.0, 1.0), [[0]])).rows.tolist() == []
    channel.update(np.array([0, 1], np.int32))
