"""Where exposures are kept: as bits with the user's other keys in the state store, or by pybloom-live in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from engine.core.candidates import FanOut
from engine.core.errors import ConfigError
from engine.core.exposure import ExposureBits, ExposureLayout, never_shown
from engine.core.live import Exposure
from engine.core.types import BoolArray, Int64Array

PYBLOOM_ERROR_RATE = 0.0025
"""Of the first filter of a slice; its chain doubles and adds 0.9 of the rate before with each link, which stays below
1 % at 20 times the planned exposures."""


class ExposureBackend(Protocol):
    """Keeps exposures per user and time slice.

    Attributes:
        in_store: whether the bits ride with the user's keys in the state store; where not, `record` and `view` are
            all there is.
        layout: the shape of a slice's filter.
    """

    in_store: bool
    layout: ExposureLayout

    def slice_number(self, now: float) -> int:
        """Return the slice that an exposure of this moment (seconds since the epoch) belongs to."""

    def slice_numbers(self, now: float) -> list[int]:
        """Return the slices to read at this moment, newest first; [] where they are not in the store."""

    def view(self, users: Sequence[bytes], bits: ExposureBits) -> Exposure:
        """Return what the users of a batch were shown.

        Args:
            users: [n], the user's tag; b"" for a guest, to whom nothing was shown.
            bits: theirs, as read from the store; none where they are not there.
        """

    def record(self, user: bytes, keys: Int64Array, now: float) -> None:
        """Remember exposures outside the store, once all else of the report is durable."""


class BitsBackend:
    """Bits in the state store, in the format of docs/exposure-format.md; the store's script writes them."""

    in_store = True

    def __init__(self, layout: ExposureLayout, slice_seconds: int, slices: int) -> None:
        """Take the shape of a slice.

        Args:
            layout: of its filter.
            slice_seconds: its length.
            slices: full slices remembered besides the current one.
        """
        self.layout = layout
        self._slice_seconds = slice_seconds
        self._slices = slices

    def slice_number(self, now: float) -> int:
        """Return the slice that an exposure of this moment belongs to."""
        return int(now // self._slice_seconds)

    def slice_numbers(self, now: float) -> list[int]:
        """Return the slices to read: the one to come too, where a clock may have been that was ahead of this one."""
        newest = self.slice_number(now) + 1
        return list(range(newest, newest - self._slices - 2, -1))

    def view(self, users: Sequence[bytes], bits: ExposureBits) -> ExposureBits:
        """Return the bits."""
        del users
        return bits

    def record(self, user: bytes, keys: Int64Array, now: float) -> None:
        """Do nothing: the bits are written with the rest of the report."""


class PybloomBackend:
    """A pybloom-live ScalableBloomFilter per user and slice, in this process's memory: lost when it ends.

    For one worker: another one's exposures are not seen here. Safe to use from several threads.
    """

    in_store = False

    def __init__(self, layout: ExposureLayout, slice_seconds: int, slices: int) -> None:
        """Take the shape of a slice; of the layout, the planned exposures count.

        Raises:
            ConfigError: pybloom-live is not installed.
        """
        try:
            from pybloom_live import ScalableBloomFilter
        except ImportError as error:
            raise ConfigError(
                "pybloom-live is not installed: pip install 'recall-engine[pybloom]'",
                "state.exposure.backend",
            ) from error
        self._new = ScalableBloomFilter
        self.layout = layout
        self._slice_seconds = slice_seconds
        self._slices = slices
        self._lock = threading.Lock()
        self._users: dict[bytes, dict[int, Any]] = {}
        self._oldest = 0
        self._now = 0.0

    def slice_number(self, now: float) -> int:
        """Return the slice that an exposure of this moment belongs to."""
        return int(now // self._slice_seconds)

    def slice_numbers(self, now: float) -> list[int]:
        """Return nothing: no slice is in the store."""
        self._forget(now)
        return []

    def view(self, users: Sequence[bytes], bits: ExposureBits) -> PybloomExposure:
        """Return the filters of a batch's users."""
        del bits
        with self._lock:
            return PybloomExposure(
                [list(self._users[user].values()) if user in self._users else [] for user in users],
                self._lock,
            )

    def record(self, user: bytes, keys: Int64Array, now: float) -> None:
        """Add exposures to the current slice."""
        self._forget(now)
        with self._lock:
            slices = self._users.setdefault(user, {})
            number = self.slice_number(now)
            if number not in slices:
                slices[number] = self._new(
                    self.layout.planned, PYBLOOM_ERROR_RATE, self._new.SMALL_SET_GROWTH
                )
            for key in keys.tolist():
                slices[number].add(key)

    def _forget(self, now: float) -> None:
        """Drop the slices that are too old; looks through the users once per slice."""
        oldest = self.slice_number(now) - self._slices
        with self._lock:
            if oldest <= self._oldest:
                return
            self._oldest = oldest
            for user, slices in list(self._users.items()):
                left = {number: bits for number, bits in slices.items() if number >= oldest}
                if left:
                    self._users[user] = left
                else:
                    del self._users[user]


class PybloomExposure:
    """The filters of a batch's users; implements `engine.core.live.Exposure`."""

    def __init__(self, slices: Sequence[Sequence[Any]], lock: threading.Lock) -> None:
        self._slices = slices
        self._lock = lock

    def seen(self, candidates: FanOut, keys: Int64Array) -> BoolArray:
        """Return bool[m]: True where the candidate's user was shown it, or where a filter says so by chance."""
        found = np.zeros(candidates.rows.size, np.bool_)
        if not any(self._slices):
            return found
        wanted = keys[candidates.rows].tolist()
        owner = candidates.query_of_candidate().tolist()
        with self._lock:
            for at, (key, q) in enumerate(zip(wanted, owner, strict=True)):
                found[at] = any(key in bits for bits in self._slices[q])
        return found

    def shown(self) -> Int64Array:
        """int64[n]: how many exposures each user's filters hold."""
        return np.array([sum(len(bits) for bits in slices) for slices in self._slices], np.int64)

    def alone(self, q: int) -> PybloomExposure:
        """Return query q's part as that of a batch of one."""
        return PybloomExposure(self._slices[q : q + 1], self._lock)

    def measure(self, seed: int) -> tuple[int, int, int, int]:
        """Return (probes, positives, 0, 0): see `Exposure.measure`."""
        candidates, keys = never_shown(np.array([bool(slices) for slices in self._slices], np.bool_), seed)
        return candidates.rows.size, int(np.count_nonzero(self.seen(candidates, keys))), 0, 0


def exposure_backend(
    name: Literal["bits", "pybloom"], layout: ExposureLayout, slice_seconds: int, slices: int
) -> ExposureBackend:
    """Return the backend that `state.exposure.backend` names.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    kind = PybloomBackend if name == "pybloom" else BitsBackend
    return kind(layout, slice_seconds, slices)
