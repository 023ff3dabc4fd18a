"""Makes the bundled sample of KuaiRand-Pure: `python -m engine.data.sample.make_sample SOURCE [DESTINATION]`.

SOURCE is the set in this project's form, as `recall data import kuairand` writes it. The same source gives
the same sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core.types import BoolArray, Int64Array
from engine.data.dataset import Dataset, write_dataset
from engine.data.sample import sample_path

SEED = 20220408
USERS = 2100
"""As many as stay below a megabyte with every event of theirs."""
MIN_ITEMS = 10
"""A user who comes into question liked at least so many items."""
MIN_USERS = 5
"""An item stays if at least so many of the chosen users liked it."""

POSITIVE = ("click", "like", "comment", "follow", "share", "finish")
RARE = ("follow", "dislike", "comment", "share")
"""Users with one of these are taken first: a random choice would leave channels without any."""

EVENT_COLUMNS = ["user_id", "item_id", "event", "timestamp", "watch_seconds", "timestamp_imputed"]
ITEM_COLUMNS = ["item_id", "author_id", "published_at", "duration_seconds", "tags", "kind"]
USER_COLUMNS = [
    "user_id",
    "user_active_degree",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "register_days_range",
]

META = {
    "name": "kuairand-pure-sample",
    "licence": "CC BY-SA 4.0",
    "licence_file": "LICENSE",
    "attribution": "KuaiRand-Pure by Chongming Gao, Shijun Li, Yuan Zhang, Jiawei Chen, Biao Li, Wenqiang "
    "Lei, Peng Jiang and Xiangnan He: KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly "
    "Exposed Videos, CIKM 2022, https://doi.org/10.1145/3511808.3557624",
    "source": "https://kuairand.com, KuaiRand-Pure, part of the standard log",
    "protocol": "temporal",
}


def make_sample(source: Path, destination: Path) -> Dataset:
    """Choose users and items, and write what is between them, every event.

    Raises:
        DatasetError: `source` is no data set.
    """
    Dataset.open(source)
    events = pq.read_table(source / "interactions.parquet", columns=EVENT_COLUMNS)
    users = choose_users(events)
    events = events.filter(pc.is_in(events["user_id"], value_set=pa.array(users)))
    items = choose_items(events)
    events = events.filter(pc.is_in(events["item_id"], value_set=pa.array(items)))
    events = events.sort_by([(key, "ascending") for key in ("user_id", "timestamp", "item_id", "event")])
    item_table = _only(source, "items", ITEM_COLUMNS, "item_id", items)
    follows = _only(source, "follows", ["user_id", "author_id", "timestamp"], "user_id", users)
    follows = follows.filter(pc.is_in(follows["author_id"], value_set=pc.unique(item_table["author_id"])))
    changes = (
        f"{len(users)} users chosen at random (seed {SEED}) among those with any of {', '.join(POSITIVE)} "
        f"on at least {MIN_ITEMS} videos, users with any of {', '.join(RARE)} first; videos that at least "
        f"{MIN_USERS} of these users have such an event on; all events between the two, none thinned; each "
        "flag of the log written as an event of its own; some columns left out; where timestamp_imputed is "
        "true, the times are not those of the log and only their order counts"
    )
    counts = {"users": len(users), "items": len(items), "events": events.num_rows}
    return write_dataset(
        destination,
        events,
        items=item_table,
        users=_only(source, "users", USER_COLUMNS, "user_id", users),
        follows=follows,
        meta=META | {"changes": changes} | counts,
    )


def choose_users(events: Any) -> Int64Array:
    """Return int64[USERS] user ids, rising: those with rare events, then others at random."""
    user, item = _ids(events, _has_event(events, POSITIVE))
    pairs = np.unique(np.stack([user, item], axis=1), axis=0)
    ids, liked = np.unique(pairs[:, 0], return_counts=True)
    eligible = ids[liked >= MIN_ITEMS]
    shuffled = np.random.default_rng(SEED).permutation(eligible)
    rare, _ = _ids(events, _has_event(events, RARE))
    first = np.isin(shuffled, rare)
    return np.sort(np.concatenate([shuffled[first], shuffled[~first]])[:USERS])


def choose_items(events: Any) -> Int64Array:
    """Return int64[m] ids, rising, of the items that enough of the chosen users liked."""
    user, item = _ids(events, _has_event(events, POSITIVE))
    pairs = np.unique(np.stack([user, item], axis=1), axis=0)
    ids, likers = np.unique(pairs[:, 1], return_counts=True)
    return ids[likers >= MIN_USERS]


def _has_event(events: Any, kinds: tuple[str, ...]) -> BoolArray:
    mask: BoolArray = pc.is_in(events["event"], value_set=pa.array(kinds, events["event"].type)).to_numpy()
    return mask


def _ids(events: Any, mask: BoolArray) -> tuple[Int64Array, Int64Array]:
    return events["user_id"].to_numpy()[mask], events["item_id"].to_numpy()[mask]


def _only(source: Path, file: str, columns: list[str], key: str, ids: Int64Array) -> Any:
    table = pq.read_table(source / f"{file}.parquet", columns=columns)
    return table.filter(pc.is_in(table[key], value_set=pa.array(ids)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the bundled sample from KuaiRand-Pure.")
    parser.add_argument("source", type=Path, help="the data set, as `recall data import kuairand` writes it")
    parser.add_argument("destination", type=Path, nargs="?", default=sample_path())
    arguments = parser.parse_args()
    made = make_sample(arguments.source, arguments.destination)
    print(f"{made.path}: {dict(made.rows)}")
