"""Earlier impressions that are learnt again: what keeps a model that reads a stream once from forgetting.

A stream in order of time has few users at a time, and what a step learns of them undoes some of what earlier steps learnt
(McCloskey and Cohen 1989). Impressions from memory in each batch are the usual remedy (Lin 1992; Rolnick et al. 2019,
"Experience Replay for Continual Learning"). The memory is of one size. Once it is full each new impression takes the
place of one drawn at random, so that of what is as old as the memory is long 1 / e is left (Aggarwal 2006, "On Biased
Reservoir Sampling in the Presence of Stream Evolution"): in a plain reservoir all times are alike, and interests that are
gone would stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from engine.core.types import AnyArray, Int32Array
from engine.models.encoded import EncodedUsers, Multi
from engine.training.impressions import ImpressionBatch


class Memory:
    """Up to `size` impressions, their users with what they had done by then.

    Args:
        size: impressions.
        read: items of a history that are kept, the newest.
    """

    def __init__(self, size: int, read: int) -> None:
        self._size, self._read = size, read
        self._count = 0
        self._columns: dict[str, AnyArray] = {}
        # Of each feature with many codes: those of each impression.
        self._many: list[list[Int32Array]] = []

    def __len__(self) -> int:
        return self._count

    def draw(self, batch: ImpressionBatch, count: int, random: np.random.Generator) -> ImpressionBatch:
        """Return a batch with `count` impressions from memory behind its own, drawn evenly, repeats allowed; while there
        are none, the batch."""
        if not self._count or not count:
            return batch
        drawn = random.integers(0, self._count, count)
        columns = {
            name: np.concatenate((column, self._columns[name][drawn]))
            for name, column in self._columns_of(batch).items()
        }
        multi = []
        for many, kept in zip(batch.encoded.multi, self._many, strict=True):
            again = packed([kept[at] for at in drawn.tolist()])
            offsets = np.concatenate((many.offsets, many.offsets[-1] + again.offsets[1:]))
            multi.append(Multi(np.concatenate((many.codes, again.codes)), offsets))
        users = EncodedUsers(
            columns["codes"], tuple(multi), columns["numbers"], columns["sequence"], columns["lengths"]
        )
        return ImpressionBatch(
            columns["users"], users, columns["items"], columns["rewards"], columns["timestamps"]
        )

    def keep(self, batch: ImpressionBatch, random: np.random.Generator) -> None:
        """Take in the impressions of a batch, copied."""
        new, n = self._columns_of(batch), len(batch)
        room = min(n, self._size - self._count)
        places = np.concatenate((self._count + np.arange(room), random.integers(0, self._size, n - room)))
        if not self._columns:
            self._columns = {
                name: np.zeros((self._size, *column.shape[1:]), column.dtype) for name, column in new.items()
            }
            self._many = [[] for _ in batch.encoded.multi]
        self._count += room
        # Of two impressions with one place the later one stays.
        for name, column in new.items():
            self._columns[name][places] = column
        for many, kept in zip(batch.encoded.multi, self._many, strict=True):
            kept.extend([many.codes[:0]] * room)
            for place, (begin, end) in zip(places.tolist(), pairwise(many.offsets.tolist()), strict=True):
                kept[place] = many.codes[begin:end].copy()

    def state(self) -> dict[str, AnyArray]:
        """Return what `load` takes: arrays, copied."""
        made = {name: column[: self._count].copy() for name, column in self._columns.items()}
        for at, kept in enumerate(self._many):
            many = packed(kept)
            made |= {f"multi.{at}.codes": many.codes, f"multi.{at}.offsets": many.offsets}
        return made

    def load(self, state: Mapping[str, AnyArray]) -> None:
        """Go on from a state; ValueError where it holds more than there is room for."""
        self._columns, self._many, self._count = {}, [], 0
        if not state:
            return
        self._count = int(state["items"].size)
        if self._count > self._size:
            raise ValueError(
                f"it remembers {self._count:,} impressions, and there is room for {self._size:,}"
            )
        for name, column in state.items():
            if not name.startswith("multi."):
                self._columns[name] = np.zeros((self._size, *column.shape[1:]), column.dtype)
                self._columns[name][: self._count] = column
        while (codes := state.get(f"multi.{len(self._many)}.codes")) is not None:
            bounds = pairwise(state[f"multi.{len(self._many)}.offsets"].tolist())
            self._many.append([codes[begin:end].copy() for begin, end in bounds])

    def _columns_of(self, batch: ImpressionBatch) -> dict[str, AnyArray]:
        users = batch.encoded
        width = min(users.sequence.shape[1], self._read)
        sequence = np.zeros((len(batch), self._read), np.int32)
        sequence[:, self._read - width :] = users.sequence[:, users.sequence.shape[1] - width :]
        return {
            "users": batch.users, "items": batch.items, "rewards": batch.rewards, "timestamps": batch.timestamps,
            "codes": users.codes, "numbers": users.numbers, "sequence": sequence,
            "lengths": np.minimum(users.lengths, self._read),
        }  # fmt: skip


def packed(rows: list[Int32Array]) -> Multi:
    """Return the codes of rows, end to end."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    return Multi(np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32), offsets)
