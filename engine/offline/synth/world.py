"""The planted world: who wants what, what there is, who made it and where. docs/synth.md has the laws in formulas.

Items are numbered by *place* here: those of an interest lie side by side, and in it those of a group. Ids are dealt out
at random, so that an id says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.types import NO_ROW, AnyArray, Float32Array, Float64Array, Int32Array, Int64Array
from engine.offline.synth.draws import cumulated, draw, mixed, pick, pick_many
from engine.offline.synth.plan import DAY, OLD_DAYS, Plan

INTEREST_EXPONENT = 0.5
"""Interest k has a share of the items proportional to (k + 1)^-this."""
POPULARITY_EXPONENT = 0.8
"""The item of popularity rank r is wanted in proportion to (r + 1)^-this."""
SHOWN_EXPONENT = 0.65
"""What comes of it: items are shown to the power -this of their rank. It is flatter, because circles look for anything, a
user's interests and followed authors count alike, and nothing is shown twice running."""
GROUP_ITEMS = 8
"""Items of a group of substitutes."""
SECOND_SHARE = 0.3
"""Share of the items with a second interest."""
SECOND_WEIGHT = 0.3
"""How much an item is wanted in its second interest, of what it is in its main one."""
OLD_SHARE = 0.5
"""Share of the items that are older than the first event."""

AUTHOR_EXPONENT = 1.0
"""The author of rank a in an interest makes items in proportion to (a + 1)^-this."""
AUTHOR_SECOND_SHARE = 0.5
AUTHOR_SECOND_WEIGHT = 0.5

CITY_EXPONENT = 1.0
"""The city of rank c has inhabitants and items in proportion to (c + 1)^-this."""
CITY_DEGREES = 0.05
"""Standard deviation of an item's place around the centre of its city."""
PLACE_SHARE = 0.4
"""Share of the items that have a place."""
HOME_SHARE = 0.7
"""Share of these that are where their author lives; the others are anywhere."""

MOST_INTERESTS = 5
"""A user has 2 to this many interests, or as many as there are."""
FAVOURITE_GROUPS = 3
"""Groups that a user likes best, of each interest; drawn by what is wanted in them, so one may come twice."""
ACTIVITY_SIGMA = 0.8
"""The activity of users is log-normal with this standard deviation of its logarithm."""
CIRCLE_USERS = 4
CIRCLE_SHARE = 0.04
"""Share of the users that belong to a circle of friends."""

MOST_FOLLOWS = 200
"""A user follows floor(e^x) authors, x normal, at most this many."""
FOLLOWS_MEAN, FOLLOWS_SIGMA = 1.8, 0.9
FOLLOWS_OWN = 0.8
"""Share of the follows that go to authors of the user's interests; the others go to any."""


@dataclass(frozen=True, slots=True)
class Lists:
    """Lists of places end to end; list q owns places[starts[q]:starts[q + 1]] and their weights."""

    starts: Int64Array
    places: Int32Array
    weights: Float32Array

    @classmethod
    def of(cls, owners: AnyArray, count: int, places: AnyArray, weights: AnyArray) -> Lists:
        """Sort entries into the lists of their owners; those without an owner (-1) are left out."""
        order = np.argsort(owners, kind="stable")
        order = order[np.count_nonzero(owners < 0) :]
        starts = np.searchsorted(owners[order], np.arange(count + 1)).astype(np.int64)
        return cls(starts, places[order].astype(np.int32), weights[order].astype(np.float32))

    def pick(self, owners: AnyArray, share: Float64Array) -> Int64Array:
        """int64[n]: an entry's place from each owner's list, from all lists where that one is empty."""
        begin, end = self.starts[owners], self.starts[owners + 1]
        empty = begin == end
        end = np.where(empty, self.places.size, end)
        found = pick_many(cumulated(self.weights), np.where(empty, 0, begin), end, share)
        places: Int64Array = self.places[found].astype(np.int64)
        return places


@dataclass(frozen=True, slots=True)
class Items:
    """Items by place; n of them.

    Attributes:
        ids: int32[n]; the id of each place, a permutation.
        interests, seconds: int32[n]; the main interest, and the second or -1.
        groups: int32[n]; rising with the place.
        group_starts: int32[groups + 1].
        interest_starts: int64[interests + 1]; the places of an interest.
        ranks: int32[n]; popularity rank from 0.
        cumulative: float64[n + 1] of the weights, by place.
        wanted: per interest the items of it, with their weights there.
        published: int64[n], seconds since the epoch.
        quality: float32[n] in [0, 1].
        durations: float32[n], seconds.
        authors: int32[n].
        cities: int32[n]; -1 where an item has no place.
        latitudes, longitudes: float64[n], degrees; NaN where it has none.
    """

    ids: Int32Array
    interests: Int32Array
    seconds: Int32Array
    groups: Int32Array
    group_starts: Int32Array
    interest_starts: Int64Array
    ranks: Int32Array
    cumulative: Float64Array
    wanted: Lists
    published: Int64Array
    quality: Float32Array
    durations: Float32Array
    authors: Int32Array
    cities: Int32Array
    latitudes: Float64Array
    longitudes: Float64Array


@dataclass(frozen=True, slots=True)
class Users:
    """Users; n of them.

    Attributes:
        interests: int32[n, MOST_INTERESTS]; -1 past the last.
        tastes: float64[n, MOST_INTERESTS]; the sum of the weights up to each interest; 1 at the last and past it.
        favourites: int32[n, MOST_INTERESTS, FAVOURITE_GROUPS]; groups, -1 past the last interest.
        activity: float64[n]; visits are in proportion to it.
        cities: int32[n]; where they live.
        circles: int32[n]; -1 for most.
        members: int32[circles, CIRCLE_USERS].
        follow_starts: int64[n + 1], and follows: int32[m], authors, and follow_times: int64[m].
    """

    interests: Int32Array
    tastes: Float64Array
    favourites: Int32Array
    activity: Float64Array
    cities: Int32Array
    circles: Int32Array
    members: Int32Array
    follow_starts: Int64Array
    follows: Int32Array
    follow_times: Int64Array


@dataclass(frozen=True, slots=True)
class Authors:
    """Authors: int32[n] main interest, second or -1, city; and their lists by interest."""

    interests: Int32Array
    seconds: Int32Array
    cities: Int32Array
    of_interest: Lists


@dataclass(frozen=True, slots=True)
class World:
    """All that is planted but the events."""

    plan: Plan
    items: Items
    users: Users
    authors: Authors
    city_weights: Float64Array
    latitudes: Float64Array
    longitudes: Float64Array


def plant(plan: Plan) -> World:
    """Draw a world. Memory: about 200 bytes an item and 150 a user while it is drawn."""
    rng = np.random.default_rng([plan.seed, 1])
    city_weights = cumulated((np.arange(plan.cities) + 1.0) ** -CITY_EXPONENT)
    latitudes, longitudes = rng.uniform(-55, 65, plan.cities), rng.uniform(-180, 180, plan.cities)
    sizes = _interest_sizes(plan)
    authors = _authors(plan, sizes, city_weights, np.random.default_rng([plan.seed, 2]))
    items = _items(
        plan, sizes, authors, city_weights, latitudes, longitudes, np.random.default_rng([plan.seed, 3])
    )
    users = _users(plan, items, authors, city_weights, np.random.default_rng([plan.seed, 4]))
    return World(plan, items, users, authors, city_weights, latitudes, longitudes)


def _interest_sizes(plan: Plan) -> Int64Array:
    """int64[interests]: how many items each has; none is empty."""
    share = cumulated((np.arange(plan.interests) + 1.0) ** -INTEREST_EXPONENT)
    bounds = np.floor(share / share[-1] * (plan.items - plan.interests)).astype(np.int64)
    bounds[-1] = plan.items - plan.interests
    sizes: Int64Array = np.diff(bounds) + 1
    return sizes


def _other(rng: np.random.Generator, interests: AnyArray, count: int, share: float) -> Int32Array:
    """int32[n]: for a share of the entries an interest other than theirs, drawn evenly; -1 for the rest."""
    step = rng.integers(1, max(count, 2), interests.size)
    has = (rng.random(interests.size) < share) & (count > 1)
    other: Int32Array = np.where(has, (interests + step) % count, NO_ROW).astype(np.int32)
    return other


def _anywhere(rng: np.random.Generator, city_weights: Float64Array, size: int) -> Int32Array:
    """int32[size]: cities in proportion to their inhabitants."""
    return pick_many(city_weights, 0, city_weights.size - 1, rng.random(size)).astype(np.int32)


def _authors(plan: Plan, sizes: Int64Array, city_weights: Float64Array, rng: np.random.Generator) -> Authors:
    n, count = plan.authors, plan.interests
    homes = pick_many(cumulated(sizes), 0, count, rng.random(n)).astype(np.int32)
    seconds = _other(rng, homes, count, AUTHOR_SECOND_SHARE)
    # Ranks within an interest: ids are no order of size, since homes are drawn anew for each.
    order = np.argsort(homes, kind="stable")
    ranks = np.empty(n, np.int64)
    ranks[order] = np.arange(n) - np.searchsorted(homes[order], homes[order])
    weights = (ranks + 1.0) ** -AUTHOR_EXPONENT
    also = np.flatnonzero(seconds >= 0)
    lists = Lists.of(
        np.concatenate([homes, seconds[also]]),
        count,
        np.concatenate([np.arange(n), also]),
        np.concatenate([weights, AUTHOR_SECOND_WEIGHT * weights[also]]),
    )
    return Authors(homes, seconds, _anywhere(rng, city_weights, n), lists)


def _items(
    plan: Plan,
    sizes: Int64Array,
    authors: Authors,
    city_weights: Float64Array,
    latitudes: Float64Array,
    longitudes: Float64Array,
    rng: np.random.Generator,
) -> Items:
    n = plan.items
    starts = np.zeros(plan.interests + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    interests = np.repeat(np.arange(plan.interests, dtype=np.int32), sizes)
    seconds = _other(rng, interests, plan.interests, SECOND_SHARE)
    within = np.arange(n) - starts[interests]
    first_of_group = within % GROUP_ITEMS == 0
    groups = (np.cumsum(first_of_group) - 1).astype(np.int32)
    group_starts = np.append(np.flatnonzero(first_of_group), n).astype(np.int32)
    ranks = rng.permutation(n).astype(np.int32)
    weights = (ranks + 1.0) ** -POPULARITY_EXPONENT
    also = np.flatnonzero(seconds >= 0)
    wanted = Lists.of(
        np.concatenate([interests, seconds[also]]),
        plan.interests,
        np.concatenate([np.arange(n), also]),
        np.concatenate([weights, SECOND_WEIGHT * weights[also]]),
    )
    old = rng.random(n) < OLD_SHARE
    since: Float64Array = np.where(old, -OLD_DAYS * DAY * rng.random(n), plan.days * DAY * rng.random(n))
    # There is always something to show.
    since[np.argmin(since)] = -OLD_DAYS * DAY
    makers = authors.of_interest.pick(interests, rng.random(n)).astype(np.int32)
    cities = np.where(rng.random(n) < HOME_SHARE, authors.cities[makers], _anywhere(rng, city_weights, n))
    placed = rng.random(n) < PLACE_SHARE
    latitude = latitudes[cities] + rng.normal(0, CITY_DEGREES, n)
    longitude = (longitudes[cities] + rng.normal(0, CITY_DEGREES, n) + 180) % 360 - 180
    return Items(
        ids=rng.permutation(n).astype(np.int32),
        interests=interests,
        seconds=seconds,
        groups=groups,
        group_starts=group_starts,
        interest_starts=starts,
        ranks=ranks,
        cumulative=cumulated(weights),
        wanted=wanted,
        published=plan.start + np.floor(since).astype(np.int64),
        quality=rng.beta(4, 4, n).astype(np.float32),
        durations=np.clip(np.rint(rng.lognormal(3.0, 0.6, n)), 5, 80).astype(np.float32),
        authors=makers,
        cities=np.where(placed, cities, NO_ROW).astype(np.int32),
        latitudes=np.where(placed, latitude, np.nan),
        longitudes=np.where(placed, longitude, np.nan),
    )


def _users(
    plan: Plan, items: Items, authors: Authors, city_weights: Float64Array, rng: np.random.Generator
) -> Users:
    n = plan.users
    interests = np.full((n, MOST_INTERESTS), NO_ROW, np.int32)
    tastes = np.ones((n, MOST_INTERESTS))
    sums = np.add.reduceat(items.wanted.weights, items.wanted.starts[:-1], dtype=np.float64)
    _give_interests(np.uint64(plan.seed), cumulated(sums), interests, tastes)
    circles = np.full(n, NO_ROW, np.int32)
    count = int(n * CIRCLE_SHARE) // CIRCLE_USERS
    members = rng.permutation(n)[: count * CIRCLE_USERS].astype(np.int32).reshape(count, CIRCLE_USERS)
    circles[members] = np.arange(count, dtype=np.int32)[:, None]
    most = min(MOST_FOLLOWS, plan.authors)
    counts = np.minimum(np.floor(np.exp(rng.normal(FOLLOWS_MEAN, FOLLOWS_SIGMA, n))), most).astype(np.int64)
    follows = np.empty(int(counts.sum()), np.int32)
    lists = authors.of_interest
    kept = _give_follows(
        np.uint64(plan.seed),
        (interests, tastes, counts),
        (lists.starts, lists.places, cumulated(lists.weights)),
        plan.authors,
        FOLLOWS_OWN,
        follows,
    )
    starts = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    span = (plan.days + OLD_DAYS) * DAY
    times = plan.end - span + rng.integers(0, span, kept)
    return Users(
        interests=interests,
        tastes=tastes,
        favourites=_favourites(items, interests, rng),
        activity=rng.lognormal(0.0, ACTIVITY_SIGMA, n),
        cities=_anywhere(rng, city_weights, n),
        circles=circles,
        members=members,
        follow_starts=starts,
        follows=follows[:kept].copy(),
        follow_times=times,
    )


def _favourites(items: Items, interests: Int32Array, rng: np.random.Generator) -> Int32Array:
    """int32[users, MOST_INTERESTS, FAVOURITE_GROUPS]: groups of each interest of each user."""
    found = np.full((*interests.shape, FAVOURITE_GROUPS), NO_ROW, np.int32)
    for k in range(interests.shape[1]):
        has = interests[:, k] >= 0
        own = interests[has, k]
        begin, end = items.interest_starts[own], items.interest_starts[own + 1]
        for number in range(FAVOURITE_GROUPS):
            found[has, k, number] = items.groups[
                pick_many(items.cumulative, begin, end, rng.random(own.size))
            ]
    return found


@njit(nogil=True, cache=True)
def _give_interests(seed, cumulative, interests, tastes):  # type: ignore[no-untyped-def]
    """Give each user distinct interests in proportion to how much is wanted in them, and Dirichlet(1, …) weights."""
    users, most = interests.shape
    count = cumulative.size - 1
    state = np.empty(1, np.uint64)
    for user in range(users):
        state[0] = mixed(mixed(seed, np.uint64(101)), np.uint64(user))
        size = min(2 + int(draw(state) * (most - 1)), count)
        got = 0
        tries = 0
        while got < size:
            # Where one interest has nearly all of the weight, the rest are drawn evenly after a while.
            share = draw(state)
            interest = pick(cumulative, 0, count, share) if tries < 64 else int(share * count)
            tries += 1
            known = False
            for k in range(got):
                known |= interests[user, k] == interest
            if not known:
                interests[user, got] = interest
                got += 1
        # Exponential numbers over their sum are a Dirichlet draw with all parameters 1.
        total = 0.0
        for k in range(size):
            total -= np.log(1.0 - draw(state))
            tastes[user, k] = total
        for k in range(size):
            tastes[user, k] = tastes[user, k] / total if k < size - 1 and total > 0 else 1.0


@njit(nogil=True, cache=True)
def _give_follows(seed, users, lists, authors, own, follows):  # type: ignore[no-untyped-def]
    """Give each user at most counts[user] distinct authors; what could not be found is taken off the counts."""
    interests, tastes, counts = users
    starts, places, cumulative = lists
    state = np.empty(1, np.uint64)
    at = 0
    for user in range(counts.size):
        state[0] = mixed(mixed(seed, np.uint64(102)), np.uint64(user))
        begin = at
        for _ in range(2 * counts[user]):
            if at - begin == counts[user]:
                break
            first, last = 0, places.size
            if draw(state) < own:
                share = draw(state)
                k = 0
                while tastes[user, k] <= share:
                    k += 1
                if starts[interests[user, k]] < starts[interests[user, k] + 1]:
                    first, last = starts[interests[user, k]], starts[interests[user, k] + 1]
            author = places[pick(cumulative, first, last, draw(state))]
            known = False
            for p in range(begin, at):
                known |= follows[p] == author
            if not known:
                follows[at] = author
                at += 1
        counts[user] = at - begin
    return at
