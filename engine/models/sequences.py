"""The sequence encoders, compiled: one pass over a batch, each query at its own length, so that nothing is padded.

`engine/models/spec.py` has the formulas. Arguments that all share: `table` float32[items + 1, w], embeddings of items;
`codes` int32[n, t] and `lengths` int32[n] as in `EncodedUsers`; `out` float32[n, w], filled with zeros, which an empty
history leaves as they are. Weights are transposed, [in, out].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.models.dense import dense, dense_relu, dot, layer_norm, softmax


@njit(nogil=True, cache=True)
def gather(table, codes, length, out):  # type: ignore[no-untyped-def]
    """Copy the embeddings of the last `length` of int32[t] codes to out[:length], oldest first."""
    start = codes.size - length
    for j in range(length):
        row, y = table[codes[start + j]], out[j]
        for c in range(y.size):
            y[c] = row[c]


@njit(nogil=True, cache=True)
def prompted(table, codes, lengths, prompts, tasks, tokens, numbers):  # type: ignore[no-untyped-def]
    """Make the table and the codes that an encoder reads instead: items times the prompt of their query's task.

    Args:
        prompts: float32[tasks, w]; tasks: int32[n], a row of it each.
        tokens: float32[sum of lengths, w], filled.
        numbers: int32[n, t], filled with rows of `tokens` where `codes` has items.
    """
    most, at = codes.shape[1], 0
    for q in range(lengths.size):
        prompt = prompts[tasks[q]]
        for j in range(most - lengths[q], most):
            row, y = table[codes[q, j]], tokens[at]
            for c in range(y.size):
                y[c] = row[c] * prompt[c]
            numbers[q, j] = at
            at += 1


@njit(nogil=True, cache=True)
def mean_pooling(table, codes, lengths, out):  # type: ignore[no-untyped-def]
    """Set each row of `out` to the mean of its items."""
    most = codes.shape[1]
    for q in range(lengths.size):
        if lengths[q] == 0:
            continue
        y = out[q]
        for j in range(most - lengths[q], most):
            row = table[codes[q, j]]
            for c in range(y.size):
                y[c] += row[c]
        share = np.float32(1) / np.float32(lengths[q])
        for c in range(y.size):
            y[c] *= share


@njit(nogil=True, cache=True)
def weighted_pooling(table, codes, lengths, weights, exponent, out):  # type: ignore[no-untyped-def]
    """Set each row of `out` to the weighted sum of its n items over n^exponent; weights: float32[items + 1]."""
    most = codes.shape[1]
    for q in range(lengths.size):
        if lengths[q] == 0:
            continue
        y = out[q]
        for j in range(most - lengths[q], most):
            row, weight = table[codes[q, j]], weights[codes[q, j]]
            for c in range(y.size):
                y[c] += weight * row[c]
        share = np.float32(float(lengths[q]) ** -exponent)
        for c in range(y.size):
            y[c] *= share


@njit(nogil=True, cache=True)
def attention_pooling(table, codes, lengths, query, out):  # type: ignore[no-untyped-def]
    """Set each row of `out` to the target-free attention over its items and a zero vector; query: float32[w]."""
    most, width = codes.shape[1], query.size
    scale = np.float32(1 / np.sqrt(width))
    weights = np.empty(most + 1, np.float32)
    for q in range(lengths.size):
        n = lengths[q]
        if n == 0:
            continue
        for j in range(n):
            weights[j] = dot(table[codes[q, most - n + j]], query) * scale
        weights[n] = np.float32(0)
        softmax(weights, n + 1)
        y = out[q]
        for j in range(n):
            row, weight = table[codes[q, most - n + j]], weights[j]
            for c in range(width):
                y[c] += weight * row[c]


@njit(nogil=True, cache=True)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return np.float32(1) / (np.float32(1) + np.exp(-x))


@njit(nogil=True, cache=True)
def gru(table, codes, lengths, input_weight, state_weight, input_bias, state_bias, out):  # type: ignore[no-untyped-def]
    """Set each row of `out` to the last state; weights: float32[w, 3 w], gates in torch's order: reset, update, new."""
    width = out.shape[1]
    items = np.empty((codes.shape[1], width), np.float32)
    inputs = np.empty((codes.shape[1], 3 * width), np.float32)
    states = np.empty((1, 3 * width), np.float32)
    for q in range(lengths.size):
        n = lengths[q]
        if n == 0:
            continue
        gather(table, codes[q], n, items)
        dense(items[:n], input_weight, input_bias, inputs[:n])
        state = out[q]
        for j in range(n):
            dense(out[q : q + 1], state_weight, state_bias, states)
            given, kept = inputs[j], states[0]
            for c in range(width):
                reset = _sigmoid(given[c] + kept[c])
                update = _sigmoid(given[width + c] + kept[width + c])
                new = np.tanh(given[2 * width + c] + reset * kept[2 * width + c])
                state[c] = (np.float32(1) - update) * new + update * state[c]


@njit(nogil=True, cache=True)
def sasrec(  # type: ignore[no-untyped-def]
    table, codes, lengths, positions, heads, norms, query_weight, query_bias, pair_weight, pair_bias, out_weight,
    out_bias, inner_weight, inner_bias, outer_weight, outer_bias, last_norm, out,
):  # fmt: skip
    """Set each row of `out` to SASRec's output at the newest item.

    In the last block only the newest item asks: of the others no more than keys and values are needed there.

    Args:
        positions: float32[length, w], row p of the p-th newest.
        heads: how many; h = w / heads.
        norms: float32[blocks, 4, w], weight and bias of both LayerNorms of each block.
        query_weight, query_bias: float32[blocks, w, w], float32[blocks, w].
        pair_weight, pair_bias: float32[blocks, w, 2 w], float32[blocks, 2 w]: keys, then values.
        out_weight, inner_weight, outer_weight: float32[blocks, w, w]; their biases float32[blocks, w].
        last_norm: float32[2, w].
    """
    most, width = codes.shape[1], out.shape[1]
    blocks = norms.shape[0]
    size = width // heads
    scale = np.float32(np.sqrt(width))
    sharpness = np.float32(1 / np.sqrt(size))
    x = np.empty((most, width), np.float32)
    normed = np.empty((most, width), np.float32)
    queries = np.empty((most, width), np.float32)
    mixed = np.empty((most, width), np.float32)
    pairs = np.empty((most, 2 * width), np.float32)
    head_queries = np.empty((most, size), np.float32)
    values = np.empty((most, size), np.float32)
    gathered = np.empty((most, size), np.float32)
    key_room = np.empty(size * most, np.float32)
    weight_room = np.empty(most * most, np.float32)
    nothing = np.zeros(max(most, size), np.float32)
    for q in range(lengths.size):
        n = np.int64(lengths[q])
        if n == 0:
            continue
        gather(table, codes[q], n, x)
        for j in range(n):
            row, position = x[j], positions[n - 1 - j]
            for c in range(width):
                row[c] = row[c] * scale + position[c]
        keys = key_room[: size * n].reshape((size, n))
        weights = weight_room[: n * n].reshape((n, n))
        for b in range(blocks):
            first = n - 1 if b == blocks - 1 else 0
            layer_norm(x[:n], norms[b, 0], norms[b, 1], normed[:n])
            dense(normed[:n], pair_weight[b], pair_bias[b], pairs[:n])
            dense(normed[first:n], query_weight[b], query_bias[b], queries[first:n])
            for h in range(heads):
                for j in range(n):
                    for c in range(size):
                        keys[c, j] = pairs[j, h * size + c]
                        values[j, c] = pairs[j, width + h * size + c]
                for j in range(first, n):
                    for c in range(size):
                        head_queries[j, c] = queries[j, h * size + c] * sharpness
                dense(head_queries[first:n], keys, nothing[:n], weights[first:n])
                for j in range(first, n):
                    softmax(weights[j], j + 1)
                    for i in range(j + 1, n):
                        weights[j, i] = np.float32(0)
                dense(weights[first:n], values[:n], nothing[:size], gathered[first:n])
                for j in range(first, n):
                    for c in range(size):
                        mixed[j, h * size + c] = gathered[j, c]
            dense(mixed[first:n], out_weight[b], out_bias[b], queries[first:n])
            for j in range(first, n):
                for c in range(width):
                    x[j, c] += queries[j, c]
            layer_norm(x[first:n], norms[b, 2], norms[b, 3], normed[first:n])
            dense_relu(normed[first:n], inner_weight[b], inner_bias[b], queries[first:n])
            dense(queries[first:n], outer_weight[b], outer_bias[b], mixed[first:n])
            for j in range(first, n):
                for c in range(width):
                    x[j, c] += mixed[j, c]
        layer_norm(x[n - 1 : n], last_norm[0], last_norm[1], out[q : q + 1])


@njit(nogil=True, cache=True)
def comirec(table, codes, lengths, hidden_weight, head_weight, out):  # type: ignore[no-untyped-def]
    """Set rows q * interests + i of `out` to the interests of query q.

    Args:
        hidden_weight: float32[w, 4 w]; head_weight: float32[4 w, interests].
        out: float32[n * interests, w], zeros.
    """
    most, width = codes.shape[1], out.shape[1]
    between, interests = head_weight.shape
    items = np.empty((most, width), np.float32)
    hidden = np.empty((most, between), np.float32)
    logits = np.empty((most, interests), np.float32)
    weights = np.empty(most, np.float32)
    nothing = np.zeros(max(between, interests), np.float32)
    for q in range(lengths.size):
        n = lengths[q]
        if n == 0:
            continue
        gather(table, codes[q], n, items)
        dense(items[:n], hidden_weight, nothing[:between], hidden[:n])
        for j in range(n):
            for c in range(between):
                hidden[j, c] = np.tanh(hidden[j, c])
        dense(hidden[:n], head_weight, nothing[:interests], logits[:n])
        for i in range(interests):
            for j in range(n):
                weights[j] = logits[j, i]
            softmax(weights, n)
            y = out[q * interests + i]
            for j in range(n):
                row, weight = items[j], weights[j]
                for c in range(width):
                    y[c] += weight * row[c]
