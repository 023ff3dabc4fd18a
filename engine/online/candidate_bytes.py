"""The wire bytes of `repeated Candidate candidates`, written by one compiled pass over a batch's columns.

A Python message object per candidate and per proposal would cost more than everything before it. What is written here is
plain protobuf encoding (https://protobuf.dev/programming-guides/encoding): a parser sees no difference, and the tests
hold it to protobuf's own encoder. Field numbers are those of recall.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from engine.core.merge import Merged
from engine.core.types import AnyArray, Float32Array, Int64Array, UInt8Array

NO_TRIGGER, TRIGGER_ID, TRIGGER_KEY = 0, 1, 2

# (field number << 3) | wire type; 0 varint, 2 length-delimited, 5 fixed 32 bits.
_CANDIDATES = (2 << 3) | 2
_ITEM_ID, _ITEM_KEY, _SCORE, _PROPOSALS = (1 << 3) | 0, (2 << 3) | 2, (3 << 3) | 5, (4 << 3) | 2
_CHANNEL, _RANK, _RAW_SCORE = (1 << 3) | 2, (2 << 3) | 0, (3 << 3) | 5
_TRIGGER_ID, _TRIGGER_KEY = (4 << 3) | 0, (5 << 3) | 2

_VARINT_ROOM = 10
_CANDIDATE_ROOM = 3 * _VARINT_ROOM + 8
_PROPOSAL_ROOM = 5 * _VARINT_ROOM + 8


@dataclass(frozen=True, slots=True)
class Ids:
    """External ids of candidates or triggers: numbers, or keys where the width of `keys` is not 0.

    Attributes:
        numbers: int64[n].
        keys: uint8[n, width], UTF-8 ended by zeros.
    """

    numbers: Int64Array
    keys: UInt8Array

    @classmethod
    def of(cls, encoded: AnyArray) -> Ids:
        """Take what `IdIndex.encoded` returns."""
        if encoded.ndim == 2:
            return cls(np.zeros(len(encoded), np.int64), encoded)
        return cls(encoded, np.zeros((encoded.size, 0), np.uint8))


def candidate_bytes(
    merged: Merged,
    items: Ids,
    proposal_scores: Float32Array,
    triggers: Ids,
    trigger_forms: UInt8Array,
    channels: tuple[str, ...],
) -> tuple[UInt8Array, Int64Array]:
    """Write the candidates of every query of a batch.

    Args:
        merged: the merged lists, m items and p proposals.
        items: ids of the m items.
        proposal_scores: float32[p], raw scores.
        triggers: ids of the p triggers, numbers or keys.
        trigger_forms: uint8[p], NO_TRIGGER, TRIGGER_ID or TRIGGER_KEY.
        channels: the channels' names, by number.

    Returns:
        uint8[bytes] and int64[n + 1]: query q's share is [offsets[q], offsets[q + 1]).
    """
    names = [name.encode() for name in channels]
    name_offsets = np.zeros(len(names) + 1, np.int64)
    np.cumsum([len(name) for name in names], out=name_offsets[1:])
    longest = max((len(name) for name in names), default=0)
    room = merged.rows.size * (_CANDIDATE_ROOM + items.keys.shape[1])
    room += merged.proposal_channels.size * (_PROPOSAL_ROOM + longest + triggers.keys.shape[1])
    out = np.empty(room, np.uint8)
    offsets = np.zeros(merged.offsets.size, np.int64)
    _write_all(
        merged.offsets, merged.scores.view(np.uint32), merged.proposal_offsets, merged.proposal_channels,
        merged.proposal_ranks, proposal_scores.view(np.uint32), items.numbers, items.keys, triggers.numbers,
        triggers.keys, trigger_forms, np.frombuffer(b"".join(names), np.uint8), name_offsets, out, offsets,
    )  # fmt: skip
    return out, offsets


@njit(nogil=True, cache=True)
def _write_all(  # type: ignore[no-untyped-def]
    item_offsets, scores, proposal_offsets, channels, ranks, raw_scores, item_numbers, item_keys, trigger_numbers,
    trigger_keys, trigger_forms, names, name_offsets, out, offsets,
):  # fmt: skip
    at = 0
    for q in range(item_offsets.size - 1):
        for i in range(item_offsets[q], item_offsets[q + 1]):
            # Lengths come before what they measure: a proposal's are computed, a candidate's is the sum.
            inside = 5 if scores[i] else 0
            if item_keys.shape[1]:
                width = _length(item_keys[i])
                inside += 1 + _varint_size(width) + width
            else:
                inside += 1 + _varint_size(item_numbers[i])
            for p in range(proposal_offsets[i], proposal_offsets[i + 1]):
                size = _proposal_size(
                    p, channels, ranks, raw_scores, trigger_numbers, trigger_keys, trigger_forms, name_offsets
                )
                inside += 1 + _varint_size(size) + size
            at = _varint(out, at, _CANDIDATES)
            at = _varint(out, at, inside)
            if item_keys.shape[1]:
                at = _string(out, at, _ITEM_KEY, item_keys[i], _length(item_keys[i]))
            else:
                at = _varint(out, at, _ITEM_ID)
                at = _varint(out, at, item_numbers[i])
            if scores[i]:
                at = _fixed(out, at, _SCORE, scores[i])
            for p in range(proposal_offsets[i], proposal_offsets[i + 1]):
                at = _varint(out, at, _PROPOSALS)
                size = _proposal_size(
                    p, channels, ranks, raw_scores, trigger_numbers, trigger_keys, trigger_forms, name_offsets
                )
                at = _varint(out, at, size)
                begin, end = name_offsets[channels[p]], name_offsets[channels[p] + 1]
                at = _string(out, at, _CHANNEL, names[begin:end], end - begin)
                at = _varint(out, at, _RANK)
                at = _varint(out, at, ranks[p])
                if raw_scores[p]:
                    at = _fixed(out, at, _RAW_SCORE, raw_scores[p])
                if trigger_forms[p] == TRIGGER_ID:
                    at = _varint(out, at, _TRIGGER_ID)
                    at = _varint(out, at, trigger_numbers[p])
                elif trigger_forms[p] == TRIGGER_KEY:
                    at = _string(out, at, _TRIGGER_KEY, trigger_keys[p], _length(trigger_keys[p]))
        offsets[q + 1] = at


@njit(nogil=True, cache=True)
def _proposal_size(  # type: ignore[no-untyped-def]
    p, channels, ranks, raw_scores, trigger_numbers, trigger_keys, trigger_forms, name_offsets
):
    name = name_offsets[channels[p] + 1] - name_offsets[channels[p]]
    size = 1 + _varint_size(name) + name + 1 + _varint_size(ranks[p])
    if raw_scores[p]:
        size += 5
    if trigger_forms[p] == TRIGGER_ID:
        size += 1 + _varint_size(trigger_numbers[p])
    elif trigger_forms[p] == TRIGGER_KEY:
        width = _length(trigger_keys[p])
        size += 1 + _varint_size(width) + width
    return size


@njit(nogil=True, cache=True, inline="always")
def _varint_size(value):  # type: ignore[no-untyped-def]
    left = np.uint64(value) >> np.uint64(7)
    size = 1
    while left:
        left >>= np.uint64(7)
        size += 1
    return size


@njit(nogil=True, cache=True, inline="always")
def _varint(out, at, value):  # type: ignore[no-untyped-def]
    """Seven bits a byte, low ones first, the high bit set on all but the last."""
    left = np.uint64(value)
    while left >= np.uint64(128):
        out[at] = np.uint8(left & np.uint64(127)) | np.uint8(128)
        left >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(left)
    return at + 1


@njit(nogil=True, cache=True, inline="always")
def _fixed(out, at, tag, bits):  # type: ignore[no-untyped-def]
    """A float's bits, low byte first."""
    out[at] = tag
    for byte in range(4):
        out[at + 1 + byte] = np.uint8((bits >> np.uint32(8 * byte)) & np.uint32(255))
    return at + 5


@njit(nogil=True, cache=True)
def _string(out, at, tag, text, size):  # type: ignore[no-untyped-def]
    at = _varint(out, at, tag)
    at = _varint(out, at, size)
    for i in range(size):
        out[at + i] = text[i]
    return at + size


@njit(nogil=True, cache=True)
def _length(key):  # type: ignore[no-untyped-def]
    """Bytes before the first zero: keys hold none."""
    for i in range(key.size):
        if key[i] == 0:
            return i
    return key.size
