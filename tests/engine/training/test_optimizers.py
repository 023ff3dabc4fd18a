"""The lazy optimiser and the pooled gradient against torch's own."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")

from engine.training.optimizers import Optimizer  # noqa: E402
from engine.training.pooling import pooled  # noqa: E402

ROWS, WIDTH = 9, 5


def table(sparse):
    torch.manual_seed(0)
    return torch.nn.Embedding(ROWS, WIDTH, sparse=sparse)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_lazy_adam_is_adam_where_every_row_is_read(kind):
    made = []
    for sparse in (False, True):
        embedding = table(sparse)
        optimizer = Optimizer({"t": embedding.weight}, {"t"} if sparse else set(), kind, 0.01, 0.1)
        codes = torch.cat([torch.arange(ROWS), torch.tensor([3, 3, 1])])
        for step in range(12):
            optimizer.zero()
            (embedding(codes) * (step + 1)).square().sum().backward()
            optimizer.step()
        made.append(embedding.weight.detach())
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-6)


def test_lazy_adam_leaves_other_rows_alone_and_steps_a_late_row_as_far_as_an_early_one():
    embedding = table(sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = Optimizer({"t": embedding.weight}, {"t"}, "adam", 0.01, 0.0)
    for code in (1, 1, 1, 1, 1, 1, 1, 1, 2):
        optimizer.zero()
        embedding(torch.tensor([code])).sum().backward()
        optimizer.step()
    moved = (before - embedding.weight.detach()).abs().amax(1)
    assert moved[2] == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(moved[[0, 3, 4, 5, 6, 7, 8]], torch.zeros(7))


def test_the_state_of_an_optimizer_goes_on_where_it_was():
    def steps(count, optimizer, embedding):
        for _ in range(count):
            optimizer.zero()
            embedding(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()

    made = []
    for broken in (False, True):
        embedding = table(sparse=True)
        optimizer = Optimizer({"t": embedding.weight}, {"t"}, "adam", 0.01, 0.0)
        steps(3, optimizer, embedding)
        if broken:
            state = optimizer.state()
            optimizer = Optimizer({"t": embedding.weight}, {"t"}, "adam", 0.01, 0.0)
            optimizer.load(state)
        steps(3, optimizer, embedding)
        made.append(embedding.weight.detach())
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_the_pooled_gradient_is_torchs(exponent):
    offsets = np.array([0, 3, 3, 4, 8], np.int64)
    codes = torch.tensor([1, 1, 2, 8, 0, 2, 5, 1])
    scale = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    made = []
    for sparse in (False, True):
        embedding = table(sparse)
        weights = None if exponent is None else torch.linspace(0.1, 2, embedding.num_embeddings)
        means = pooled(embedding, codes, offsets, weights, exponent or 1.0)
        if weights is not None:
            last = (weights[codes[4:], None] * embedding.weight[codes[4:]]).sum(0) / 4**exponent
            torch.testing.assert_close(means[3], last)
        assert torch.equal(means[1], torch.zeros(WIDTH))
        (means * scale).sum().backward()
        made.append((means.detach(), embedding.weight.grad.to_dense()))
    torch.testing.assert_close(made[0], made[1])
