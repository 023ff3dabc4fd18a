"""Selecting the best: (score, row) as one integer, and the k largest of many, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

DIGIT, SHORT_DIGIT = 11, 8
"""Bits of a digit that numbers are sorted by: three of them are a float32. Of few numbers a shorter one is quicker."""

FEW = 512
"""So many numbers are few."""


@njit(nogil=True, cache=True, inline="always")
def sort_key(score_bits, row):  # type: ignore[no-untyped-def]
    """Fold (score descending, row ascending) into one integer, larger is better: ties need no second compare."""
    if score_bits & np.uint32(0x80000000):
        ordered = np.uint32(~score_bits)
    else:
        ordered = np.uint32(score_bits | np.uint32(0x80000000))
    return (np.uint64(ordered) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - np.uint32(row))


@njit(nogil=True, cache=True, inline="always")
def row_of(key):  # type: ignore[no-untyped-def]
    """Return the row in a key."""
    return np.int32(np.uint32(0xFFFFFFFF) - np.uint32(key & np.uint64(0xFFFFFFFF)))


@njit(nogil=True, cache=True)
def select_top(keys, n, take):  # type: ignore[no-untyped-def]
    """Move the `take` largest of keys[:n] to the front (Hoare's quickselect, median of three)."""
    left = 0
    right = n - 1
    while left < right:
        middle = (left + right) // 2
        a, b, c = keys[left], keys[middle], keys[right]
        pivot = max(min(a, b), min(max(a, b), c))
        i = left
        j = right
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if take - 1 <= j:
            right = j
        elif take - 1 >= i:
            left = i
        else:
            return


@njit(nogil=True, cache=True, inline="always")
def offer(keys, count, keep, worst, key):  # type: ignore[no-untyped-def]
    """Take a key into a buffer that keeps the `keep` largest.

    The buffer is cut back whenever it is full, so a key costs a compare and now and then its share of a selection,
    where a heap would cost a walk.

    Args:
        keys: uint64[more than keep], the buffer.
        count: how many keys are in it.
        keep: how many matter.
        worst: the least key that still matters; 0 at the beginning.
        key: the one offered.

    Returns:
        The new count and the new worst.
    """
    if key > worst:
        keys[count] = key
        count += 1
        if count == keys.size:
            select_top(keys, count, keep)
            count = keep
            worst = keys[keep - 1]
    return count, worst


@njit(nogil=True, cache=True)
def sort_digits(lines, count, lowest):  # type: ignore[no-untyped-def]
    """Sort numbers by their bits from `lowest` on, the least first; equal ones stay in their order.

    A radix sort, digit by digit from the last one: of hundreds it takes a fraction of what comparing them does, as there
    is nothing to guess.

    Args:
        lines: uint64 [2, count or more]; the numbers are in the first line. Overwritten.
        count: how many.
        lowest: 0 to 63.

    Returns:
        In which of the two lines they stand sorted.
    """
    width = SHORT_DIGIT if count <= FEW else DIGIT
    counts = np.empty(1 << width, np.int64)
    digits = np.uint64((1 << width) - 1)
    varying = np.uint64(0)
    for i in range(count):
        varying |= lines[0, i] ^ lines[0, 0]
    here = 0
    for shift in range(lowest, 64, width):
        if (varying >> np.uint64(shift)) & digits == 0:
            continue
        read, write = lines[here], lines[1 - here]
        counts[:] = 0
        for i in range(count):
            counts[(read[i] >> np.uint64(shift)) & digits] += 1
        begin = np.int64(0)
        for digit in range(counts.size):
            of = counts[digit]
            counts[digit] = begin
            begin += of
        for i in range(count):
            digit = (read[i] >> np.uint64(shift)) & digits
            write[counts[digit]] = read[i]
            counts[digit] += 1
        here = 1 - here
    return here


@njit(nogil=True, cache=True)
def drain(keys, count, keep, rows, scores, start):  # type: ignore[no-untyped-def]
    """Write the buffer's `keep` largest, best first, to rows[start:] and scores[start:]; scores are not negative.

    Returns:
        Where the next list begins.
    """
    take = min(count, keep)
    if take < count:
        select_top(keys, count, take)
    best = np.sort(keys[:take])
    score_bits = scores.view(np.uint32)
    for i in range(take):
        key = best[take - 1 - i]
        rows[start + i] = row_of(key)
        score_bits[start + i] = np.uint32(key >> np.uint64(32)) & np.uint32(0x7FFFFFFF)
    return start + take
