"""How user state lies in the store: key names and records. docs/state.md describes the same for other writers.

All keys of a user share the hash tag `{u<id>}` or `{k<id>}`, so that a cluster keeps them in one slot. Every value but
the event ids and the exposure bits is a string of 24-byte records (`RECORD`, little-endian); a record of kind 0 is room
for the next one.
"""

from __future__ import annotations

import zlib
from hashlib import blake2b
from typing import Final

import numpy as np

from engine.core.keys import key_of

RECORD = np.dtype(
    [("key", "<i8"), ("kind", "<u4"), ("value", "<f4"), ("time", "<i8")],
    align=True,
)
"""A record: 24 bytes. `key` is the 64-bit key of an id (`engine.core.keys`), `time` seconds since the epoch.

| key  | kind                                 | value                          |
|------|--------------------------------------|--------------------------------|
| `:r` | `kind_of` the action                 | seconds watched                |
| `:f` | `AUTHOR`                             | 1 follows, 0 took it back      |
| `:d` | `ITEM`, `AUTHOR` or `TOPIC`          | 1 dislikes, 0 took it back     |
| `:c` | 1 + recalls; `GONE` when shown since | the ranker's score             |
| `:p` | `ITEM`                               | 1                              |
"""

ANSWERS = b"a"
"""A list of the newest answers, kept of a share of the users to credit impressions (`engine.online.impressions`)."""

RECENT, FOLLOWS, DISLIKES, LEFTOVERS, CITIES, EVENT_IDS = b"r", b"f", b"d", b"c", b"p", b"e"

ITEM: Final = 1
AUTHOR: Final = 2
TOPIC: Final = 3
GONE = 0xFFFFFFFF

CITIES_KEPT = 8

STATE_SUFFIXES = (RECENT, LEFTOVERS, DISLIKES, FOLLOWS, CITIES)
"""What a read fetches of a user besides exposure bits; the first is decoded at once, the others when they are used."""


def user_tag(user: int | str) -> bytes:
    """Return the part of a user's keys that names the user: b"u<id>" of an int64 id, b"k<id>" of a string."""
    return b"u%d" % user if isinstance(user, int) else b"k" + user.encode()


def user_key(tag: bytes) -> int:
    """Return the 64-bit key of the user whom a tag names."""
    return int(tag[1:]) if tag.startswith(b"u") else key_of(tag[1:].decode())


def user_prefix(prefix: str, user: bytes) -> bytes:
    """Return what stands before the suffix in all keys of a user; `user` from `user_tag`."""
    return b"%s:{%s}" % (prefix.encode(), user)


def slice_suffix(number: int) -> bytes:
    """Return the suffix of the exposure bits of one time slice."""
    return b"x:%d" % number


def kind_of(name: str) -> int:
    """Return the number that stands for a kind of action: the CRC-32 of its name; 1 for the one name in 2^32 of 0."""
    return zlib.crc32(name.encode()) or 1


def event_hash(event: bytes) -> bytes:
    """Return the 8 bytes by which an event id is remembered; zeros stand for no id."""
    return blake2b(event, digest_size=8).digest() if event else bytes(8)
