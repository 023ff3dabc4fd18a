"""The products of the towers, compiled, with one order of summation per row.

A batch must answer bit for bit as its queries do alone, and BLAS does not: it sums in an order that depends on how many
rows there are. Here every entry of a product is summed from the first term to the last, whatever stands in the other
rows, and no term is fused into another, so that the compiler may only vectorise over columns. Four rows and four terms at
a time keep it in registers: on one core it makes 15 to 18 thousand million multiplications a second, as much as OpenBLAS
on products of these sizes, and more of one row (docs/two-tower.md has the numbers).
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def dense(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Set out = x weight + bias.

    Args:
        x: float32[n, k]; weight: float32[k, m], the transpose of torch's; bias: float32[m].
        out: float32[n, m], no part of x.
    """
    n, terms = x.shape
    columns = weight.shape[1]
    whole = terms - terms % 4
    for r in range(0, n - n % 4, 4):
        y0, y1, y2, y3 = out[r], out[r + 1], out[r + 2], out[r + 3]
        x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
        for c in range(columns):
            y0[c] = bias[c]
            y1[c] = bias[c]
            y2[c] = bias[c]
            y3[c] = bias[c]
        for k in range(0, whole, 4):
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            a0, a1, a2, a3 = x0[k], x0[k + 1], x0[k + 2], x0[k + 3]
            b0, b1, b2, b3 = x1[k], x1[k + 1], x1[k + 2], x1[k + 3]
            c0, c1, c2, c3 = x2[k], x2[k + 1], x2[k + 2], x2[k + 3]
            d0, d1, d2, d3 = x3[k], x3[k + 1], x3[k + 2], x3[k + 3]
            for c in range(columns):
                p, q, s, t = w0[c], w1[c], w2[c], w3[c]
                y0[c] = y0[c] + a0 * p + a1 * q + a2 * s + a3 * t
                y1[c] = y1[c] + b0 * p + b1 * q + b2 * s + b3 * t
                y2[c] = y2[c] + c0 * p + c1 * q + c2 * s + c3 * t
                y3[c] = y3[c] + d0 * p + d1 * q + d2 * s + d3 * t
        for k in range(whole, terms):
            w0 = weight[k]
            a0, b0, c0, d0 = x0[k], x1[k], x2[k], x3[k]
            for c in range(columns):
                y0[c] += a0 * w0[c]
                y1[c] += b0 * w0[c]
                y2[c] += c0 * w0[c]
                y3[c] += d0 * w0[c]
    for r in range(n - n % 4, n):
        y0, x0 = out[r], x[r]
        for c in range(columns):
            y0[c] = bias[c]
        for k in range(0, whole, 4):
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            a0, a1, a2, a3 = x0[k], x0[k + 1], x0[k + 2], x0[k + 3]
            for c in range(columns):
                y0[c] = y0[c] + a0 * w0[c] + a1 * w1[c] + a2 * w2[c] + a3 * w3[c]
        for k in range(whole, terms):
            w0, a0 = weight[k], x0[k]
            for c in range(columns):
                y0[c] += a0 * w0[c]


@njit(nogil=True, cache=True)
def dense_relu(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Set out = max(x weight + bias, 0); arguments as of `dense`."""
    dense(x, weight, bias, out)
    for r in range(out.shape[0]):
        y = out[r]
        for c in range(y.size):
            y[c] = max(y[c], np.float32(0))


@njit(nogil=True, cache=True)
def dot(a, b):  # type: ignore[no-untyped-def]
    """Return the inner product of float32[k] and float32[k]: eight sums, so that none waits for the one before."""
    whole = a.size - a.size % 8
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    for k in range(0, whole, 8):
        s0 += a[k] * b[k]
        s1 += a[k + 1] * b[k + 1]
        s2 += a[k + 2] * b[k + 2]
        s3 += a[k + 3] * b[k + 3]
        s4 += a[k + 4] * b[k + 4]
        s5 += a[k + 5] * b[k + 5]
        s6 += a[k + 6] * b[k + 6]
        s7 += a[k + 7] * b[k + 7]
    total = ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7))
    for k in range(whole, a.size):
        total += a[k] * b[k]
    return total


@njit(nogil=True, cache=True)
def normalise(x):  # type: ignore[no-untyped-def]
    """Divide every row of float32[n, d] by max(its L2 norm, 1e-12), in place."""
    for r in range(x.shape[0]):
        row = x[r]
        norm = max(np.sqrt(dot(row, row)), np.float32(1e-12))
        for c in range(row.size):
            row[c] /= norm


@njit(nogil=True, cache=True)
def layer_norm(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Set every row of `out` to the LayerNorm (eps 1e-8) of the row of x; float32[n, w] both."""
    width = x.shape[1]
    for r in range(x.shape[0]):
        row, y = x[r], out[r]
        total = np.float64(0)
        for c in range(width):
            total += row[c]
        mean = np.float32(total / width)
        total = np.float64(0)
        for c in range(width):
            total += (row[c] - mean) * (row[c] - mean)
        scale = np.float32(1 / np.sqrt(total / width + 1e-8))
        for c in range(width):
            y[c] = (row[c] - mean) * scale * weight[c] + bias[c]


@njit(nogil=True, cache=True)
def softmax_rows(x):  # type: ignore[no-untyped-def]
    """Turn every row of float32[n, m] into its softmax, in place."""
    for r in range(x.shape[0]):
        softmax(x[r], x.shape[1])


@njit(nogil=True, cache=True)
def softmax(logits, n):  # type: ignore[no-untyped-def]
    """Turn the first n of float32[...] into their softmax, in place."""
    largest = logits[0]
    for j in range(1, n):
        largest = max(largest, logits[j])
    total = np.float32(0)
    for j in range(n):
        logits[j] = np.exp(logits[j] - largest)
        total += logits[j]
    for j in range(n):
        logits[j] /= total
