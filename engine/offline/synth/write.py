"""Writes a planted world and what its users do as a data set, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine import __version__
from engine.core.channel import Progress
from engine.core.errors import DatasetError
from engine.core.types import AnyArray
from engine.data.dataset import Dataset, write_dataset
from engine.data.snapshot.files import sync, temporary_beside
from engine.offline.synth.events import KINDS, Rows, stream
from engine.offline.synth.plan import Plan
from engine.offline.synth.titles import author_names, category_names, city_names, interest_names, titles
from engine.offline.synth.world import World, plant

PLANTED = "planted"
"""The folder, beside the files of the data set, that holds what was planted."""

_ROW_GROUP = 1 << 18
_PART = 1 << 17


def synthesize(path: Path, plan: Plan, progress: Progress, step: int = 1 << 17) -> Dataset:
    """Write a synthetic data set and open it, which checks it.

    Memory: about 200 bytes an item and 400 a user, and a few row groups; none of it grows with the events, but for those
    of half an hour.

    Args:
        path: a folder that is empty or not there.
        plan: the sizes.
        progress: told how far it is.
        step: events between two reports of progress; makes no difference to what is written.

    Raises:
        DatasetError: the folder is not empty, or cannot be written. Nothing is left behind then.
    """
    path = path.absolute()
    temporary = temporary_beside(path)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DatasetError("is there already and not empty; name a folder that does not exist", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = _write(temporary, plan, progress, step)
        for file in (*sorted(temporary.rglob("*.*")), temporary / PLANTED, temporary):
            sync(file)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, pa.ArrowException) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DatasetError(f"cannot be written: {said}", str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Dataset(path, dataset.name, dataset.id_type, dataset.meta, dataset.schemas, dataset.rows)


def _write(path: Path, plan: Plan, progress: Progress, step: int) -> Dataset:
    progress.start("planting", 1)
    world = plant(plan)
    progress.advance()
    (path / PLANTED).mkdir(parents=True)
    _write_planted(path / PLANTED, world)
    by_id = np.empty(plan.items, np.int32)
    by_id[world.items.ids] = np.arange(plan.items, dtype=np.int32)

    def last() -> Iterator[Any]:
        yield _authors(world)
        progress.start("checking", 1)

    dataset = write_dataset(
        path,
        _interactions(world, progress, step),
        items=_items(world, by_id, progress),
        users=_users(world),
        follows=_follows(world),
        authors=last(),
        meta=_meta(plan),
    )
    progress.advance()
    return dataset


def _interactions(world: World, progress: Progress, step: int) -> Iterator[Any]:
    """Tables of a row group each. The next is drawn on another thread while one is written."""
    names = pa.array(KINDS)
    progress.start("events", world.plan.events)
    parts = stream(world, _ROW_GROUP, step, progress.advance)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = ahead.submit(next, parts, None)
            yield _table(part, names)


def _table(part: Rows, names: Any) -> Any:
    return pa.table(
        {
            "user_id": part.users,
            "item_id": part.items,
            "event": pa.DictionaryArray.from_arrays(pa.array(part.kinds), names),
            "timestamp": part.seconds,
            "watch_seconds": pa.array(part.watched, from_pandas=True),
        }
    )


def _items(world: World, by_id: AnyArray, progress: Progress) -> Iterator[Any]:
    """Tables of items in order of id."""
    items, plan = world.items, world.plan
    interests, categories = interest_names(plan.interests), category_names(plan.interests)
    cities = pa.array(city_names(plan.cities))
    progress.start("items", plan.items)
    for first in range(0, plan.items, _PART):
        places = by_id[first : first + _PART]
        main, second = items.interests[places], items.seconds[places]
        has = second >= 0
        offsets = np.zeros(places.size + 1, np.int32)
        np.cumsum(1 + has, out=offsets[1:])
        tags = np.empty(int(offsets[-1]), np.int32)
        tags[offsets[:-1]] = main
        tags[offsets[1:][has] - 1] = second[has]
        yield pa.table(
            {
                "item_id": np.arange(first, first + places.size, dtype=np.int64),
                "author_id": items.authors[places].astype(np.int64),
                "published_at": items.published[places],
                "title": titles(interests, main, items.groups[places], first),
                "tags": pa.ListArray.from_arrays(pa.array(offsets), pa.array(interests).take(pa.array(tags))),
                "category": pa.array(categories).take(pa.array(main)),
                "city": _coded(items.cities[places], cities),
                "latitude": pa.array(items.latitudes[places], from_pandas=True),
                "longitude": pa.array(items.longitudes[places], from_pandas=True),
                "quality": items.quality[places],
                "duration_seconds": items.durations[places],
            }
        )
        progress.advance(places.size)


def _users(world: World) -> Iterator[Any]:
    cities = pa.array(city_names(world.plan.cities))
    for first in range(0, world.plan.users, _PART):
        lives = world.users.cities[first : first + _PART]
        ids = np.arange(first, first + lives.size, dtype=np.int64)
        yield pa.table({"user_id": ids, "city": _coded(lives, cities)})


def _follows(world: World) -> Iterator[Any]:
    users = world.users
    for first in range(0, world.plan.users, _PART):
        starts = users.follow_starts[first : first + _PART + 1]
        part = slice(int(starts[0]), int(starts[-1]))
        owners = np.repeat(np.arange(first, first + starts.size - 1, dtype=np.int64), np.diff(starts))
        yield pa.table(
            {
                "user_id": owners,
                "author_id": users.follows[part].astype(np.int64),
                "timestamp": users.follow_times[part],
            }
        )


def _authors(world: World) -> Any:
    ids = np.arange(world.plan.authors, dtype=np.int64)
    return pa.table({"author_id": ids, "name": author_names(world.plan.authors)})


def _meta(plan: Plan) -> dict[str, Any]:
    return {
        "name": "synthetic",
        "licence": "none: made up",
        "source": f"recall synth of recall-engine {__version__}",
        "protocol": "temporal",
        "users": plan.users,
        "items": plan.items,
        "events": plan.events,
        "days": plan.days,
        "interests": plan.interests,
        "authors": plan.authors,
        "cities": plan.cities,
        "end": plan.end,
        "seed": plan.seed,
    }


def _write_planted(path: Path, world: World) -> None:
    """Write what tests and students compare with: interests of users, items and authors, groups, ranks, circles."""
    items, users, authors, plan = world.items, world.users, world.authors, world.plan
    order = np.argsort(items.ids)
    pq.write_table(
        pa.table(
            {
                "item_id": items.ids[order].astype(np.int64),
                "interest": items.interests[order],
                "second_interest": _link(items.seconds[order]),
                "group": items.groups[order],
                "popularity_rank": items.ranks[order],
            }
        ),
        path / "items.parquet",
        compression="zstd",
    )
    weights = np.diff(users.tastes, axis=1, prepend=0.0).astype(np.float32)
    weights[users.interests < 0] = -1
    pq.write_table(
        pa.table(
            {
                "user_id": np.arange(plan.users, dtype=np.int64),
                "interests": _lists_of(users.interests),
                "weights": _lists_of(weights),
                "favourite_groups": _lists_of(users.favourites),
                "activity": users.activity.astype(np.float32),
                "circle": _link(users.circles),
            }
        ),
        path / "users.parquet",
        compression="zstd",
    )
    pq.write_table(
        pa.table(
            {
                "author_id": np.arange(plan.authors, dtype=np.int64),
                "interest": authors.interests,
                "second_interest": _link(authors.seconds),
                "city": pa.array(city_names(plan.cities)).take(pa.array(authors.cities)),
            }
        ),
        path / "authors.parquet",
        compression="zstd",
    )
    names = interest_names(plan.interests)
    cities = (
        pa.array(city_names(plan.cities)),
        world.latitudes,
        world.longitudes,
    )
    pq.write_table(
        pa.table({"interest": np.arange(plan.interests, dtype=np.int32), "name": names}),
        path / "interests.parquet",
        compression="zstd",
    )
    pq.write_table(
        pa.table(dict(zip(("city", "latitude", "longitude"), cities, strict=True))),
        path / "cities.parquet",
        compression="zstd",
    )


def _lists_of(numbers: AnyArray) -> Any:
    """A column of lists, one per row; what is below 0 is left out."""
    flat = numbers.reshape(len(numbers), -1)
    offsets = np.zeros(len(flat) + 1, np.int32)
    np.cumsum((flat >= 0).sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat[flat >= 0]))


def _link(numbers: AnyArray) -> Any:
    """A column in which -1 is null."""
    return pa.array(numbers, mask=numbers < 0)


def _coded(codes: AnyArray, names: Any) -> Any:
    """A dictionary-encoded column in which -1 is null."""
    return pa.DictionaryArray.from_arrays(_link(codes), names)
