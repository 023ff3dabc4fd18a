"""Which items are in which cluster, best first: lists of the build, mapped, and over them what was assigned since.

An item has a *slot*: its position in the lists of the build, end to end, or its row where it was published since. The
list of a cluster is the build's until one of its items changes; then it is copied into a *block* of one growing array,
with room to spare, and changed there in place: an item is inserted where it belongs, what leaves closes its gap. A list
of more than 256 items keeps what comes in a *delta* behind it, sorted too, of 32 items or the root of its length, and
marks what leaves where it stands; where the delta is full, or half of the list is marked, both are merged into a new
block. So an assignment moves a bounded number of entries, or the root of a list's, and pays for its share of a copy.
What blocks leave behind is collected when it is half of all.

What is not available is in no list; the tables remember where it belongs. So nothing is masked while lists are merged.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.sealed import sealed
from engine.core.types import AnyArray, Float32Array, Int32Array, Int64Array

SPARE = 32
"""Entries that a block has room for at least, besides those that it is made with."""

SHORT = 256
"""A list of so many items is changed in place: that is less work than looking at two places whenever it is read."""

_UNBORN = 1 << 16
"""Items that are published before tables are made larger, at least."""

_ASSIGN, _HIDE, _SHOW = 0, 1, 2


class ClusterLists:
    """The items of every cluster, best first. One thread writes, and no other reads meanwhile.

    Args:
        offsets, rows, places: as `engine.models.cluster_lists.sort_lists` makes them.
        biases: float32[items], in the order of `rows`.
        short: lists of so many items are changed in place.
    """

    def __init__(
        self,
        offsets: Int64Array,
        rows: Int32Array,
        places: Int32Array,
        biases: Float32Array,
        short: int = SHORT,
    ) -> None:
        clusters = offsets.size - 1
        self.clusters = clusters
        self._base = (sealed(offsets), sealed(rows), sealed(biases))
        self._places = sealed(places)
        self.heads = np.full(clusters, -np.inf, np.float32)
        used = np.flatnonzero(np.diff(offsets))
        self.heads[used] = biases[offsets[used]]
        # Per cluster: where its block begins (-1: it has none), entries of the list (0: it is short, and all of it stands
        # in the delta), entries of the delta, room for these, and entries of the list that are marked.
        self._blocks = np.full((clusters, 5), (-1, 0, 0, 0, 0), np.int64)
        # Whether a cluster has a block, once more, where all of it fits into the nearest cache.
        self._touched = np.zeros(clusters, np.bool_)
        # An entry is its slot, ~slot where it is marked, and its bias, 4 bytes each.
        self._entries = np.empty(0, np.int64)
        # Entries of blocks in use, those left behind, and how long a short list is.
        self._used = np.array([0, 0, short], np.int64)
        # Per slot: 0 as the build has it; 2 + k, in cluster k; -2 - k, hidden and belonging there. And the bias. Zeros of
        # the system's take no memory.
        room = rows.size + max(rows.size // 8, _UNBORN)
        self._cluster_of, self._bias_of = np.zeros(room, np.int32), np.zeros(room, np.float32)

    @property
    def items(self) -> int:
        """Items of the build."""
        return int(self._places.size)

    @property
    def state(self) -> tuple[AnyArray, ...]:
        """What kernels read lists from; it holds until the next change."""
        entries = self._entries
        return (*self._base, self._touched, self._blocks, entries.view(np.int32), entries.view(np.float32))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of a worker's own: `blocks`, of clusters that changed; `slots`, of items that changed; `clusters`, of all
        clusters."""
        return {
            "blocks": 8 * int(self._used[0]),
            "slots": 8 * int(np.count_nonzero(self._cluster_of)),
            "clusters": self.heads.nbytes + self._blocks.nbytes + self._touched.nbytes,
        }

    def slots(self, rows: Int32Array) -> Int32Array:
        """int32[n]: the slots of rows."""
        known = rows < self._places.size
        return np.where(
            known, self._places[np.where(known, rows, 0)] if self._places.size else 0, rows
        ).astype(np.int32)

    def rows_of(self, slots: Int32Array) -> Int32Array:
        """int32[n]: the rows of slots."""
        rows = self._base[1]
        known = slots < rows.size
        if known.all():
            return rows[slots]
        return np.where(known, rows[np.where(known, slots, 0)] if rows.size else 0, slots).astype(np.int32)

    def assign(self, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        """Put items into clusters, in order: of an item that comes twice the last counts.

        Args:
            rows: int32[n], 0 or more; those past the build's are items published since.
            clusters: int32[n], -1 for none.
            biases: float32[n].

        Raises:
            ValueError: a cluster that there is not, a row below 0, or a bias that is not finite. Nothing is assigned.
        """
        if rows.size == 0:
            return
        if clusters.min() < -1 or clusters.max() >= self.clusters:
            wrong = clusters[(clusters < -1) | (clusters >= self.clusters)]
            raise ValueError(f"cluster {int(wrong[0])} is none of {self.clusters:,}")
        if not np.isfinite(biases).all():
            raise ValueError("a bias is not finite")
        self._change(_ASSIGN, rows, clusters, biases)

    def hide(self, rows: Int32Array) -> None:
        """Take items out of the lists, int32[n]; where they belong can still be changed."""
        self._change(_HIDE, rows, np.empty(0, np.int32), np.empty(0, np.float32))

    def show(self, rows: Int32Array) -> None:
        """Put items, int32[n], back into the lists that they belong to; one that is not hidden stays as it is."""
        self._change(_SHOW, rows, np.empty(0, np.int32), np.empty(0, np.float32))

    def _change(self, what: int, rows: Int32Array, clusters: Int32Array, biases: Float32Array) -> None:
        if rows.size == 0:
            return
        if rows.min() < 0:
            raise ValueError(f"row {int(rows.min())} is no item")
        self._make_room(int(rows.max()) + 1)
        done = 0
        while True:
            arguments = (
                what, sealed(rows), sealed(clusters), sealed(biases), done, self._places, *self.state, self._used,
                self._cluster_of, self._bias_of, self.heads,
            )  # fmt: skip
            done, needed = _assign(*arguments)
            if done == rows.size:
                return
            self._collect(needed)

    def of(self, row: int) -> tuple[int, float]:
        """Return the cluster that an item belongs to (-1: none), available or not, and its bias."""
        slot = int(self.slots(np.array([row], np.int32))[0])
        if slot < self._cluster_of.size and self._cluster_of[slot]:
            return abs(int(self._cluster_of[slot])) - 2, float(self._bias_of[slot])
        offsets, _, biases = self._base
        if slot >= offsets[-1]:
            return -1, 0.0
        return int(np.searchsorted(offsets, slot, "right")) - 1, float(biases[slot])

    def take(self, cluster: int, most: int | None = None) -> Int32Array:
        """int32[m]: the rows of a cluster that are available, best first."""
        offsets, rows, _ = self._base
        if not self._touched[cluster]:
            return rows[offsets[cluster] : offsets[cluster + 1]][:most].copy()
        slots = np.empty(int(self._blocks[cluster, 1:3].sum()), np.int32)
        arguments = (cluster, *self.state, slots)
        return self.rows_of(slots[: _take(*arguments)][:most])

    def _make_room(self, rows: int) -> None:
        if rows > self._cluster_of.size:
            room = max(rows, self._cluster_of.size * 5 // 4)
            clusters, biases = np.zeros(room, np.int32), np.zeros(room, np.float32)
            clusters[: self._cluster_of.size] = self._cluster_of
            biases[: self._bias_of.size] = self._bias_of
            self._cluster_of, self._bias_of = clusters, biases

    def _collect(self, needed: int) -> None:
        """Make room for `needed` entries: without what was left behind where that is half, or in a larger array."""
        used, wasted, _ = self._used.tolist()
        live = used - wasted if 2 * wasted > used else used
        entries = np.empty(max(live + needed, live * 5 // 4, 4096), np.int64)
        if live == used:
            entries[:used] = self._entries[:used]
        else:
            _move(self._blocks, self._entries, entries)
            self._used[:2] = live, 0
        self._entries = entries


@njit(nogil=True, cache=True)
def _room_of(entries, short):  # type: ignore[no-untyped-def]
    """Return the room that a list is given besides what it has."""
    return max(SPARE, entries // 2 if entries <= short else int(np.sqrt(entries)))


@njit(nogil=True, cache=True, inline="always")
def row_at(slot, rows):  # type: ignore[no-untyped-def]
    """Return the row of a slot."""
    return rows[slot] if slot < rows.size else np.int32(slot)


@njit(nogil=True, cache=True, inline="always")
def next_entry(at, beside, block, ints, floats, rows):  # type: ignore[no-untyped-def]
    """Return the next entry of a block that is not marked, from two places on.

    Args:
        at, beside: places in its list and in its delta.
        block: int64[5].
        ints, floats: the entries.
        rows: of slots.

    Returns:
        slot (-1: there is none), bias, the two places, and whether the entry stands in the list: to go on, add 1 to the
        place that it stands at.
    """
    begin, listed, added = block[0], block[1], block[2]
    while at < listed and ints[2 * (begin + at)] < 0:
        at += 1
    slot = np.int64(-1)
    bias = np.float32(0)
    if at < listed:
        slot = np.int64(ints[2 * (begin + at)])
        bias = floats[2 * (begin + at) + 1]
    from_list = True
    if beside < added:
        other, value = (
            np.int64(ints[2 * (begin + listed + beside)]),
            floats[2 * (begin + listed + beside) + 1],
        )
        if slot < 0 or value > bias or (value == bias and row_at(other, rows) < row_at(slot, rows)):
            slot, bias, from_list = other, value, False
    return slot, bias, at, beside, from_list


@njit(nogil=True, cache=True)
def _take(cluster, offsets, rows, base_biases, touched, blocks, ints, floats, out):  # type: ignore[no-untyped-def]
    at = beside = np.int64(0)
    count = 0
    while True:
        slot, _, at, beside, from_list = next_entry(at, beside, blocks[cluster], ints, floats, rows)
        if slot < 0:
            return count
        out[count] = slot
        count += 1
        if from_list:
            at += 1
        else:
            beside += 1


@njit(nogil=True, cache=True)
def _length(k, offsets, touched, blocks):  # type: ignore[no-untyped-def]
    """Return entries of a cluster, marked ones included."""
    return blocks[k, 1] + blocks[k, 2] if touched[k] else offsets[k + 1] - offsets[k]


@njit(nogil=True, cache=True)
def _make_block(k, offsets, rows, base_biases, touched, blocks, ints, floats, used, heads):  # type: ignore[no-untyped-def]
    """Write a cluster's list, what is in its delta merged into it, into a new block with an empty delta."""
    begin = used[0]
    count = 0
    if touched[k]:
        at = beside = np.int64(0)
        while True:
            slot, bias, at, beside, from_list = next_entry(at, beside, blocks[k], ints, floats, rows)
            if slot < 0:
                break
            ints[2 * (begin + count)] = slot
            floats[2 * (begin + count) + 1] = bias
            count += 1
            if from_list:
                at += 1
            else:
                beside += 1
        used[1] += blocks[k, 1] + blocks[k, 3]
    else:
        for slot in range(offsets[k], offsets[k + 1]):
            ints[2 * (begin + count)] = slot
            floats[2 * (begin + count) + 1] = base_biases[slot]
            count += 1
        touched[k] = True
    room = _room_of(count, used[2])
    used[0] += count + room
    if count <= used[2]:
        blocks[k, 1], blocks[k, 2], blocks[k, 3] = 0, count, count + room
    else:
        blocks[k, 1], blocks[k, 2], blocks[k, 3] = count, 0, room
    blocks[k, 0], blocks[k, 4] = begin, 0
    heads[k] = floats[2 * begin + 1] if count else np.float32(-np.inf)


@njit(nogil=True, cache=True)
def _find(row, bias, begin, end, ints, floats, rows):  # type: ignore[no-untyped-def]
    """Return where the entry of a row and a bias stands, or would, in entries that are sorted, marked ones too."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        other = np.int64(ints[2 * middle])
        other = ~other if other < 0 else other
        value = floats[2 * middle + 1]
        if value > bias or (value == bias and row_at(other, rows) < row):
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def _remove(slot, row, bias, block, ints, floats, rows):  # type: ignore[no-untyped-def]
    """Take an entry out of a block: mark it in the list, or close its gap in the delta."""
    behind = block[0] + block[1]
    at = _find(row, bias, block[0], behind, ints, floats, rows)
    if at < behind and ints[2 * at] == slot:
        ints[2 * at] = ~slot
        block[4] += 1
        return
    end = behind + block[2]
    for here in range(_find(row, bias, behind, end, ints, floats, rows), end - 1):
        ints[2 * here] = ints[2 * here + 2]
        floats[2 * here + 1] = floats[2 * here + 3]
    block[2] -= 1


@njit(nogil=True, cache=True)
def _insert(slot, row, bias, block, ints, floats, rows):  # type: ignore[no-untyped-def]
    """Put an entry into a delta that has room."""
    first = block[0] + block[1]
    at = first + block[2]
    while at > first and (
        floats[2 * at - 1] < bias or (floats[2 * at - 1] == bias and row_at(ints[2 * at - 2], rows) > row)
    ):
        ints[2 * at] = ints[2 * at - 2]
        floats[2 * at + 1] = floats[2 * at - 1]
        at -= 1
    ints[2 * at] = slot
    floats[2 * at + 1] = bias
    block[2] += 1


@njit(nogil=True, cache=True)
def _list_of(slot, offsets):  # type: ignore[no-untyped-def]
    """Return the cluster that the build put a slot into."""
    low, high = np.int64(0), np.int64(offsets.size - 1)
    while high - low > 1:
        middle = (low + high) // 2
        if offsets[middle] <= slot:
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def _assign(  # type: ignore[no-untyped-def]
    what, given_rows, given_clusters, given_biases, first, places, offsets, rows, base_biases, touched, blocks, ints,
    floats, used, cluster_of, bias_of, heads,
):  # fmt: skip
    """Assign, hide or show from the first on; return how many are done, and the room that the next needs if not all."""
    for i in range(first, given_rows.size):
        row = given_rows[i]
        slot = np.int64(places[row]) if row < places.size else np.int64(row)
        belongs, bias_before, hidden = np.int64(-1), np.float32(0), False
        if cluster_of[slot]:
            hidden = cluster_of[slot] < 0
            belongs, bias_before = abs(np.int64(cluster_of[slot])) - 2, bias_of[slot]
        elif slot < offsets[offsets.size - 1]:
            belongs, bias_before = _list_of(slot, offsets), base_biases[slot]
        k, bias = belongs, bias_before
        if what == _ASSIGN:
            k, bias = np.int64(given_clusters[i]), given_biases[i]
            if hidden:
                cluster_of[slot], bias_of[slot] = -2 - k, bias
                continue
            if k == belongs and (k < 0 or bias == bias_before):
                continue
        elif (what == _HIDE) == hidden:
            continue
        before = np.int64(-1) if what == _SHOW else belongs
        after = np.int64(-1) if what == _HIDE else k
        needed = np.int64(0)
        for each in (before, after):
            if each >= 0:
                length = _length(each, offsets, touched, blocks) + 1
                needed += 2 * (length + _room_of(length, used[2]))
        if used[0] + needed > ints.size // 2:
            return i, needed
        cluster_of[slot], bias_of[slot] = -2 - k if what == _HIDE else 2 + k, bias
        if before >= 0:
            if not touched[before]:
                _make_block(before, offsets, rows, base_biases, touched, blocks, ints, floats, used, heads)
            block = blocks[before]
            _remove(slot, row, bias_before, block, ints, floats, rows)
            if block[4] > 8 and 2 * block[4] > block[1]:
                _make_block(before, offsets, rows, base_biases, touched, blocks, ints, floats, used, heads)
            elif heads[before] == bias_before:
                best, value, _, _, _ = next_entry(np.int64(0), np.int64(0), block, ints, floats, rows)
                heads[before] = value if best >= 0 else np.float32(-np.inf)
        if after >= 0:
            if not touched[after] or blocks[after, 2] == blocks[after, 3]:
                _make_block(after, offsets, rows, base_biases, touched, blocks, ints, floats, used, heads)
            _insert(slot, row, bias, blocks[after], ints, floats, rows)
            heads[after] = max(heads[after], bias)
    return given_rows.size, np.int64(0)


@njit(nogil=True, cache=True)
def _move(blocks, entries, out):  # type: ignore[no-untyped-def]
    """Move all blocks to another array, one behind the other."""
    end = 0
    for k in range(blocks.shape[0]):
        begin, filled = blocks[k, 0], blocks[k, 1] + blocks[k, 2]
        if begin >= 0:
            out[end : end + filled] = entries[begin : begin + filled]
            blocks[k, 0] = end
            end += blocks[k, 1] + blocks[k, 3]


def lists_reference(assigned: dict[int, tuple[int, float]], clusters: int) -> list[list[int]]:
    """The plain twin: per cluster the rows, best first, of items (row: cluster, bias), from scratch."""
    lists: list[list[int]] = [[] for _ in range(clusters)]
    for row in sorted(assigned, key=lambda row: (-assigned[row][1], row)):
        if assigned[row][0] >= 0:
            lists[assigned[row][0]].append(row)
    return lists
