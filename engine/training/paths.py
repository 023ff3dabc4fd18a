"""The layers of Deep Retrieval as a torch module: `engine/models/paths.py` has the formulas and the names."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.core.types import Float32Array, Int64Array
from engine.models.paths import PathModel as Served
from engine.models.paths import PathSpec
from engine.training.layers import dropped

CHUNK_CELLS = 1 << 21
"""Probabilities that a beam search holds at once: 8 MB."""


class PathModel(nn.Module):
    """p(path | user) of paths that are given, and the likeliest paths.

    The first Linear of a layer is not applied to user and nodes side by side: its product with the user is the same for
    all paths, and that with a node is a row of a table of K.

    Args:
        spec: the lattice.
        dropout: behind each hidden layer.
    """

    def __init__(self, spec: PathSpec, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec, self.dropout = spec, dropout
        self.nodes = nn.ModuleList(_nodes(spec) for _ in range(spec.depth - 1))
        self.layers = nn.ModuleList(
            nn.ModuleList(_linear(inner, outer) for inner, outer in spec.linears(layer))
            for layer in range(spec.depth)
        )

    def forward(self, users: Tensor, nodes: Tensor) -> Tensor:
        """Return float32[n, J]: log p(path | user).

        Args:
            users: float32[n, e].
            nodes: int64[n, J, D], the paths of each.
        """
        logits = self._logits(0, users, nodes[:, :0])
        total = torch.log_softmax(logits, 1).gather(1, nodes[..., 0])
        for layer in range(1, self.spec.depth):
            logits = self._logits(layer, users, nodes[..., :layer])
            loss = F.cross_entropy(logits.flatten(0, 1), nodes[..., layer].flatten(), reduction="none")
            total = total - loss.view_as(total)
        return total

    def beam(self, users: Tensor, count: int, threads: int = 1) -> tuple[Int64Array, Float32Array]:
        """Return the likeliest paths that beam search finds (section 2.2), best first; without dropout or gradients.

        On the CPU this is the search of serving, which takes half the time of `search`.

        Args:
            users: float32[n, e].
            count: B, how many paths are gone on with in each layer.
            threads: cores to use, on the CPU.

        Returns:
            int64[n, min(B, K^D)], codes of paths, and float32 of the same shape, log p(path | user).
        """
        count = min(count, self.spec.paths)
        if users.device.type != "cpu":
            codes, logs = self.search(users, count)
            return codes.cpu().numpy(), logs.cpu().numpy()
        model = Served.load(
            self.spec, {f"paths.{n}": each.detach().numpy() for n, each in self.named_parameters()}
        )
        rows = users.detach().contiguous().numpy()
        if threads == 1:
            return model.beam(rows, count)
        with ThreadPoolExecutor(threads, thread_name_prefix="build") as pool:
            parts = pool.map(lambda part: model.beam(part, count), np.array_split(rows, threads))
            every, scores = zip(*parts, strict=True)
        return np.concatenate(every), np.concatenate(scores)

    def search(self, users: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return what `beam` returns, as tensors on the model's device."""
        rows = max(CHUNK_CELLS // (self.spec.width * count), 1)
        was = self.training
        self.eval()
        with torch.no_grad():
            parts = [self._search(part, count) for part in users.split(rows)]
        self.train(was)
        codes, scores = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(scores)

    def _search(self, users: Tensor, count: int) -> tuple[Tensor, Tensor]:
        width = self.spec.width
        scores = torch.log_softmax(
            self._logits(0, users, users.new_empty(len(users), 0, dtype=torch.long)), 1
        )
        scores, at = scores.topk(min(count, width), 1)
        nodes = at.unsqueeze(2)
        for layer in range(1, self.spec.depth):
            each = torch.log_softmax(self._logits(layer, users, nodes), 2) + scores.unsqueeze(2)
            scores, at = each.flatten(1).topk(min(count, each.shape[1] * width), 1)
            before = nodes.gather(1, (at // width).unsqueeze(2).expand(-1, -1, layer))
            nodes = torch.cat([before, (at % width).unsqueeze(2)], 2)
        codes = nodes[..., 0]
        for layer in range(1, self.spec.depth):
            codes = codes * width + nodes[..., layer]
        return codes, scores

    def _logits(self, layer: int, users: Tensor, nodes: Tensor) -> Tensor:
        """Return float32[n, K] of the first layer, float32[n, J, K] of the others; nodes: int64[n, J, layer]."""
        linears = self.layers[layer]
        assert isinstance(linears, nn.ModuleList)
        weight, bias = linears[0].weight, linears[0].bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        e = self.spec.dimension
        x = F.linear(users, weight[:, :e], bias)
        if layer:
            x = x.unsqueeze(1)
            for before in range(layer):
                embedding = self.nodes[before].weight
                assert isinstance(embedding, Tensor)
                table = embedding @ weight[:, e * (before + 1) : e * (before + 2)].T
                x = x + F.embedding(nodes[..., before], table)
        for linear in list(linears)[1:]:
            x = linear(dropped(F.relu(x), self.dropout, self.training))
        return x


class Ranker(nn.Module):
    """The softmax over all items that reranks what the paths found: u . w_v + b_v (section 2.3).

    Args:
        items: rows.
        dimension: of the users' vectors.
    """

    def __init__(self, items: int, dimension: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(items, dimension, _weight=torch.randn(items, dimension) * 0.02)
        self.bias = nn.Embedding(items, 1, _weight=torch.zeros(items, 1))

    def forward(self, rows: Tensor) -> Tensor:
        """Return float32[n, e + 1], vectors with their bias behind: the product with (u, 1) is the logit."""
        return torch.cat([self.vectors(rows), self.bias(rows)], 1)

    def whole(self) -> Tensor:
        """Return those of all items."""
        return torch.cat([self.vectors.weight, self.bias.weight], 1)


def with_one(users: Tensor) -> Tensor:
    """Return float32[n, e + 1], users' vectors with a 1 behind, which the bias of an item is multiplied by."""
    return torch.cat([users, users.new_ones(len(users), 1)], 1)


def _nodes(spec: PathSpec) -> nn.Embedding:
    table = nn.Embedding(spec.width, spec.dimension, _weight=torch.empty(spec.width, spec.dimension))
    nn.init.normal_(table.weight, std=1 / math.sqrt(spec.dimension))
    return table


def _linear(inner: int, outer: int) -> nn.Linear:
    layer = nn.Linear(inner, outer)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
