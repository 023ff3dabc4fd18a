"""What is held out to choose the best epoch, and how an epoch does on it: exact scores of all items."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.interactions import Interactions
from engine.core.types import BoolArray, Int32Array, Int64Array
from engine.models.spec import ModelSpec
from engine.training.data import TrainingData
from engine.training.export import item_vectors, taken
from engine.training.tensors import Features, Packed, history, tensor
from engine.training.towers import ItemTower, UserTower

USERS = 512
"""Users whose scores are computed at once."""

LEAST_ITEMS = 3
"""Users with fewer items are not held out: too little would be left."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One item of each chosen user.

    Attributes:
        users: int32[n], rising; items: int32[n].
    """

    users: Int32Array
    items: Int32Array


def hold_out(data: TrainingData, share: float, timed: bool, seed: int) -> tuple[TrainingData, HeldOut]:
    """Return the data without the newest item of a share of the users (without times: without any), and these."""
    matrix = data.interactions
    random = np.random.default_rng((seed, 0x5EED))
    counts = matrix.user_counts()
    fit = np.flatnonzero(counts >= LEAST_ITEMS)
    users = (
        np.sort(random.choice(fit, min(fit.size, max(1, round(share * fit.size))), replace=False))
        if fit.size
        else fit
    )
    at = matrix.indptr[users] + (0 if timed else random.integers(0, counts[users]))
    keep = np.ones(matrix.entries, np.bool_)
    keep[at] = False
    weights = None if data.weights is None else data.weights[keep]
    examples = None if data.examples is None else data.examples[keep]
    left = replace(data, interactions=_without(matrix, keep), weights=weights, examples=examples)
    return left, HeldOut(users.astype(np.int32), matrix.rows[at])


def _without(matrix: Interactions, keep: BoolArray) -> Interactions:
    before = np.concatenate([[0], np.cumsum(keep)])
    return Interactions(
        matrix.users, matrix.items, before[matrix.indptr].astype(np.int64), matrix.rows[keep],
        matrix.weights[keep], matrix.timestamps[keep],
    )  # fmt: skip


def recall(
    spec: ModelSpec,
    user: UserTower,
    item: ItemTower,
    data: TrainingData,
    held_out: HeldOut,
    at: int,
    temperature: float = 1.0,
) -> float:
    """Return Recall@`at`: how many of the held-out items are among the best that the user does not have yet.

    Where there are tasks an item's score is the log of p(its cluster) p(the item inside it), as the loss has both; its
    scores are divided by `temperature`.
    """
    device = next(item.parameters()).device
    vectors = tensor(item_vectors(spec, item, data.items), device)
    matrix = data.interactions
    tied = spec.tied_feature
    table = None if tied is None else item.embeddings[str(tied)]
    was, hits = user.training, 0
    user.eval()
    with torch.no_grad():
        for begin in range(0, held_out.users.size, USERS):
            rows = held_out.users[begin : begin + USERS]
            features = Features.of(taken(data.users, rows), device)
            done = history(matrix, rows, spec.sequence.length, device)
            if spec.prompts and data.clusters is not None:
                scores = _by_task(user, features, done, table, vectors / temperature, data.clusters)
            else:
                scores = user(features, done, table) @ vectors.T
            if spec.vectors_per_user > 1:
                scores = scores.view(rows.size, spec.vectors_per_user, -1).amax(1)
            lengths = matrix.indptr[rows + 1] - matrix.indptr[rows]
            owners = torch.from_numpy(np.repeat(np.arange(rows.size), lengths)).to(device)
            scores[
                owners, tensor(matrix.rows[_entries(matrix.indptr[rows], lengths)], device).long()
            ] = -torch.inf
            target = tensor(held_out.items[begin : begin + USERS], device).long().unsqueeze(1)
            ranks = (scores > scores.gather(1, target)).sum(1)
            hits += int((ranks < at).sum())
    user.train(was)
    return hits / max(held_out.users.size, 1)


def _by_task(
    user: UserTower,
    features: Features,
    done: Packed,
    table: nn.Embedding | None,
    vectors: Tensor,
    clusters: Int32Array,
) -> Tensor:
    """Return float32[n, items]: the log of the probability of each item."""
    assert user.intent is not None
    prompts = user.spec.prompts

    def queries(task: int) -> Tensor:
        tasks = torch.full((len(done),), task, dtype=torch.long, device=vectors.device)
        made: Tensor = user(features, done, table, tasks=tasks)
        return made

    shares = torch.log_softmax(user.intent(queries(prompts)), 1)
    scores = vectors.new_empty(len(done), vectors.shape[0])
    for task in range(prompts):
        rows = tensor(np.flatnonzero(clusters == task), vectors.device)
        inside = torch.log_softmax(queries(task) @ vectors[rows].T, 1)
        scores[:, rows] = inside + shares[:, task : task + 1]
    return scores


def _entries(begins: Int64Array, lengths: Int64Array) -> Int64Array:
    ends = np.cumsum(lengths)
    ranges: Int64Array = np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(
        begins - (ends - lengths), lengths
    )
    return ranges
