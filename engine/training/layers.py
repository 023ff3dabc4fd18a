"""Layers that towers are made of: tables of embeddings, linear layers, dropout, and crosses of fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn import functional as F  # noqa: N812

from engine.models.spec import ModelSpec

COSINE_EPS = 1e-12
"""Vectors shorter than this are divided by it, not by their length."""


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with a share of its cells set to 0 and the rest scaled up, while training.

    On the CPU a cell is kept by a byte, eight to a draw of the generator: torch draws a number per cell, which is a tenth
    of a step of SASRec. So the share is rounded to a 256th there.
    """
    if not share or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    cut = min(round(share * 256), 255)
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = (drawn.view(torch.uint8)[: x.numel()] >= cut).view(x.shape)
    return x * kept.to(x.dtype).mul_(256 / (256 - cut))


def unit(x: Tensor) -> Tensor:
    """Return float32[..., width] vectors of length 1: x / max(|x|, `COSINE_EPS`), as torch's `normalize` gives.

    Torch puts its gradient together from those of the norm, of the limit and of the division: for all items of a
    catalogue that is a fourth of a step of `user_softmax`. Here it is (g - y (y . g)) / |x|.
    """
    made: Tensor = _Unit.apply(x)
    return made


class _Unit(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = lengths.clamp_min(COSINE_EPS).reciprocal_()
        made = x * inverse
        ctx.save_for_backward(made, inverse, lengths > COSINE_EPS)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        made, inverse, turns = ctx.saved_tensors
        # Below the limit x is only scaled.
        along = torch.linalg.vecdot(made, gradient).unsqueeze(-1) * turns
        return torch.addcmul(gradient, made, along, value=-1).mul_(inverse)


def table_of(size: int, width: int) -> nn.Embedding:
    """Return a table of embeddings, float32[size, width], freshly initialised."""
    table = nn.Embedding(max(size, 1), width, _weight=torch.empty(max(size, 1), width))
    nn.init.normal_(table.weight, std=0.02)
    return table


def linear(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer, freshly initialised."""
    layer = nn.Linear(inner, outer, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DeepCross(nn.Module):
    """DCN-v2."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(width, width) for _ in range(spec.cross_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[n, width] from what `joined` gives, float32[n, width]."""
        first = x
        for layer in self.layers:
            x = first * layer(x) + x
        return x


class Senet(nn.Module):
    """Reweighting of the fields by what all of them say."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.widths = fields
        self.squeeze = linear(len(fields), (len(fields) + 1) // 2)
        self.excite = linear((len(fields) + 1) // 2, len(fields))
        nn.init.ones_(
            self.excite.bias
        )  # every field counts at first: with ReLU a field at 0 would stay there

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[n, width] from what `joined` gives, float32[n, width]."""
        fields = x[:, : sum(self.widths)].split(list(self.widths), 1)
        return torch.cat([*self.reweighted(fields), x[:, sum(self.widths) :]], 1)

    def reweighted(self, fields: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the fields, each times its weight."""
        means = torch.stack([field.mean(1) for field in fields], 1)
        weights = F.relu(self.excite(F.relu(self.squeeze(means))))
        return [field * weights[:, at : at + 1] for at, field in enumerate(fields)]


class Fibinet(Senet):
    """Bilinear interactions of the fields as they are and reweighted."""

    def __init__(self, spec: ModelSpec, fields: tuple[int, ...], width: int) -> None:
        super().__init__(spec, fields, width)
        self.bilinear = linear(fields[0], fields[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32[n, wider] from what `joined` gives, float32[n, width]."""
        fields = x[:, : sum(self.widths)].split(list(self.widths), 1)
        made = []
        for side in (fields, self.reweighted(fields)):
            turned = [self.bilinear(field) for field in side]
            made += [turned[f] * side[g] for f in range(len(side)) for g in range(f + 1, len(side))]
        return torch.cat([*made, x[:, sum(self.widths) :]], 1)
