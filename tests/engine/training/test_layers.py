"""Layers beside what torch makes of the same."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")
from torch.nn import functional as F  # noqa: E402, N812

from engine.training.layers import COSINE_EPS, unit  # noqa: E402


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5)])
def test_unit_is_torchs_normalize_and_so_is_its_gradient(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[0] = 0  # no length at all
    x[1] *= 1e-14  # below the limit
    weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
    found = []
    for normalise in (unit, lambda each: F.normalize(each, dim=-1, eps=COSINE_EPS)):
        leaf = x.clone().requires_grad_()
        made = normalise(leaf)
        (gradient,) = torch.autograd.grad((made * weights).sum(), leaf)
        found.append((made.detach(), gradient))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
