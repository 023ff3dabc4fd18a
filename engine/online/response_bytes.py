"""The wire bytes of RecallResponse, written by one compiled pass over a batch's columns.

A Python message object per candidate, per proposal and per report would cost more than everything before it. What is
written here is plain protobuf encoding (https://protobuf.dev/programming-guides/encoding): a parser sees no difference,
and the tests hold it to protobuf's own encoder. Field numbers are those of recall.proto.

A length stands in front of what it measures, so everything is written from its end to its beginning: what is inside a
message is there when its length is wanted, and nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
from numba import njit

from engine.core.merge import Merged
from engine.core.types import AnyArray, Float32Array, Float64Array, Int32Array, Int64Array, UInt8Array

NO_TRIGGER, TRIGGER_ID, TRIGGER_KEY = 0, 1, 2

NO_KEYS = np.zeros((0, 0), np.uint8)
"""The keys of `Ids` that are numbers."""

_NO_NUMBERS = np.zeros(0, np.int64)

_VARINT, _BYTES, _FIXED = 0, 2, 5


def _tag(number: int, kind: int) -> int:
    return (number << 3) | kind


# RecallResponse
_REQUEST_ID, _CANDIDATES, _CHANNELS, _FILTERS, _UNKNOWN, _DEBUG, _DEGRADED = (
    _tag(1, _BYTES), _tag(2, _BYTES), _tag(3, _BYTES), _tag(4, _BYTES), _tag(7, _BYTES), _tag(8, _BYTES),
    _tag(10, _VARINT),
)  # fmt: skip
# Candidate
_ITEM_ID, _ITEM_KEY, _SCORE, _PROPOSALS = _tag(1, _VARINT), _tag(2, _BYTES), _tag(3, _FIXED), _tag(4, _BYTES)
# Proposal
_RANK, _RAW_SCORE, _TRIGGER_ID, _TRIGGER_KEY = (
    _tag(2, _VARINT),
    _tag(3, _FIXED),
    _tag(4, _VARINT),
    _tag(5, _BYTES),
)
# ChannelReport
_MESSAGE = _tag(8, _BYTES)

_CANDIDATE_ROOM = 24
"""Bytes of a candidate besides its key and its proposals: tag and length, item id, score."""
_PROPOSAL_ROOM = 36
"""Bytes of a proposal besides its channel and its trigger's key."""
_REPORT_ROOM = 48
"""Bytes of a report besides its name and message."""
_ANSWER_ROOM = 64
"""Bytes of what an answer has once: unknown ids, the step of degrading, tags and lengths of request id and debug."""


# Tuples: of a batch of one, the fields of a frozen dataclass cost as much to set as many a kernel to run.


class Ids(NamedTuple):
    """External ids of candidates or triggers: numbers, or keys where the width of `keys` is not 0.

    Attributes:
        numbers: int64[n]; what it says where there is a key instead has no meaning.
        keys: uint8[n, width], UTF-8 ended by zeros.
    """

    numbers: Int64Array
    keys: UInt8Array

    @classmethod
    def of(cls, encoded: AnyArray) -> Self:
        """Take what `IdIndex.encoded` returns."""
        if encoded.ndim == 2:
            return cls(_NO_NUMBERS, encoded)
        return cls(encoded, NO_KEYS)


class Texts(NamedTuple):
    """Byte strings end to end; string i owns [offsets[i], offsets[i + 1]).

    Attributes:
        data: uint8[bytes].
        offsets: int64[n + 1].
        longest: bytes of the longest.
    """

    data: UInt8Array
    offsets: Int64Array
    longest: int

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Self:
        """Put strings end to end."""
        sizes = [len(text) for text in texts]
        offsets = np.array(list(accumulate(sizes, initial=0)), np.int64)
        return cls(np.frombuffer(bytearray().join(texts), np.uint8), offsets, max(sizes, default=0))


NO_TEXTS = Texts.of([])


class Reports(NamedTuple):
    """What the answers say about channels and filters, channel c and query q.

    Attributes:
        channels, filters: their names, each as the field 1 that it is in Proposal, ChannelReport and FilterReport.
        kinds: int32[c], trigger kinds.
        status, returned: int32[c, n].
        eligible, kept: int32[at most c, n]; 0 of the channels behind.
        microseconds: float64[c], what each channel took for the whole batch; an answer names its share.
        messages: of channel c and query q at c * n + q; none at all where no channel has one.
        removed, filter_status: int32[f, n].
        unknown: int32[4, n], the fields of UnknownIds in their order.
        degraded: the step of degrading.
    """

    channels: Texts
    filters: Texts
    kinds: Int32Array
    status: Int32Array
    returned: Int32Array
    eligible: Int32Array
    kept: Int32Array
    microseconds: Float64Array
    messages: Texts
    removed: Int32Array
    filter_status: Int32Array
    unknown: Int32Array
    degraded: int


def response_bytes(
    merged: Merged,
    items: Ids,
    scores: Float32Array,
    triggers: Ids,
    trigger_forms: UInt8Array,
    reports: Reports,
    request_ids: Texts,
    debug: Texts,
    tail: UInt8Array,
) -> tuple[UInt8Array, Int64Array]:
    """Write the answer to every query of a batch.

    Args:
        merged: the merged lists, m items and p proposals.
        items: ids of the m items.
        scores: float32[...], raw scores by `proposal_sources`.
        triggers: ids of the p triggers, numbers or keys.
        trigger_forms: uint8[p], NO_TRIGGER, TRIGGER_ID or TRIGGER_KEY.
        reports: of channels and filters.
        request_ids: n, UTF-8.
        debug: n, each answer's DebugInfo, empty where it has none; none at all where no answer has one.
        tail: fields that stand at the end of every answer.

    Returns:
        uint8[bytes], and int64[n + 1]: query q's answer is [offsets[q], offsets[q + 1]).
    """
    queries = merged.offsets.size - 1
    room = merged.rows.size * (_CANDIDATE_ROOM + items.keys.shape[1])
    room += merged.proposal_channels.size * (
        _PROPOSAL_ROOM + reports.channels.longest + triggers.keys.shape[1]
    )
    room += queries * (
        (reports.kinds.size + len(reports.removed)) * _REPORT_ROOM
        + reports.channels.data.size + reports.filters.data.size + tail.size + _ANSWER_ROOM
    )  # fmt: skip
    room += reports.messages.data.size + request_ids.data.size + debug.data.size
    out = np.empty(room, np.uint8)
    offsets = np.zeros(queries + 1, np.int64)
    begin = _write_all(
        out, offsets, merged.offsets, merged.scores.view(np.uint32), merged.proposal_offsets,
        merged.proposal_channels, merged.proposal_ranks, merged.proposal_sources, scores.view(np.uint32), items.numbers,
        items.keys, triggers.numbers, triggers.keys, trigger_forms, reports.channels.data, reports.channels.offsets,
        reports.filters.data, reports.filters.offsets, reports.kinds, reports.status, reports.returned,
        reports.eligible, reports.kept, reports.microseconds, reports.messages.data, reports.messages.offsets,
        reports.removed, reports.filter_status, reports.unknown, reports.degraded,
        request_ids.data, request_ids.offsets, debug.data, debug.offsets, tail,
    )  # fmt: skip
    return out[begin:], offsets


@njit(nogil=True, cache=True)
def _write_all(  # type: ignore[no-untyped-def]
    out, offsets, item_offsets, scores, proposal_offsets, channels, ranks, sources, raw_scores, item_numbers, item_keys,
    trigger_numbers, trigger_keys, trigger_forms, names, name_offsets, filter_names, filter_offsets, kinds, status,
    returned, eligible, kept, microseconds, messages, message_offsets, removed, filter_status, unknown, degraded,
    request_ids, request_offsets, debug, debug_offsets, tail,
):  # fmt: skip
    queries = item_offsets.size - 1
    at = out.size
    for q in range(queries - 1, -1, -1):
        offsets[q + 1] = at
        at = _text(out, at, tail, 0, tail.size)
        at = _number(out, at, _DEGRADED, degraded)
        end = at
        for field in range(unknown.shape[0] - 1, -1, -1):
            at = _number(out, at, (field + 1) << 3, unknown[field, q])
        if at < end:
            at = _message(out, at, _UNKNOWN, end)
        for f in range(removed.shape[0] - 1, -1, -1):
            end = at
            at = _number(out, at, 3 << 3, filter_status[f, q])
            at = _number(out, at, 2 << 3, removed[f, q])
            at = _text(out, at, filter_names, filter_offsets[f], filter_offsets[f + 1])
            at = _message(out, at, _FILTERS, end)
        for c in range(kinds.size - 1, -1, -1):
            end = at
            if message_offsets.size > 1:
                m = c * queries + q
                if message_offsets[m + 1] > message_offsets[m]:
                    at = _text(out, at, messages, message_offsets[m], message_offsets[m + 1])
                    at = _message(out, at, _MESSAGE, end)
            at = _number(out, at, 7 << 3, np.int64(microseconds[c] / queries))
            if c < kept.shape[0]:
                at = _number(out, at, 6 << 3, kept[c, q])
                at = _number(out, at, 5 << 3, eligible[c, q])
            at = _number(out, at, 4 << 3, returned[c, q])
            at = _number(out, at, 3 << 3, kinds[c])
            at = _number(out, at, 2 << 3, status[c, q])
            at = _text(out, at, names, name_offsets[c], name_offsets[c + 1])
            at = _message(out, at, _CHANNELS, end)
        for i in range(item_offsets[q + 1] - 1, item_offsets[q] - 1, -1):
            candidate_end = at
            for p in range(proposal_offsets[i + 1] - 1, proposal_offsets[i] - 1, -1):
                end = at
                if trigger_forms[p] == TRIGGER_ID:
                    at = _varint(out, at, trigger_numbers[p])
                    at -= 1
                    out[np.uint64(at)] = _TRIGGER_ID
                elif trigger_forms[p] == TRIGGER_KEY:
                    at = _key(out, at, _TRIGGER_KEY, trigger_keys, p)
                at = _fixed(out, at, _RAW_SCORE, raw_scores[sources[p]])
                at = _number(out, at, _RANK, ranks[p])
                c = channels[p]
                at = _text(out, at, names, name_offsets[c], name_offsets[c + 1])
                at = _message(out, at, _PROPOSALS, end)
            at = _fixed(out, at, _SCORE, scores[i])
            if item_keys.shape[1]:
                at = _key(out, at, _ITEM_KEY, item_keys, i)
            else:
                at = _varint(out, at, item_numbers[i])
                at -= 1
                out[np.uint64(at)] = _ITEM_ID
            at = _message(out, at, _CANDIDATES, candidate_end)
        if debug_offsets.size > 1 and debug_offsets[q + 1] > debug_offsets[q]:
            end = at
            at = _text(out, at, debug, debug_offsets[q], debug_offsets[q + 1])
            at = _message(out, at, _DEBUG, end)
        if request_offsets[q + 1] > request_offsets[q]:
            end = at
            at = _text(out, at, request_ids, request_offsets[q], request_offsets[q + 1])
            at = _message(out, at, _REQUEST_ID, end)
    offsets[0] = at
    for q in range(queries + 1):
        offsets[q] -= at
    return at


# Each of these writes what ends in front of `at` and returns where it begins. Indexes are unsigned: before a signed one
# each store asks whether it counts from the array's end.


@njit(nogil=True, cache=True)
def _varint(out, at, value):  # type: ignore[no-untyped-def]
    """Seven bits a byte, low ones first, the high bit set on all but the last; value is 0 or more."""
    if value < 128:
        at -= 1
        out[np.uint64(at)] = value
        return at
    size = 2
    left = value >> 14
    while left:
        left >>= 7
        size += 1
    at -= size
    for byte in range(size - 1):
        out[np.uint64(at + byte)] = (value & 127) | 128
        value >>= 7
    out[np.uint64(at + size - 1)] = value
    return at


@njit(nogil=True, cache=True)
def _number(out, at, tag, value):  # type: ignore[no-untyped-def]
    """A varint field; 0 is what a reader takes for one that is not there."""
    if value:
        at = _varint(out, at, np.int64(value))
        at -= 1
        out[np.uint64(at)] = tag
    return at


@njit(nogil=True, cache=True)
def _message(out, at, tag, end):  # type: ignore[no-untyped-def]
    """Tag and length of what stands in [at, end)."""
    at = _varint(out, at, end - at)
    at -= 1
    out[np.uint64(at)] = tag
    return at


@njit(nogil=True, cache=True)
def _fixed(out, at, tag, bits):  # type: ignore[no-untyped-def]
    """A float's bits, low byte first; 0 as in `_number`."""
    if bits:
        at -= 5
        out[np.uint64(at)] = tag
        for byte in range(4):
            out[np.uint64(at + 1 + byte)] = (bits >> np.uint32(8 * byte)) & np.uint32(255)
    return at


@njit(nogil=True, cache=True)
def _text(out, at, text, begin, end):  # type: ignore[no-untyped-def]
    """The bytes as they are."""
    at -= end - begin
    for i in range(end - begin):
        out[np.uint64(at + i)] = text[np.uint64(begin + i)]
    return at


@njit(nogil=True, cache=True)
def _key(out, at, tag, keys, i):  # type: ignore[no-untyped-def]
    """A key, which ends before the first zero: keys hold none."""
    size = 0
    while size < keys.shape[1] and keys[i, size] != 0:
        size += 1
    end = at
    at -= size
    for byte in range(size):
        out[np.uint64(at + byte)] = keys[np.uint64(i), np.uint64(byte)]
    return _message(out, at, tag, end)
