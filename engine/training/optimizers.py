"""Adam for dense layers, and a lazy Adam that touches only the rows of a table that a batch read.

Dense Adam reads and writes a whole table and both its moments each step, however few rows a batch read. docs/training.md
has what that costs. The lazy form moves a row, and lets its moments fade, only when it was read; the bias correction
counts the steps of the row, not of the run, so that a rare item's first step is as long as a frequent one's was. (Other
lazy Adams correct by the steps of the run: then a row first read late makes a first step of about 3 times the rate.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

LAZY_ROWS = 8192
"""Tables with more rows than this are updated lazily: below, one fused dense step is as fast."""


class Optimizer:
    """One step over everything that is trained.

    Args:
        parameters: what is trained, by name.
        lazy: names of the tables among them whose gradients are sparse.
        kind: `adam` or `adamw`.
        rate: step size; decay: of the weights.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], lazy: set[str], kind: str, rate: float, decay: float
    ) -> None:
        dense = [value for name, value in parameters.items() if name not in lazy]
        make = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        self._dense = (
            make(dense, lr=rate, betas=(BETA1, BETA2), eps=EPS, weight_decay=decay, fused=True)
            if dense
            else None
        )
        self._rows = {
            name: _Rows(parameters[name], rate, decay, kind == "adamw")
            for name in sorted(lazy & set(parameters))
        }

    def zero(self) -> None:
        """Forget the gradients."""
        if self._dense is not None:
            self._dense.zero_grad(set_to_none=True)
        for rows in self._rows.values():
            rows.table.grad = None

    def set_rate(self, rate: float) -> None:
        """Use another step size from now on."""
        if self._dense is not None:
            for group in self._dense.param_groups:
                group["lr"] = rate
        for rows in self._rows.values():
            rows.rate = rate

    def step(self) -> None:
        """Move what has a gradient."""
        if self._dense is not None:
            self._dense.step()
        for rows in self._rows.values():
            rows.step()

    def state(self) -> dict[str, Any]:
        """Return what `load` takes."""
        return {
            "dense": None if self._dense is None else self._dense.state_dict(),
            "rows": {name: rows.state() for name, rows in self._rows.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        if self._dense is not None:
            self._dense.load_state_dict(state["dense"])
        for name, rows in self._rows.items():
            rows.load(state["rows"][name])


class _Rows:
    """Lazy Adam of one table on the CPU."""

    def __init__(self, table: nn.Parameter, rate: float, decay: float, decoupled: bool) -> None:
        self.table, self.rate, self._decay, self._decoupled = table, rate, decay, decoupled
        size, width = table.shape
        self._first = np.zeros((size, width), np.float32)
        self._second = np.zeros((size, width), np.float32)
        self._steps = np.zeros(size, np.int32)
        self._slots = np.full(size, -1, np.int32)
        self._sums = np.empty((0, width), np.float32)

    def step(self) -> None:
        gradient = self.table.grad
        if gradient is None:
            return
        indices, values = gradient._indices()[0].numpy(), gradient._values().numpy()
        if self._sums.shape[0] < min(indices.size, self.table.shape[0]):
            self._sums = np.empty(
                (min(2 * indices.size, self.table.shape[0]), self.table.shape[1]), np.float32
            )
        row_adam(
            indices, values, self.table.detach().numpy(), self._first, self._second, self._steps, self._slots,
            np.empty(min(indices.size, self._slots.size), np.int64), self._sums, self.rate, self._decay,
            self._decoupled,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return {
            "first": torch.from_numpy(self._first),
            "second": torch.from_numpy(self._second),
            "steps": torch.from_numpy(self._steps),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self._first[:] = state["first"].numpy()
        self._second[:] = state["second"].numpy()
        self._steps[:] = state["steps"].numpy()


# error_model: a check of each division for zero would keep the loops from being vectorised, which is 6 times the time.
@njit(nogil=True, cache=True, error_model="numpy")
def row_adam(indices, values, table, first, second, steps, slots, touched, sums, rate, decay, decoupled):  # type: ignore[no-untyped-def]
    """Add up the gradients of each row that is named, then do one step of Adam on these rows.

    Args:
        indices: int64[n], rows, in any order, repeats allowed; values: float32[n, width].
        table, first, second: float32[rows, width], changed in place; steps: int32[rows], likewise.
        slots: int32[rows], all -1 before and after; touched, sums: scratch for the distinct rows.
    """
    width = table.shape[1]
    count = 0
    for k in range(indices.size):
        row = indices[k]
        slot = slots[row]
        if slot < 0:
            slots[row] = count
            touched[count] = row
            for j in range(width):
                sums[count, j] = values[k, j]
            count += 1
        else:
            for j in range(width):
                sums[slot, j] += values[k, j]
    touched[:count].sort()  # rows in rising order: the tables are larger than the caches
    b1, b2 = np.float32(BETA1), np.float32(BETA2)
    one, eps, shrink = np.float32(1), np.float32(EPS), np.float32(decay)
    for k in range(count):
        row = touched[k]
        slot = slots[row]
        slots[row] = -1
        steps[row] += 1
        correction = math.sqrt(1.0 - BETA2 ** steps[row])
        scale = np.float32(rate * correction / (1.0 - BETA1 ** steps[row]))
        # eps stands beside sqrt(v / (1 - b2^t)), as in torch.
        small = np.float32(eps * correction)
        weight, gradient, mean, square = table[row], sums[slot], first[row], second[row]
        if decay > 0:
            for j in range(width):
                if decoupled:
                    weight[j] *= one - np.float32(rate) * shrink
                else:
                    gradient[j] += shrink * weight[j]
        for j in range(width):
            mean[j] = b1 * mean[j] + (one - b1) * gradient[j]
            square[j] = b2 * square[j] + (one - b2) * gradient[j] * gradient[j]
        for j in range(width):
            weight[j] -= scale * mean[j] / (np.sqrt(square[j]) + small)


def lazy_tables(modules: Iterable[tuple[str, nn.Module]], device: torch.device) -> set[str]:
    """Make the large tables give sparse gradients and return their parameters' names; none on an accelerator.

    Args:
        modules: named modules; tables that something reads whole must not be among them.
    """
    chosen = set()
    for name, module in modules:
        if isinstance(module, nn.Embedding):
            module.sparse = device.type == "cpu" and module.num_embeddings > LAZY_ROWS
            if module.sparse:
                chosen.add(f"{name}.weight")
    return chosen
