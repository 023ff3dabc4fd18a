"""Queries as the user tower reads them: who asks, from where, when, and what they did."""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.core.keys import keys_of
from engine.core.query import History, QueryBatch
from engine.core.sealed import sealed
from engine.core.types import Int32Array
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.features.codes import CITY, DEVICE, hash_codes, hour_codes
from engine.models.features.encoder import Encoder
from engine.models.features.table import take_encoded
from engine.models.spec import HOUR, USER_ID


class QueryEncoder:
    """Encodes a batch of queries for the user tower: who asks, from where, when, and what they did."""

    def __init__(self, encoder: Encoder, table: Encoded, items: int, length: int) -> None:
        """Take what is needed.

        Args:
            encoder: of the user features.
            table: the encoded rows of all users of the catalogue.
            items: rows of the catalogue that have a code in sequences.
            length: newest items read; 0: the tower has no sequence.
        """
        self._table = table
        self._items = items
        self._length = length
        self._hour = encoder.code_column(HOUR)
        self._city = encoder.code_column(CITY)
        self._cities = encoder.words(CITY)
        self._hashed_user = -1
        self._hashed_size = 0
        self._devices: list[tuple[int, str, dict[str, int]]] = []
        for feature in encoder.features:
            column = encoder.code_column(feature.name)
            if feature.name == USER_ID and feature.lookup == "hash":
                self._hashed_user, self._hashed_size = column, feature.size
            if feature.name.startswith(DEVICE):
                attribute = feature.name.removeprefix(DEVICE)
                self._devices.append((column, attribute, encoder.words(feature.name)))

    def encode(self, batch: QueryBatch) -> EncodedUsers:
        """Encode a batch: what the request says of city and device stands in for what the catalogue knows."""
        own = take_encoded(self._table, batch.users)
        codes = own.codes
        if self._hour >= 0:
            codes[:, self._hour] = hour_codes(batch.now)
        if self._city >= 0:
            for q, city in enumerate(batch.cities):
                if city:
                    codes[q, self._city] = self._cities.get(city, 0)
        for column, attribute, words in self._devices:
            for q, device in enumerate(batch.devices):
                if attribute in device:
                    codes[q, column] = words.get(device[attribute], 0)
        if self._hashed_user >= 0:
            ids = batch.user_ids
            keys = ids.astype(np.int64) if ids.dtype.kind == "i" else keys_of(ids.tolist())
            hashed = hash_codes(keys, self._hashed_size)
            codes[:, self._hashed_user] = np.where(batch.guests, 0, hashed)
        sequence, lengths = encode_histories(batch.history, self._items, self._length)
        return EncodedUsers(codes, own.multi, own.numbers, sequence, lengths)


def encode_histories(history: History, items: int, length: int) -> tuple[Int32Array, Int32Array]:
    """Return what users did as the towers read it.

    Args:
        history: newest first.
        items: rows from here on have no code and are left out.
        length: newest items kept.

    Returns:
        int32[n, longest] codes (row + 1), right-aligned, newest last, 0 is padding; int32[n] lengths.
    """
    n = history.offsets.size - 1
    if not length or not history.rows.size:
        return np.zeros((n, 0), np.int32), np.zeros(n, np.int32)
    longest = int(min((history.offsets[1:] - history.offsets[:-1]).max(), length))
    codes = np.zeros((n, longest), np.int32)
    lengths = np.zeros(n, np.int32)
    _encode_histories(sealed(history.rows), history.offsets, items, codes, lengths)
    return codes, lengths


@njit(nogil=True, cache=True)
def _encode_histories(rows, offsets, items, codes, lengths):  # type: ignore[no-untyped-def]
    most = codes.shape[1]
    for q in range(lengths.size):
        taken = 0
        for p in range(offsets[q], offsets[q + 1]):
            row = rows[p]
            if 0 <= row < items:
                codes[q, most - 1 - taken] = row + 1
                taken += 1
                if taken == most:
                    break
        lengths[q] = taken


def encode_histories_reference(history: History, items: int, length: int) -> tuple[Int32Array, Int32Array]:
    """The plain twin of `encode_histories`: what its tests hold it to."""
    lists = []
    for q in range(history.offsets.size - 1):
        mine = history.rows[history.offsets[q] : history.offsets[q + 1]].tolist()
        lists.append([row + 1 for row in mine if 0 <= row < items])
    longest = min(max((int(d) for d in np.diff(history.offsets)), default=0), length)
    codes = np.zeros((len(lists), longest), np.int32)
    for q, mine in enumerate(lists):
        for place, code in enumerate(mine[:longest]):
            codes[q, longest - 1 - place] = code
    return codes, np.array([min(len(mine), longest) for mine in lists], np.int32)
