"""The straightforward server that the engine is compared with: what a good engineer writes in an afternoon.

Every channel's lists lie in Redis as packed records. A request fetches them with MGET: first what is known of the user,
then all lists that this names, then the posts of similar authors. Candidates are dicts; exposures are pybloom-live
filters, which lie in Redis too; the answer is built from protobuf messages; grpcio's synchronous server runs it on a
thread pool. It has the channels, depths, quotas and the merge score of the engine's scene, and answers the same RPC.

Where there is a choice it has the cheaper way: only what is about to be taken is checked against the filter, whose check
takes microseconds; there is one filter a user and no time slices; lists are cut to what is read of them. It has no
fallback channels, deadlines or reports and no filters but seen items and exposures, so it does less for a request than
the engine does, never more.

    python -m loadtest.baseline --redis unix:///path/to/socket

serves what `export` put there; `recall bench serve --baseline` does both and measures it beside the engine.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import math
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pygeohash
import redis
from pybloom_live import BloomFilter
from recall.v1 import recall_pb2 as pb
from recall.v1 import recall_pb2_grpc

if TYPE_CHECKING:
    from engine.bench.population import Active
    from engine.bench.world import World

THREADS = 8
DAY = 86_400
SCORED = np.dtype([("id", "<i8"), ("score", "<f4")])
POSTED = np.dtype([("id", "<i8"), ("time", "<i8")])
Scored = list[tuple[int, float]]
Proposals = list[tuple[int, float, int]]
"""A channel's answer, best first: item, score, trigger (-1: none)."""

AUTHOR_CHANNELS = ("followed_authors", "interacted_authors", "similar_authors")
CHANNELS = ("itemcf", "swing", "usercf", *AUTHOR_CHANNELS, "geo", "same_city", "cache")


class Baseline(recall_pb2_grpc.RecallServiceServicer):
    """Answers Recall from Redis."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection
        self._settings: dict[str, Any] = json.loads(_got(connection.get("settings")))
        self._authors: list[int] = np.frombuffer(_got(connection.get("authors")), np.int64).tolist()
        self._quotas: dict[str, int] = self._settings["quotas"]
        self._weights: dict[str, float] = self._settings["weights"]

    def Recall(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's name
        user, now = request.user_id, request.context.time
        limit = request.limit if request.HasField("limit") else self._settings["limit"]
        answers, history, shown = self._recalled(user, now, request.context, limit)
        return self._merged(answers, {item for item, _ in history}, shown, limit)

    def channel(self, name: str, user: int, now: int, context: Any, limit: int) -> Proposals:
        """One channel's answer."""
        return self._recalled(user, now, context, limit)[0][name]

    def _recalled(
        self, user: int, now: int, context: Any, limit: int
    ) -> tuple[dict[str, Proposals], Scored, BloomFilter | None]:
        options, wanted = self._settings["options"], self._quotas
        kinds = ("history", "times", "follows", "leftovers", "cities", "shown", "similar_users")
        history_, times_, follows_, leftovers, cities_, shown_, users_ = self._redis.mget(
            [f"{kind}:{user}" for kind in kinds]
        )
        history, users = _scored(history_), _scored(users_)
        times: list[int] = np.frombuffer(times_ or b"", np.int64).tolist()
        follows: list[int] = np.frombuffer(follows_ or b"", np.int64).tolist()
        cities: list[str] = json.loads(cities_) if cities_ else []
        if context.city:
            cities = [context.city, *(city for city in cities if city != context.city)]
        shown = BloomFilter.fromfile(io.BytesIO(shown_)) if shown_ else None

        # The second round trip: every list of which the key is known by now.
        interest: dict[int, float] = {}
        if "interacted_authors" in wanted or "similar_authors" in wanted:
            interest = self._interest(history, times, now)
        own_authors = [author for author, _ in heapq.nlargest(50, interest.items(), key=_second)]
        liked = dict(interest)
        for author in follows:
            liked[author] = liked.get(author, 0.0) + 1.0
        sources = heapq.nlargest(50, liked.items(), key=_second)
        cells: list[str] = []
        if "geo" in wanted and context.HasField("location"):
            precision = options["geo"]["precision"]
            here = pygeohash.encode(context.location.latitude, context.location.longitude, precision)
            cells = [here, *_around(here)]
        keys: list[str] = []
        for name in ("itemcf", "swing"):
            if name in wanted:
                keys += [f"{name}:{item}" for item, _ in history[: options[name]["last_n"]]]
        if "usercf" in wanted:
            keys += [f"likes:{other}" for other, _ in users]
        authors = [*follows, *own_authors] if wanted.keys() & {*AUTHOR_CHANNELS} else []
        keys += [f"posts:{author}" for author in dict.fromkeys(authors)]
        if "similar_authors" in wanted:
            keys += [f"similar_authors:{author}" for author, _ in sources]
        keys += [f"cell:{cell}" for cell in cells]
        if "same_city" in wanted:
            keys += [f"city:{city}" for city in cities]
        lists: dict[str, bytes | None] = dict(zip(keys, self._redis.mget(keys), strict=True)) if keys else {}

        answers: dict[str, Proposals] = {}
        for name in wanted:
            if name in ("itemcf", "swing"):
                triggers = history[: options[name]["last_n"]]
                answers[name] = _added_up(
                    ((item, weight, _scored(lists[f"{name}:{item}"])) for item, weight in triggers), limit
                )
            elif name == "usercf":
                answers[name] = _added_up(
                    ((other, weight, _scored(lists[f"likes:{other}"])) for other, weight in users), limit
                )
            elif name == "followed_authors":
                wishes = [(author, 1.0) for author in follows]
                answers[name] = _newest(wishes, lists, "posts", options[name]["per_author"], now, limit)
            elif name == "interacted_authors":
                wishes = [(author, interest[author]) for author in own_authors]
                answers[name] = _newest(wishes, lists, "posts", options[name]["per_author"], now, limit)
            elif name == "similar_authors":
                found = _added_up(
                    (
                        (author, weight, _scored(lists[f"similar_authors:{author}"]))
                        for author, weight in sources
                    ),
                    options[name]["authors"] + len(sources),
                )
                known = {author for author, _ in sources}
                wishes = [(author, score) for author, score, _ in found if author not in known]
                wishes = wishes[: options[name]["authors"]]
                # The third: whose posts are wanted was in the second's answer.
                third = [f"posts:{author}" for author, _ in wishes]
                posts = dict(zip(third, self._redis.mget(third), strict=True)) if third else {}
                answers[name] = _newest(wishes, posts, "posts", options[name]["per_author"], now, limit)
            elif name == "geo":
                near = [(cell, 1.0 if cell == cells[0] else 0.5) for cell in cells]
                if cells and len(_posted(lists[f"cell:{cells[0]}"])) >= options[name]["thin"]:
                    near = near[:1]
                answers[name] = _newest(near, lists, "cell", limit, now, limit)
            elif name == "same_city":
                places = [(city, 1.0 if n == 0 else 0.5) for n, city in enumerate(cities)]
                answers[name] = _newest(places, lists, "city", limit, now, limit)
            else:
                kept: list[int] = np.frombuffer(leftovers or b"", np.int64).tolist()
                answers[name] = [(item, -float(n), -1) for n, item in enumerate(kept[:limit])]
        return answers, history, shown

    def _interest(self, history: Scored, times: Sequence[int], now: int) -> dict[int, float]:
        """Interest in the authors of what the user liked in the last 90 days, halved every 30."""
        interest: dict[int, float] = {}
        for (item, weight), time in zip(history, times, strict=True):
            age = max(now - time, 0)
            author = self._authors[item]
            if author >= 0 and age <= 90 * DAY:
                interest[author] = interest.get(author, 0.0) + weight * 2.0 ** (-age / (30 * DAY))
        return interest

    def _merged(
        self, answers: Mapping[str, Proposals], seen: set[int], shown: BloomFilter | None, limit: int
    ) -> Any:
        constant = self._settings["rank_constant"]
        proposals: dict[int, list[tuple[str, int, float, int]]] = {}
        scores: dict[int, float] = {}
        for name, answer in answers.items():
            weight = self._weights.get(name, 1.0)
            for rank, (item, score, trigger) in enumerate(answer, 1):
                proposals.setdefault(item, []).append((name, rank, score, trigger))
                scores[item] = scores.get(item, 0.0) + weight / (constant + rank)
        taken: dict[int, None] = {}
        refused = set(seen)

        def take(answer: Proposals, most: int) -> None:
            for item, _, _ in answer:
                if most <= 0 or len(taken) >= limit:
                    return
                if item in taken or item in refused:
                    continue
                if shown is not None and item in shown:
                    refused.add(item)
                    continue
                taken[item] = None
                most -= 1

        total = sum(self._quotas.values())
        for name, answer in answers.items():
            take(answer, self._quotas[name] * limit // total if total > limit else self._quotas[name])
        first = sorted(taken, key=lambda item: (-scores[item], item))
        for answer in answers.values():
            take(answer, limit)
        response = pb.RecallResponse()
        for item in [*first, *list(taken)[len(first) :]]:
            candidate = response.candidates.add(item_id=item, score=scores[item])
            for name, rank, score, trigger in proposals[item]:
                proposal = candidate.proposals.add(channel=name, rank=rank, score=score)
                if trigger >= 0:
                    proposal.trigger_id = trigger
        return response


def _added_up(lists: Iterable[tuple[int, float, Scored]], limit: int) -> Proposals:
    """Sum weight x score over the lists; the best, and the list that gave most to each."""
    sums: dict[int, float] = {}
    best: dict[int, tuple[float, int]] = {}
    for trigger, weight, entries in lists:
        for item, score in entries:
            gain = weight * score
            sums[item] = sums.get(item, 0.0) + gain
            if item not in best or gain > best[item][0]:
                best[item] = (gain, trigger)
    chosen = heapq.nsmallest(limit, sums.items(), key=_best_first)
    return [(item, score, best[item][1]) for item, score in chosen]


def _newest(
    wishes: Sequence[tuple[Any, float]],
    lists: Mapping[str, bytes | None],
    kind: str,
    each: int,
    now: int,
    limit: int,
) -> Proposals:
    """The newest posts of some lists: log2 of the list's weight less the age in weeks."""
    found: dict[int, tuple[float, int]] = {}
    for key, weight in wishes:
        if weight <= 0:
            continue
        base, trigger = math.log2(weight), key if isinstance(key, int) else -1
        for item, time in _posted(lists.get(f"{kind}:{key}"))[:each]:
            score = base - (now - time) / (7 * DAY)
            if item not in found or score > found[item][0]:
                found[item] = (score, trigger)
    chosen = heapq.nsmallest(limit, found.items(), key=_newest_first)
    return [(item, score, trigger) for item, (score, trigger) in chosen]


def _second(entry: tuple[int, float]) -> float:
    return entry[1]


def _best_first(entry: tuple[int, float]) -> tuple[float, int]:
    return -entry[1], entry[0]


def _newest_first(entry: tuple[int, tuple[float, int]]) -> tuple[float, int]:
    return -entry[1][0], entry[0]


def _scored(value: bytes | None) -> Scored:
    return np.frombuffer(value, SCORED).tolist() if value else []


def _posted(value: bytes | None) -> list[tuple[int, int]]:
    return np.frombuffer(value, POSTED).tolist() if value else []


def _around(cell: str) -> list[str]:
    """The eight neighbours of a GeoHash cell; fewer at the poles."""
    rows = [cell]
    for direction in ("top", "bottom"):
        try:
            rows.append(str(pygeohash.get_adjacent(cell, direction)))
        except ValueError:
            continue
    names: list[str] = []
    for row in rows:
        sides = [str(pygeohash.get_adjacent(row, side)) for side in ("left", "right")]
        names += sides if row == cell else [row, *sides]
    return list(dict.fromkeys(names))


def _got(value: Any) -> bytes:
    if value is None:
        raise SystemExit("there is no exported world in this Redis")
    return bytes(value)


# --- filling Redis -------------------------------------------------------------------------------

_AT_ONCE = 5_000


def export(world: World, active: Active, connection: redis.Redis) -> None:
    """Put a world's snapshots and the live state of its active users into Redis.

    Args:
        world: integer ids; its scene has no channels but those of `CHANNELS`.
        active: who has live state.
        connection: an empty Redis.
    """
    from engine.data.catalogue import Catalogue
    from engine.data.live import LiveCatalogue

    snapshots = world.snapshots()
    catalogue = LiveCatalogue.of(Catalogue.load(snapshots["catalogue"].arrays))
    scene, config = world.config.scenes["default"], world.config
    items, columns = columns_of_ids(catalogue.items), catalogue.columns
    users, authors = columns_of_ids(catalogue.users), columns_of_ids(catalogue.authors)
    strange = [name for name in scene.quotas if name not in CHANNELS]
    if strange or catalogue.id_type != "int64" or (items.size and items[-1] > 4 * items.size):
        raise ValueError(f"cannot export {strange or 'ids that are strings or far apart'}")
    writer = _Writer(connection)

    def arrays(name: str) -> Mapping[str, Any]:
        return snapshots[config.snapshot_of(name)].arrays

    def write_lists(kind: str, owners: Any, lists: Any, ids: Any, width: int) -> None:
        writer.scored(kind, owners, lists["indptr"], lists["neighbours"], lists["similarities"], ids, width)

    for name in ("itemcf", "swing"):
        if name in scene.quotas:
            write_lists(name, items, arrays(name), items, config.channels[name].top_k)
    if "usercf" in scene.quotas:
        mine = arrays("usercf")
        write_lists("similar_users", users, mine, users, config.channels["usercf"].top_k)
        likes = mine["items.indptr"], mine["items.rows"], mine["items.weights"]
        writer.scored("likes", users, *likes, items, config.channels["usercf"].last_n)
    if scene.quotas.keys() & {*AUTHOR_CHANNELS}:
        name = next(name for name in AUTHOR_CHANNELS if name in scene.quotas)
        writer.posted("posts", authors, arrays(name), items, 20)
    if "similar_authors" in scene.quotas:
        width = config.channels["similar_authors"].top_k
        write_lists("similar_authors", authors, arrays("similar_authors"), authors, width)
    if "geo" in scene.quotas:
        from channels.geo import geohash_of

        mine, precision = arrays("geo"), config.channels["geo"].precision
        cells = [geohash_of(key, precision) for key in mine["posts.keys"].tolist()]
        writer.posted("cell", cells, mine, items, scene.limit)
    if "same_city" in scene.quotas:
        writer.posted("city", list(columns.city_codes), arrays("same_city"), items, scene.limit)
    _write_users(writer, world, active, snapshots["history"].arrays, catalogue, users, items, authors)
    author_of = np.full(int(items[-1]) + 1 if items.size else 0, -1, np.int64)
    known = columns.authors >= 0
    author_of[items[known]] = authors[columns.authors[known]]
    writer.put("authors", author_of.tobytes())
    settings = {
        "quotas": dict(scene.quotas),
        "weights": dict(scene.weights),
        "limit": scene.limit,
        "rank_constant": scene.rank_constant,
        "options": {name: config.channels[name].model_dump(mode="json") for name in scene.quotas},
    }
    writer.put("settings", json.dumps(settings).encode())
    writer.flush()


def columns_of_ids(index: Any) -> Any:
    """int64[n]: the id of each row."""
    return index.ids(np.arange(len(index), dtype=np.int32))


def _write_users(
    writer: _Writer,
    world: World,
    active: Active,
    stored: Any,
    catalogue: Any,
    users: Any,
    items: Any,
    authors: Any,
) -> None:
    indptr, rows, weights, times = (stored[key] for key in ("indptr", "rows", "weights", "timestamps"))
    recent_times = world.now - 60 * np.arange(active.recent.shape[1])
    place = {int(user): n for n, user in enumerate(active.users.tolist())}
    for row, user in enumerate(users.tolist()):
        mine = slice(int(indptr[row]), int(indptr[row + 1]))
        liked, points, when = rows[mine], weights[mine], times[mine]
        n = place.get(user)
        if n is not None:
            _, first = np.unique(active.recent[n], return_index=True)
            first.sort()
            new = active.recent[n][first]
            old = ~np.isin(liked, new)
            liked = np.concatenate((new, liked[old]))
            points = np.concatenate((np.ones(new.size, np.float32), points[old]))
            when = np.concatenate((recent_times[first], when[old]))
            shown = BloomFilter(capacity=max(1000, active.shown.shape[1]), error_rate=0.01)
            for item in items[active.shown[n]].tolist():
                shown.add(item)
            content = io.BytesIO()
            shown.tofile(content)
            writer.put(f"shown:{user}", content.getvalue())
            followed = dict.fromkeys(active.follows[n].tolist())
            writer.put(
                f"follows:{user}", authors[list(followed)].astype(np.int64).tobytes() if followed else b""
            )
            writer.put(f"leftovers:{user}", items[active.leftovers[n]].astype(np.int64).tobytes())
            names = list(catalogue.columns.city_codes)
            cities = dict.fromkeys(names[code] for code in active.cities[n].tolist())
            writer.put(f"cities:{user}", json.dumps(list(cities)).encode())
        records = np.empty(liked.size, SCORED)
        records["id"], records["score"] = items[liked], points
        writer.put(f"history:{user}", records.tobytes())
        writer.put(f"times:{user}", when.astype(np.int64).tobytes())


class _Writer:
    """Collects SETs and sends them a few thousand at a time."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection
        self._waiting: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        if value:
            self._waiting[key] = value
        if len(self._waiting) >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._redis.mset(self._waiting)
            self._waiting = {}

    def scored(
        self, kind: str, owners: Any, indptr: Any, targets: Any, scores: Any, ids: Any, width: int
    ) -> None:
        """A list per owner: its first `width` entries."""

        def records(part: Any) -> Any:
            made = np.empty(part.size, SCORED)
            made["id"], made["score"] = ids[targets[part]], scores[part]
            return made

        self._lists(kind, owners, indptr, records, width)

    def posted(self, kind: str, owners: Any, posts: Any, ids: Any, width: int) -> None:
        """A posting list per owner: its newest `width` items."""

        def records(part: Any) -> Any:
            made = np.empty(part.size, POSTED)
            made["id"], made["time"] = ids[posts["posts.rows"][part]], posts["posts.times"][part]
            return made

        self._lists(kind, owners, posts["posts.indptr"], records, width)

    def _lists(self, kind: str, owners: Any, indptr: Any, records: Any, width: int) -> None:
        owners = owners if isinstance(owners, list) else owners.tolist()
        for first in range(0, len(indptr) - 1, _AT_ONCE):
            starts = np.asarray(indptr[first : first + _AT_ONCE + 1])
            lengths = np.minimum(np.diff(starts), width)
            ends = np.cumsum(lengths)
            part = np.arange(ends[-1]) + np.repeat(starts[:-1] - (ends - lengths), lengths)
            made = records(part)
            content, size = made.tobytes(), made.dtype.itemsize
            for n, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
                self.put(f"{kind}:{owners[first + n]}", content[(end - length) * size : end * size])


def main() -> None:
    """Serve until SIGTERM or SIGINT; prints the port."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis", required=True, metavar="URL")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    server = grpc.server(ThreadPoolExecutor(arguments.threads))
    baseline = Baseline(redis.Redis.from_url(arguments.redis))
    recall_pb2_grpc.add_RecallServiceServicer_to_server(baseline, server)
    port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    server.start()
    print(port, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop(1).wait()


if __name__ == "__main__":
    # Before any thread starts: a signal goes to whichever thread does not block it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
