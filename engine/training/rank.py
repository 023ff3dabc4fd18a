"""The ranking step of streaming VQ as torch modules: `engine/models/vq_spec.py` has the formulas and the names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Int32Array
from engine.models.vq_spec import VqSpec
from engine.training.tensors import tensor


class RankStep(nn.Module):
    """Scores of items for users, from features that the index step embeds."""

    def __init__(self, spec: VqSpec, spare: int = 0) -> None:
        """Begin at random; `spare`: rows of the items' tables for items to come."""
        super().__init__()
        width, tasks, items = spec.rank_dimension, len(spec.tasks), spec.tower.items + spare
        self.tasks, self.heads_of_attention = tasks, spec.rank_heads
        self.user = nn.Module()
        self.user.layers = nn.ModuleList(_linear(inner, outer) for inner, outer in spec.rank_user_layers)
        self.items = nn.Embedding(items + 1, width)
        nn.init.normal_(self.items.weight, std=0.02)
        self.project = _linear(spec.tower.dimension, width, bias=False)
        self.bias = nn.Embedding(items + 1, tasks, _weight=torch.zeros(items + 1, tasks))
        self.complex = spec.rank == "complex"
        if self.complex:
            self.query, self.key, self.value = (_linear(width, width, bias=False) for _ in range(3))
            self.out = _linear(width, width)
            self.layers = nn.ModuleList(_linear(inner, outer) for inner, outer in spec.rank_layers)
            self.heads = _linear(spec.rank_hidden[-1], tasks)

    def user_vectors(self, x: Tensor) -> Tensor:
        """Return p, float32[n, tasks e] or float32[n, e], of float32[n, D], what the index step's user tower reads."""
        layers = list(self.user.layers)
        for layer in layers[:-1]:
            x = F.relu(layer(x))
        last: Tensor = layers[-1](x)
        return last

    def item_vectors(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """Return z, float32[m, e], from int64[m] codes and the index step's float32[m, d]."""
        made: Tensor = self.items(codes) + self.project(vectors)
        return made

    def of_task(self, users: Tensor, task: int) -> Tensor:
        """two_tower: return float32[n, e], the part of p, float32[n, tasks e], that is of one task."""
        width = self.items.embedding_dim
        return users[:, task * width : (task + 1) * width]

    def crossed(
        self, users: Tensor, items: Tensor, biases: Tensor, history: Int32Array, lengths: Int32Array
    ) -> Tensor:
        """complex: return float32[n, c, tasks], the scores of c items for each user.

        Args:
            users: p, float32[n, e]; items: z, float32[n, c, e]; biases: float32[n, c, tasks].
            history: int32[n, t], the debiased histories, right-aligned; lengths: int32[n].
        """
        longest = int(lengths.max(initial=0))
        n, count, width = items.shape
        mixed = items.new_zeros(n, count, width)
        if longest:
            codes = tensor(history[:, history.shape[1] - longest :]).long()
            mixed = self._attended(items, self.items(codes), codes == 0)
        mixed = self.out(mixed)
        each = users.unsqueeze(1).expand(-1, count, -1)
        y = torch.cat([mixed, each, items, each * items], 2)
        for layer in self.layers:
            y = F.relu(layer(y))
        scores: Tensor = self.heads(y) + biases
        return scores

    def _attended(self, items: Tensor, history: Tensor, padding: Tensor) -> Tensor:
        """float32[n, c, e]: the attention of each item over its user's history; zeros where that is empty."""
        n, count, width = items.shape
        heads, part = self.heads_of_attention, width // self.heads_of_attention

        def split(x: Tensor) -> Tensor:
            return x.view(n, -1, heads, part).transpose(1, 2)

        q, k, v = split(self.query(items)), split(self.key(history)), split(self.value(history))
        logits = (q @ k.transpose(2, 3)) / math.sqrt(part)
        # Rows without history: all weights are equal, and what they give is taken away again.
        logits = logits.masked_fill(padding[:, None, None, :], torch.finfo(logits.dtype).min)
        made = (torch.softmax(logits, 3) @ v).transpose(1, 2).reshape(n, count, width)
        empty = padding.all(1)
        return made.masked_fill(empty[:, None, None], 0.0)


def _linear(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
