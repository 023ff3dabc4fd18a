"""What a user did without what the user does most: histories of the complex ranking step of streaming VQ.

Source: Bin et al. 2025 (streaming VQ), section 3.5, after Yan et al. 2024 (Trinity): a histogram of the newest items over
coarser clusters; items in the fullest of these are left out, and older ones take their places. The papers do not say what
becomes of a user with few clusters: here a cluster with one item alone is none of the fullest, so that a short or
scattered history stays whole.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.types import Int32Array


def debiased(codes: Int32Array, groups: Int32Array, dropped: int, keep: int) -> tuple[Int32Array, Int32Array]:
    """Return the histories without the items of each one's fullest groups.

    Args:
        codes: int32[n, t], item codes (row + 1) right-aligned, newest last, 0 is padding. Codes from groups.size on are
            items published later: they are in no group.
        groups: int32[items + 1], the coarser cluster of each code; -1: none.
        dropped: how many groups are left out, of those with two items or more; of equally full ones the lowest number.
        keep: items of the result at most, the newest.

    Returns:
        int32[n, keep], right-aligned as `codes`, and int32[n], how many each has.
    """
    out = np.zeros((codes.shape[0], keep), np.int32)
    lengths = np.empty(codes.shape[0], np.int32)
    drop_fullest(np.ascontiguousarray(codes, np.int32), groups, dropped, out, lengths)
    return out, lengths


@njit(nogil=True, cache=True)
def drop_fullest(codes, groups, dropped, out, lengths):  # type: ignore[no-untyped-def]
    """Write what `debiased` returns; `out` is zeros before."""
    n, t = codes.shape
    keep = out.shape[1]
    found = np.empty(t, np.int32)  # the distinct groups of a history
    sizes = np.empty(t, np.int32)
    for r in range(n):
        count = 0
        if dropped > 0:
            for p in range(t):
                code = codes[r, p]
                group = groups[code] if 0 < code < groups.size else -1
                if group < 0:
                    continue
                at = 0
                while at < count and found[at] != group:
                    at += 1
                if at == count:
                    found[at] = group
                    sizes[at] = 0
                    count += 1
                sizes[at] += 1
            for _ in range(dropped):
                best = -1
                for at in range(count):
                    if sizes[at] >= 2 and (
                        best < 0
                        or sizes[at] > sizes[best]
                        or (sizes[at] == sizes[best] and found[at] < found[best])
                    ):
                        best = at
                if best < 0:
                    break
                sizes[best] = -1
        kept = 0
        for p in range(t - 1, -1, -1):
            code = codes[r, p]
            if code == 0 or kept == keep:
                break
            group = groups[code] if code < groups.size else -1
            gone = False
            if group >= 0:
                for at in range(count):
                    if found[at] == group:
                        gone = sizes[at] < 0
                        break
            if not gone:
                kept += 1
                out[r, keep - kept] = code
        lengths[r] = kept
