"""What users were shown, as bits: one growing Bloom filter per user and time slice.

The bit format is specified in docs/exposure-format.md, for writers in other languages. A slice's filter is a chain of
links, so that the rate of false positives holds whatever the user's appetite: scalable Bloom filters (Almeida, Baquero,
Preguica and Hutchison, 2007), tightened by more bits per exposure in the further links instead of more hashes. The
probes are those of enhanced double hashing (Dillinger and Manolios, 2004) with a quadratic term, over the two halves of
splitmix64 (Steele, Lea and Flood, 2014). `add` and `contains` are the reference in plain Python; `ExposureBits` checks
the candidates of a batch in a kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
from numba import njit

from engine.core.candidates import FanOut
from engine.core.errors import StateUnavailableError
from engine.core.hashing import FIRST_MIX, GOLDEN, SECOND_MIX, scrambled
from engine.core.types import BoolArray, Int64Array, UInt8Array, UInt64Array

VERSION = 1
HEADER = struct.Struct("<BBHIII")
"""Version, hashes, bits per planned exposure, planned exposures, exposures in the newest link, links."""

HEADER_BYTES = 16
MAX_HASHES = 16
LARGEST_LINK = 1 << 20
"""Bits; no link is longer."""

QUADRATIC = 0x9E3779B9
LOW = 0xFFFFFFFF
WORD = 0xFFFFFFFFFFFFFFFF

LANES = 8
"""Links that the kernel asks at once."""

_EASY = 6
"""Probes that the kernel makes at once, where there are so many."""

_LINK_ROOM = 20
"""Links that a value below 1 MiB has at most, and a few: their lengths double, from 64 bits."""


@dataclass(frozen=True, slots=True)
class ExposureLayout:
    """The shape of a slice's filter.

    Attributes:
        planned: exposures that the first link is made for.
        bits: bits per planned exposure.
        hashes: bits set per exposure, at most 16.
    """

    planned: int
    bits: int
    hashes: int

    def __post_init__(self) -> None:
        if not (self.planned >= 1 and 1 <= self.bits <= 0xFFFF and self.planned * self.bits <= LARGEST_LINK):
            raise ValueError(f"planned * bits must be between 1 and {LARGEST_LINK}")
        if not 1 <= self.hashes <= MAX_HASHES:
            raise ValueError(f"hashes must be between 1 and {MAX_HASHES}")

    def link_bits(self, link: int) -> int:
        """Return the length of a link in bits, a multiple of 64."""
        first = -(-self.planned * self.bits // 64) * 64
        return first if link == 0 else min(first << min(link, 32), max(first, LARGEST_LINK))

    def capacity(self, link: int) -> int:
        """Return how many exposures a link takes before the next is opened."""
        return self.planned if link == 0 else max(1, self.link_bits(link) // (2 * self.bits))

    def link_starts(self, links: int) -> list[int]:
        """Return the byte of the value at which each of `links` links begins, and the end of the last."""
        starts = [HEADER_BYTES]
        for link in range(links):
            starts.append(starts[-1] + self.link_bits(link) // 8)
        return starts


class SliceHeader(NamedTuple):
    """The header of a slice value: its shape, the exposures in its newest link, and how many links it has."""

    layout: ExposureLayout
    newest: int
    links: int

    @property
    def shown(self) -> int:
        """Exposures in the slice."""
        return self.newest + sum(self.layout.capacity(link) for link in range(self.links - 1))


def parse_header(value: bytes) -> SliceHeader:
    """Read and check the header of a slice value; the reference for the kernel.

    Raises:
        ValueError: the version is not known, or shape and length make no sense.
    """
    if len(value) < HEADER_BYTES:
        raise ValueError("shorter than its header")
    version, hashes, bits, planned, count, links = HEADER.unpack_from(value)
    if version != VERSION:
        raise ValueError(f"version {version} is not known")
    layout = ExposureLayout(planned, bits, hashes)
    if links < 1:
        raise ValueError("has no links")
    if links > _LINK_ROOM + (len(value) >> 17):  # before they are walked, so that a wild number costs nothing
        raise ValueError("has more links than fit its length")
    # A link is opened when the one before is full, so the value reaches into all but the last.
    starts = layout.link_starts(links)
    if len(value) > starts[-1] or (links > 1 and len(value) <= starts[-3]):
        raise ValueError("its length does not fit its links")
    return SliceHeader(layout, count, links)


def splitmix64(key: int) -> int:
    """Return the 64-bit hash of a key."""
    z = (key + GOLDEN) & WORD
    z = ((z ^ (z >> 30)) * FIRST_MIX) & WORD
    z = ((z ^ (z >> 27)) * SECOND_MIX) & WORD
    return z ^ (z >> 31)


def probes(key: int, hashes: int, bits: int) -> list[int]:
    """Return the bits that a key sets in a link of `bits` bits, in order; two may be the same."""
    z = splitmix64(key)
    a, b = z & LOW, z >> 32
    return [(((a + i * b + i * i * QUADRATIC) & LOW) * bits) >> 32 for i in range(hashes)]


def add(value: bytes | None, keys: Iterable[int], layout: ExposureLayout) -> bytes:
    """Return a slice value with exposures added: the reference for writers.

    Args:
        value: what is there; None or b"" for nothing.
        keys: keys of items.
        layout: of a slice that begins; one that is there keeps its own.

    Returns:
        The new value, without zero bytes at its end, as SETBIT on the probes alone would leave it.

    Raises:
        ValueError: `value` is damaged.
    """
    layout, count, links = parse_header(value) if value else SliceHeader(layout, 0, 1)
    starts = layout.link_starts(links)
    content = bytearray((value or b"").ljust(starts[-1], b"\0"))
    for key in keys:
        start, bits = starts[links - 1], layout.link_bits(links - 1)
        at = probes(key, layout.hashes, bits)
        if all(content[start + (p >> 3)] & (0x80 >> (p & 7)) for p in at):
            continue
        if count >= layout.capacity(links - 1):
            links, count = links + 1, 0
            starts = layout.link_starts(links)
            content.extend(bytes(starts[-1] - len(content)))
            start, bits = starts[links - 1], layout.link_bits(links - 1)
            at = probes(key, layout.hashes, bits)
        for p in at:
            content[start + (p >> 3)] |= 0x80 >> (p & 7)
        count += 1
    header = HEADER.pack(VERSION, layout.hashes, layout.bits, layout.planned, count, links)
    return header + bytes(content[HEADER_BYTES:]).rstrip(b"\0")


def contains(value: bytes | None, keys: Iterable[int]) -> BoolArray:
    """Return bool[n]: whether each key is in a slice value; the reference for readers.

    Raises:
        ValueError: `value` is damaged.
    """
    wanted = list(keys)
    if not value:
        return np.zeros(len(wanted), np.bool_)
    layout, _, links = parse_header(value)
    starts = layout.link_starts(links)
    content = value.ljust(starts[-1], b"\0")
    return np.array(
        [
            any(
                all(
                    content[starts[link] + (p >> 3)] & (0x80 >> (p & 7))
                    for p in probes(key, layout.hashes, layout.link_bits(link))
                )
                for link in range(links)
            )
            for key in wanted
        ],
        np.bool_,
    )


class _Unpacked(NamedTuple):
    """The links of a batch, ready for the kernel: query q owns the groups [offsets[q], offsets[q + 1]).

    A group is up to 8 links of one user that have one length and number of hashes, so that a key falls on the same
    bit of each: their bytes stand side by side in 64-bit words, and one probe reads them all.

    Attributes:
        words: uint64[w]; byte i of the link in a group's lane l is byte l, from the low end, of the group's word i.
        groups: int64[..., 8]: first word, length in bits, hashes, links. The other four columns are of links: group,
            lane, first byte in the content, bytes there; group -1 behind the last one.
        table: int64[3, n + 1]: offsets; exposures per query; 1 per query that has a damaged value, and no groups.
        damaged: queries that have.
    """

    words: UInt64Array
    groups: Int64Array
    table: Int64Array
    damaged: int


class ExposureBits:
    """The slice values of a batch's users; implements `engine.core.live.Exposure`."""

    def __init__(self, content: UInt8Array, spans: Int64Array, offsets: Int64Array) -> None:
        """Take values where they lie.

        Args:
            content: uint8[b], which holds the values.
            spans: int64[v, 2], the first byte of each, and how many bytes it has.
            offsets: int64[n + 1]; query q owns the values [offsets[q], offsets[q + 1]).
        """
        self._content = content
        self._spans = spans
        self._offsets = offsets
        self._unpacked: _Unpacked | None = None

    @classmethod
    def of(cls, values: Sequence[Sequence[bytes | None]]) -> Self:
        """Take the slice values of each user, in any order; None for one that is not there."""
        there: list[bytes] = []
        offsets = [0]
        for slices in values:
            there.extend(filter(None, slices))
            offsets.append(len(there))
        sizes = list(map(len, there))
        spans = np.array([list(accumulate(sizes, initial=0))[:-1], sizes], np.int64).T.copy()
        content = np.frombuffer(b"".join(there), np.uint8)
        return cls(content, spans, np.array(offsets, np.int64))

    def seen(self, candidates: FanOut, keys: Int64Array) -> BoolArray:
        """Return bool[m]: True where the candidate's user was shown it, or where the bits say so by chance.

        Args:
            candidates: the fan-out.
            keys: int64[items], the key of each row.

        Raises:
            StateUnavailableError: a value of one of the users is damaged or of a version that is not known.
        """
        unpacked = self._unpack()
        if unpacked.damaged:
            users = f"{unpacked.damaged} of {self._offsets.size - 1} users"
            raise StateUnavailableError(f"the exposure bits of {users} are damaged, or of a newer version")
        return _found(unpacked, candidates, keys)

    def shown(self) -> Int64Array:
        """int64[n]: how many exposures each user's values hold; 0 for one whose values are damaged."""
        return self._unpack().table[1, :-1]

    def alone(self, q: int) -> ExposureBits:
        """Return query q's part as that of a batch of one, without copying."""
        first, last = int(self._offsets[q]), int(self._offsets[q + 1])
        return ExposureBits(self._content, self._spans[first:last], np.array([0, last - first], np.int64))

    def measure(self, seed: int) -> tuple[int, int, int, int]:
        """Return (probes, positives, bits set, bits): see `Exposure.measure`."""
        unpacked = self._unpack()
        offsets = unpacked.table[0]
        candidates, keys = never_shown(np.diff(offsets) > 0, seed)
        positives = int(_found(unpacked, candidates, keys).sum())
        bits_set = int(np.unpackbits(unpacked.words.view(np.uint8)).sum())
        groups = unpacked.groups[: offsets[-1]]
        return candidates.rows.size, positives, bits_set, int(groups[:, 1] @ groups[:, 3])

    def _unpack(self) -> _Unpacked:
        if self._unpacked is None:
            queries = self._offsets.size - 1
            room = _LINK_ROOM * self._spans.shape[0] + (self._content.size >> 17)
            groups = np.empty((room, 8), np.int64)
            table = np.zeros((3, queries + 1), np.int64)
            size, damaged = _survey(self._content, self._spans, self._offsets, groups, table)
            words = np.zeros(size, np.uint64)
            if size:
                _interleave(self._content, groups, words)
            self._unpacked = _Unpacked(words, groups, table, damaged)
        return self._unpacked


MEASURED = 256
"""Keys per user that `measure` asks for."""


def never_shown(users: BoolArray, seed: int) -> tuple[FanOut, Int64Array]:
    """Return candidates that nobody was ever shown, for measuring false positives.

    Args:
        users: bool[n], who is asked for them.
        seed: other seeds, other candidates.

    Returns:
        The candidates, 256 per user, and int64[256], the key of each of their rows: 63 random bits; that one of them
        was ever an item's key has no chance worth naming.
    """
    keys = np.random.default_rng(seed).integers(0, 1 << 63, MEASURED, np.int64)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(users * MEASURED)))
    rows = np.tile(np.arange(MEASURED, dtype=np.int32), np.count_nonzero(users))
    return FanOut(rows, offsets, users.size), keys


def _found(unpacked: _Unpacked, candidates: FanOut, keys: Int64Array) -> BoolArray:
    found = np.zeros(candidates.rows.size, np.bool_)
    if unpacked.words.size:
        hashes = np.empty(candidates.rows.size, np.uint64)
        _seen(
            candidates.rows,
            candidates.offsets,
            candidates.queries,
            keys,
            unpacked.words,
            unpacked.groups,
            unpacked.table,
            hashes,
            found,
        )
    return found


@njit(nogil=True, cache=True, inline="always")
def _little_endian(content, at, width):  # type: ignore[no-untyped-def]
    number = np.int64(0)
    for b in range(width):
        number |= np.int64(content[at + b]) << (8 * b)
    return number


@njit(nogil=True, cache=True)
def _survey(content, spans, values, groups, table):  # type: ignore[no-untyped-def]
    """Check every header as `parse_header` does, put links in groups, and fill `groups` and `table` of `_Unpacked`.

    Returns how many words are needed, and how many queries have a damaged value.
    """
    offsets, shown, damaged = table[0], table[1], table[2]
    links = groups[:, 4:]
    words = 0
    link = 0
    for q in range(values.size - 1):
        first_group, first_link, first_word = offsets[q], link, words
        last_group = first_group
        for v in range(values[q], values[q + 1]):
            at, size = spans[v, 0], spans[v, 1]
            if size < HEADER_BYTES or content[at] != VERSION:
                damaged[q] = 1
                break
            hashes = np.int64(content[at + 1])
            bits = _little_endian(content, at + 2, 2)
            planned = _little_endian(content, at + 4, 4)
            count = _little_endian(content, at + 8, 4)
            chain = _little_endian(content, at + 12, 4)
            if not (
                1 <= hashes <= MAX_HASHES
                and 1 <= planned * bits <= LARGEST_LINK
                and 1 <= chain <= _LINK_ROOM + (size >> 17)
            ):
                damaged[q] = 1
                break
            first_bits = (planned * bits + 63) // 64 * 64
            end, before = HEADER_BYTES, 0  # of the last link, and the start of the last but one
            for j in range(chain):
                length = first_bits if j == 0 else min(first_bits << j, max(first_bits, LARGEST_LINK))
                if j == chain - 2:
                    before = end
                if j == chain - 1:
                    shown[q] += count
                else:
                    shown[q] += planned if j == 0 else max(1, length // (2 * bits))
                group = first_group
                while group < last_group and not (
                    groups[group, 1] == length and groups[group, 2] == hashes and groups[group, 3] < LANES
                ):
                    group += 1
                if group == last_group:
                    groups[group, 0], groups[group, 1], groups[group, 2] = words, length, hashes
                    groups[group, 3] = 0
                    words += length // 8
                    last_group += 1
                links[link, 0], links[link, 1] = group, groups[group, 3]
                links[link, 2], links[link, 3] = at + end, max(0, min(length // 8, size - end))
                groups[group, 3] += 1
                link += 1
                end += length // 8
            if size > end or size <= before:
                damaged[q] = 1
                break
        if damaged[q]:
            last_group, link, words, shown[q] = first_group, first_link, first_word, 0
        offsets[q + 1] = last_group
    if link < links.shape[0]:
        links[link, 0] = -1
    return words, damaged.sum()


@njit(nogil=True, cache=True)
def _interleave(content, groups, words):  # type: ignore[no-untyped-def]
    """Put the bytes of each link into its lane of its group's words; words are zero before."""
    links = groups[:, 4:]
    for link in range(links.shape[0]):
        group = links[link, 0]
        if group < 0:
            break
        shift = np.uint64(8 * links[link, 1])
        begin, size = links[link, 2], links[link, 3]
        source = content[begin : begin + size]
        target = words[groups[group, 0] : groups[group, 0] + size]
        for i in range(size):
            target[i] |= np.uint64(source[i]) << shift


@njit(nogil=True, cache=True, inline="always")
def _word(words, x, length):  # type: ignore[no-untyped-def]
    """Return the word that a 32-bit number falls on, shifted so that bit 0x80 of each byte is its lane's bit."""
    p = (x * length) >> np.uint64(32)
    return words[p >> np.uint64(3)] << (p & np.uint64(7))


@njit(nogil=True, cache=True)
def _seen(rows, segments, queries, keys, words, groups, table, hashed, found):  # type: ignore[no-untyped-def]
    offsets = table[0]
    low, quadratic = np.uint64(LOW), np.uint64(QUADRATIC)
    channels = (segments.size - 1) // queries
    for q in range(queries):
        if offsets[q] == offsets[q + 1]:
            continue
        for c in range(channels):
            s = c * queries + q
            # All hashes first: nothing in this loop depends on what is read, so the reads of the keys, which lie all
            # over the catalogue, overlap.
            for p in range(segments[s], segments[s + 1]):
                hashed[p] = scrambled(np.uint64(keys[rows[p]]) + np.uint64(GOLDEN))
            for g in range(offsets[q], offsets[q + 1]):
                length, probes_ = np.uint64(groups[g, 1]), np.uint64(groups[g, 2])
                mine = words[groups[g, 0] : groups[g, 0] + groups[g, 1] // 8]
                easy = probes_ >= _EASY
                for p in range(segments[s], segments[s + 1]):
                    a, b = hashed[p] & low, hashed[p] >> np.uint64(32)
                    hit = np.uint64(0x8080808080808080)
                    i = np.uint64(0)
                    if easy:
                        # The first probes without a branch. What passes them is rare, so the processor guesses the
                        # branch behind them right.
                        hit &= (
                            _word(mine, a, length)
                            & _word(mine, (a + b + quadratic) & low, length)
                            & _word(mine, (a + np.uint64(2) * b + np.uint64(4) * quadratic) & low, length)
                            & _word(mine, (a + np.uint64(3) * b + np.uint64(9) * quadratic) & low, length)
                            & _word(mine, (a + np.uint64(4) * b + np.uint64(16) * quadratic) & low, length)
                            & _word(mine, (a + np.uint64(5) * b + np.uint64(25) * quadratic) & low, length)
                        )
                        i = np.uint64(_EASY)
                    while hit != 0 and i < probes_:
                        hit &= _word(mine, (a + i * b + i * i * quadratic) & low, length)
                        i += np.uint64(1)
                    if hit != 0:
                        found[p] = True
