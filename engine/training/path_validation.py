"""How an epoch of Deep Retrieval does on what is held out: beam search and reranking, beside exact scores."""

from __future__ import annotations

import numpy as np
import torch

from engine.core.types import BoolArray, Int64Array
from engine.models.spec import ModelSpec
from engine.training.data import TrainingData
from engine.training.export import taken
from engine.training.paths import PathModel, Ranker, with_one
from engine.training.tensors import Features, history, tensor
from engine.training.towers import UserTower
from engine.training.validation import USERS, HeldOut


def recall_of_paths(
    spec: ModelSpec,
    user: UserTower,
    paths: PathModel,
    ranker: Ranker,
    assignment: Int64Array,
    data: TrainingData,
    held_out: HeldOut,
    at: int,
    beam: int,
) -> tuple[float, float]:
    """Return Recall@`at` of the held-out items among those that the user does not have yet.

    Args:
        spec: of the user tower.
        user, paths, ranker: the model.
        assignment: int64[items, J], codes of paths, -1 where there are fewer.
        data: without the items held out.
        held_out: these.
        at: K.
        beam: paths searched for each user.

    Returns:
        That of the items on the paths found, and that of all items.
    """
    device = next(paths.parameters()).device
    matrix = data.interactions
    lists = _Lists(assignment)
    items = ranker.whole().detach()
    was = user.training
    user.eval()
    found = exact = 0
    with torch.no_grad():
        for begin in range(0, held_out.users.size, USERS):
            rows = held_out.users[begin : begin + USERS]
            done = history(matrix, rows, spec.sequence.length, device)
            queries = user(Features.of(taken(data.users, rows), device), done, None)
            scores = with_one(queries) @ items.T
            lengths = matrix.user_counts()[rows]
            places = np.repeat(matrix.indptr[rows] - np.cumsum(lengths) + lengths, lengths) + np.arange(
                lengths.sum()
            )
            owners = np.repeat(np.arange(rows.size), lengths)
            scores[tensor(owners, device), tensor(matrix.rows[places], device).long()] = -torch.inf
            target = tensor(held_out.items[begin : begin + USERS], device).long().unsqueeze(1)
            there = lists.items_of(paths.beam(queries, beam)[0], matrix.items)
            reached = tensor(there, device)
            right = scores.gather(1, target)
            better = scores > right
            exact += int((better.sum(1) < at).sum())
            found += int(((better & reached).sum(1).lt(at) & reached.gather(1, target).squeeze(1)).sum())
    user.train(was)
    count = max(held_out.users.size, 1)
    return found / count, exact / count


class _Lists:
    """The items of each path."""

    def __init__(self, assignment: Int64Array) -> None:
        entries = np.flatnonzero(assignment.ravel() >= 0)
        order = entries[np.argsort(assignment.ravel()[entries], kind="stable")]
        self._codes, self._rows = assignment.ravel()[order], order // assignment.shape[1]

    def items_of(self, codes: Int64Array, items: int) -> BoolArray:
        """Return bool[n, items]: which items are on one of the paths of each row of int64[n, B]."""
        begins = np.searchsorted(self._codes, codes.ravel())
        lengths = np.searchsorted(self._codes, codes.ravel(), side="right") - begins
        places = np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
        there = np.zeros((codes.shape[0], items), np.bool_)
        there[np.repeat(np.arange(codes.size) // codes.shape[1], lengths), self._rows[places]] = True
        return there
