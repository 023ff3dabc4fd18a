"""What the users of a planted world do, visit by visit in order of time, as a stream of rows in bounded memory.

A visit comes to a user, who is shown items one after another; each may be clicked, and what is clicked may be liked and
so on. Rows of one visit lie minutes apart, so they wait on a wheel of seconds until their time has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.types import NO_ROW, Float32Array, Float64Array, Int8Array, Int64Array
from engine.offline.synth.draws import cumulated, draw, mixed, pick, unit
from engine.offline.synth.plan import DAY, OLD_DAYS, Plan
from engine.offline.synth.world import FAVOURITE_GROUPS, Lists, World

KINDS = ("expose", "click", "like", "collect", "share", "finish", "dislike")
EXPOSE, CLICK, LIKE, COLLECT, SHARE, FINISH, DISLIKE = range(7)

ROUTES = ("group", "interest", "author", "city", "popular", "circle")
GROUP, INTEREST, AUTHOR, CITY, POPULAR, CIRCLE = range(6)
ROUTE_SHARES = (0.40, 0.25, 0.10, 0.10, 0.15)
"""How the item to show is found: in a favourite group of substitutes, in an interest at large, among what a followed
author made, where the user is, or anywhere by popularity. A shared visit of a circle has a route of its own."""
CLICK_RATES = (0.36, 0.28, 0.32, 0.18, 0.10, 0.50)
"""P(click | shown) by route for an item of quality 1/2; it goes with 1/2 + quality."""
RATES = (0.12, 0.04, 0.02)
"""P(like | click), P(collect | click), P(share | click)."""
DISLIKE_RATE = 0.004
"""P(dislike | shown, no click)."""
FINISH_RATES = (0.15, 0.40)
"""P(finish | click) is the first plus the second times the quality."""

ATTENTION_DAYS = 10.0
ATTENTION_FLOOR = 0.2
"""Attention falls by half every so many days of age, down to this share."""
SLICE_HOURS = 6
"""Attention is looked at anew every so often; what is published in between is shown from then on."""
AWAY_SHARE = 0.1
"""Share of a user's days that are spent in another city."""
SHARED_SHARE = 0.5
"""Share of the visits of a circle's members that the circle makes together."""
VISIT_MEAN, VISIT_MOST = 8, 20
"""Items shown in a visit: geometric, cut."""
RHYTHM_AMPLITUDE, RHYTHM_PEAK_HOUR = 0.8, 20.5
"""Visits come at a rate of 1 + amplitude cos(2 pi (hour - peak) / 24), UTC."""
REMEMBERED = 8
"""Items that are not shown to a user again: the last so many."""

WHEEL = 2048
"""Seconds that the wheel holds. The last row of a visit comes after less: VISIT_MOST pauses of at most 83 s, 21 s of lag
in a circle and at most 83 s more."""
_MASK = WHEEL - 1
_CIRCLE_LAG = 7
_TRIES = 16
_NARROW_TRIES = 4
_ROWS_A_VISIT = VISIT_MOST * 4 * 6

_ISSUED, _SECOND, _DUE, _MINUTE, _FREE, _FRESH = range(6)
"""Places in the clock: rows put on the wheel so far, second that is read off, second up to which it may be read off,
minute of the rhythm, first free slot, second from which attention is looked at anew."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of interactions in order of time.

    Attributes:
        users: int64[n]; items: int64[n], ids; kinds: int8[n], positions in `KINDS`; seconds: int64[n], since the epoch.
        watched: float32[n], seconds watched; NaN but for click and finish.
    """

    users: Int64Array
    items: Int64Array
    kinds: Int8Array
    seconds: Int64Array
    watched: Float32Array


def rhythm(plan: Plan) -> Float64Array:
    """float64[minutes + 1]: the share of the visits before each minute; the last minutes are left for what follows."""
    minute = np.arange((plan.days * DAY - WHEEL) // 60 + 1)
    angle = 2 * math.pi / DAY
    peak = RHYTHM_PEAK_HOUR * 3600
    second = minute * 60 + plan.start % DAY
    sums = second + RHYTHM_AMPLITUDE / angle * np.sin(angle * (second - peak))
    share: Float64Array = (sums - sums[0]) / (sums[-1] - sums[0])
    return share


def attention(plan: Plan) -> Float32Array:
    """float32[hours]: how much an item of each age is looked at, 1 when it is published."""
    hours = np.arange((plan.days + OLD_DAYS) * 24 + 1)
    fading = ATTENTION_FLOOR + (1 - ATTENTION_FLOOR) * 2.0 ** (-hours / (24 * ATTENTION_DAYS))
    return fading.astype(np.float32)


def by_author(world: World) -> Lists:
    """What each author made, weighted by popularity."""
    weights = np.diff(world.items.cumulative)
    return Lists.of(world.items.authors, world.plan.authors, np.arange(weights.size), weights)


def by_city(world: World) -> Lists:
    """What there is in each city, weighted by popularity."""
    weights = np.diff(world.items.cumulative)
    return Lists.of(world.items.cities, world.plan.cities, np.arange(weights.size), weights)


def stream(
    world: World, rows: int, step: int | None = None, advance: Callable[[int], object] = bool
) -> Iterator[Rows]:
    """Yield exactly `plan.events` rows in order of time, in parts of `rows` (the last is what is left).

    Work is linear in the events. Memory: the world, lists of its authors and cities, 4 x `REMEMBERED` bytes a user, the
    rows of about half an hour, and one part.

    Args:
        world: what is planted.
        rows: rows of a part.
        step: rows drawn in one go of the kernel; makes no difference to what comes out.
        advance: told how many more rows are drawn, after each go.
    """
    plan, items, users = world.plan, world.items, world.users
    shares = rhythm(plan)
    # What waits was put there within the time that the wheel holds, give or take a visit.
    width = WHEEL // 60 + 2
    busiest = float(np.max(shares[width:] - shares[:-width]))
    slots = int(min(plan.events, plan.events * busiest * 1.01 + 2 * _ROWS_A_VISIT)) + _ROWS_A_VISIT
    authors, cities = by_author(world), by_city(world)
    # What is looked up of an item lies together: every item is a new line of the cache.
    facts = np.stack([items.ids, items.durations * 10, np.rint(items.quality * 1e6)], axis=1).astype(np.int32)
    numbers = (plan.events, plan.start, plan.end, plan.seed)
    lists = tuple(
        (each.starts, each.places, each.weights, np.zeros(each.places.size + 1))
        for each in (items.wanted, authors, cities)
    )
    places = (
        (facts, items.published, items.group_starts),
        (
            np.diff(items.cumulative),
            attention(plan),
            np.empty(plan.items, np.float32),
            np.zeros(plan.items + 1),
        ),
        lists,
    )
    people = (
        (cumulated(users.activity), users.interests, users.tastes, users.favourites, users.cities),
        (users.circles, users.members),
        (users.follow_starts, users.follows, users.follow_times),
        world.city_weights,
        np.full((plan.users, REMEMBERED), NO_ROW, np.int32),
        np.zeros(plan.users, np.uint8),
    )
    clock = np.array([0, plan.start, plan.start, 0, 0, plan.start], np.int64)
    random = np.array([plan.seed], np.uint64)
    wheel = np.full((WHEEL, 2), -1, np.int32)
    # A row that waits: the slot of the next, user, item, kind, tenths of a second watched or -1.
    waiting = np.empty((slots, 5), np.int32)
    waiting[:, 0] = np.arange(1, slots + 1)
    left = plan.events
    while left:
        size = min(rows, left)
        part = Rows(
            np.empty(size, np.int64),
            np.empty(size, np.int64),
            np.empty(size, np.int8),
            np.empty(size, np.int64),
            np.empty(size, np.float32),
        )
        out = (part.users, part.items, part.kinds, part.seconds, part.watched)
        filled = 0
        while filled < size:
            until = min(size, filled + (step or size))
            _go_on(numbers, shares, places, people, clock, random, wheel, waiting, out, filled, until)
            advance(until - filled)
            filled = until
        left -= size
        yield part


@njit(nogil=True, cache=True)
def _look_anew(now, places):  # type: ignore[no-untyped-def]
    """Weigh every list by the attention of now, which is 0 for what is not published."""
    published = places[0][1]
    weights, fading, attention, cumulative = places[1]
    for place in range(published.size):
        age = now - published[place]
        attention[place] = fading[age // 3600] if age >= 0 else 0.0
        cumulative[place + 1] = cumulative[place] + weights[place] * attention[place]
    for _, entries, base, sums in places[2]:
        total = 0.0
        for i in range(entries.size):
            total += base[i] * attention[entries[i]]
            sums[i + 1] = total


@njit(nogil=True, cache=True)
def _put(wheel, waiting, clock, second, user, item, kind, watched):  # type: ignore[no-untyped-def]
    """Put a row on the wheel, behind those of its second."""
    slot = clock[_FREE]
    clock[_FREE] = waiting[slot, 0]
    waiting[slot, 0] = -1
    waiting[slot, 1], waiting[slot, 2], waiting[slot, 3], waiting[slot, 4] = user, item, kind, watched
    at = second & _MASK
    if wheel[at, 0] < 0:
        wheel[at, 0] = slot
    else:
        waiting[wheel[at, 1], 0] = slot
    wheel[at, 1] = slot
    clock[_ISSUED] += 1


@njit(nogil=True, cache=True)
def _go_on(numbers, shares, places, people, clock, random, wheel, waiting, out, filled, until):  # type: ignore[no-untyped-def]
    """Fill rows [filled, until) of `out`, from where the clock stands.

    One long function, because arrays that go in and out of tuples cost more than all the drawing: numba counts references
    to each. So every array is taken out once here.
    """
    events, start, end, seed = numbers
    (facts, _, group_starts), (_, _, _, live), lists = places
    (wanted_starts, wanted, _, wanted_sums), made, there = lists
    author_starts, of_author, _, author_sums = made
    city_starts, in_city, _, city_sums = there
    (
        (activity, interests, tastes, favourites, homes),
        (circles, members),
        follows,
        city_weights,
        remembered,
        cursors,
    ) = people
    follow_starts, followed, follow_times = follows
    out_users, out_items, out_kinds, out_seconds, out_watched = out
    while True:
        while clock[_SECOND] < clock[_DUE]:
            at = clock[_SECOND] & _MASK
            slot = wheel[at, 0]
            while slot >= 0:
                if filled == until:
                    return
                out_users[filled] = waiting[slot, 1]
                out_items[filled] = waiting[slot, 2]
                out_kinds[filled] = waiting[slot, 3]
                out_seconds[filled] = clock[_SECOND]
                out_watched[filled] = waiting[slot, 4] / 10 if waiting[slot, 4] >= 0 else np.nan
                filled += 1
                wheel[at, 0] = waiting[slot, 0]
                waiting[slot, 0] = clock[_FREE]
                clock[_FREE] = slot
                slot = wheel[at, 0]
            clock[_SECOND] += 1
        if filled == until:
            return
        if clock[_ISSUED] == events:
            clock[_DUE] = end
            continue
        # The clock goes by rows, so that there are exactly as many as were asked for when the days are over.
        share = clock[_ISSUED] / events
        minute = clock[_MINUTE]
        while shares[minute + 1] <= share:
            minute += 1
        clock[_MINUTE] = minute
        now = start + int(60 * (minute + (share - shares[minute]) / (shares[minute + 1] - shares[minute])))
        clock[_DUE] = now
        if clock[_SECOND] < now:
            continue
        if now >= clock[_FRESH]:
            _look_anew(now, places)
            clock[_FRESH] = now + SLICE_HOURS * 3600

        # A visit: who, where, alone or with the circle.
        user = pick(activity, 0, activity.size - 1, draw(random))
        shared = draw(random) < SHARED_SHARE and circles[user] >= 0
        word = mixed(
            mixed(mixed(np.uint64(seed), np.uint64(201)), np.uint64(user)), np.uint64((now - start) // DAY)
        )
        city = homes[user]
        if unit(word) < AWAY_SHARE:
            city = pick(city_weights, 0, city_weights.size - 1, unit(mixed(word, np.uint64(1))))
        second = now
        for shown in range(VISIT_MOST):
            if shown and draw(random) < 1.0 / VISIT_MEAN:
                break

            # The route, or the next wider one where there is nothing on it.
            share = draw(random)
            route = 0
            while route < POPULAR and share >= ROUTE_SHARES[route]:
                share -= ROUTE_SHARES[route]
                route += 1
            if shared:
                route = CIRCLE
            share = draw(random)
            k = 0
            while tastes[user, k] <= share:
                k += 1
            interest = interests[user, k]
            share = draw(random)
            first, last, author = 0, 0, 0
            if route == GROUP:
                group = favourites[user, k, int(share * FAVOURITE_GROUPS)]
                first, last = group_starts[group], group_starts[group + 1]
                if live[first] == live[last]:
                    route = INTEREST
            elif route == AUTHOR:
                route = INTEREST
                if follow_starts[user] < follow_starts[user + 1]:
                    follow = follow_starts[user] + int(
                        share * (follow_starts[user + 1] - follow_starts[user])
                    )
                    author = followed[follow]
                    first, last = author_starts[author], author_starts[author + 1]
                    # What is followed later is not followed yet.
                    if follow_times[follow] <= now and author_sums[first] < author_sums[last]:
                        route = AUTHOR
            elif route == CITY and city_sums[city_starts[city]] == city_sums[city_starts[city + 1]]:
                route = POPULAR
            none = wanted_sums[wanted_starts[interest]] == wanted_sums[wanted_starts[interest + 1]]
            if route == INTEREST and none:
                route = POPULAR

            # The item, by weight x attention. What the user was just shown is drawn again.
            place = 0
            for attempt in range(_TRIES):
                if attempt == _NARROW_TRIES and route in (GROUP, AUTHOR):
                    route = POPULAR if none else INTEREST
                share = draw(random)
                if route == GROUP:
                    place = pick(live, first, last, share)
                elif route == INTEREST:
                    place = wanted[
                        pick(wanted_sums, wanted_starts[interest], wanted_starts[interest + 1], share)
                    ]
                elif route == AUTHOR:
                    place = of_author[pick(author_sums, first, last, share)]
                elif route == CITY:
                    place = in_city[pick(city_sums, city_starts[city], city_starts[city + 1], share)]
                elif route == POPULAR or attempt > _TRIES // 2:
                    place = pick(live, 0, live.size - 1, share)
                else:
                    place = int(share * (live.size - 1))
                    if live[place] == live[place + 1]:
                        continue
                new = True
                for p in range(REMEMBERED):
                    new &= remembered[user, p] != place
                if new:
                    break
            remembered[user, cursors[user]] = place
            cursors[user] = (cursors[user] + 1) % REMEMBERED

            # What comes of it; friends do the same a little later.
            item, length, quality = facts[place, 0], facts[place, 1], facts[place, 2] / 1e6
            clicked = draw(random) < CLICK_RATES[route] * (0.5 + quality)
            finished = clicked and draw(random) < FINISH_RATES[0] + FINISH_RATES[1] * quality
            disliked = not clicked and draw(random) < DISLIKE_RATE
            watched, pause = -1, 3
            if clicked:
                part = 1.0 if finished else 0.02 + 0.93 * draw(random)
                watched = int(length * part)
                pause = 3 + watched // 10
            for friend in range(members.shape[1] if shared else 1):
                who = members[circles[user], friend] if shared else user
                then = second + _CIRCLE_LAG * friend
                if clock[_ISSUED] < events:
                    _put(wheel, waiting, clock, then, who, item, EXPOSE, -1)
                if disliked and clock[_ISSUED] < events:
                    _put(wheel, waiting, clock, then + 2, who, item, DISLIKE, -1)
                if not clicked:
                    continue
                if clock[_ISSUED] < events:
                    _put(wheel, waiting, clock, then + 1, who, item, CLICK, watched)
                if finished and clock[_ISSUED] < events:
                    _put(wheel, waiting, clock, then + pause, who, item, FINISH, watched)
                for k in range(3):
                    if draw(random) < RATES[k] and clock[_ISSUED] < events:
                        _put(wheel, waiting, clock, then + pause, who, item, LIKE + k, -1)
            second += pause
