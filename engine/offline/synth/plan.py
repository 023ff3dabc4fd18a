"""How large a synthetic data set is to be: sizes and span of time, held to their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from engine.core.errors import ConfigError
from engine.data.form import LATEST

DAY = 86_400
END = 1_706_745_600
"""2024-02-01 UTC: when the events end unless somebody says otherwise; a clock would make every run another."""

OLD_DAYS = 180
"""How long before the events the oldest items and follows are."""

_MOST = 500_000_000
_MOST_EVENTS = 1_000_000_000_000
_MOST_INTERESTS = 10_000
_MOST_CITIES = 100_000
_MOST_DAYS = 3_650


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a synthetic data set.

    Attributes:
        items, users, events: how many; events are rows of interactions, those of showing an item among them.
        days: the events are of that many days.
        interests, authors, cities: how many.
        end: when the events end, seconds since the epoch.
        seed: the same plan with the same seed makes the same bytes.
    """

    items: int
    users: int
    events: int
    days: int
    interests: int
    authors: int
    cities: int
    end: int
    seed: int

    @classmethod
    def of(
        cls,
        items: int,
        users: int,
        events: int,
        days: int = 30,
        interests: int | None = None,
        authors: int | None = None,
        cities: int | None = None,
        end: int = END,
        seed: int = 1,
    ) -> Self:
        """Return a plan; what is None follows from the number of items.

        Args:
            items, users, events, days, end, seed: as the attributes.
            interests: None: an interest per 100 items, at most 200.
            authors: None: an author per 20 items.
            cities: None: a city per 100 items, at most 300.

        Raises:
            ConfigError: a number that is out of its bounds, by the name of its option.
        """

        def bounded(name: str, value: int, least: int, most: int) -> int:
            if not least <= value <= most:
                raise ConfigError(f"expected a whole number from {least:,} to {most:,}, got {value:,}", name)
            return value

        bounded("--items", items, 1, _MOST)
        bounded("--users", users, 1, _MOST)
        bounded("--events", events, 1, _MOST_EVENTS)
        bounded("--days", days, 1, _MOST_DAYS)
        if interests is None:
            interests = min(max(items // 100, 1), 200)
        elif interests > items:
            text = (
                f"there cannot be more interests than items, got {interests:,} interests and {items:,} items"
            )
            raise ConfigError(text, "--interests")
        if authors is not None and authors > items:
            text = f"there cannot be more authors than items, got {authors:,} authors and {items:,} items"
            raise ConfigError(text, "--authors")
        return cls(
            items,
            users,
            events,
            days,
            bounded("--interests", interests, 1, _MOST_INTERESTS),
            bounded("--authors", max(items // 20, 1) if authors is None else authors, 1, _MOST),
            bounded(
                "--cities", min(max(items // 100, 1), 300) if cities is None else cities, 1, _MOST_CITIES
            ),
            bounded("--end", end, (days + OLD_DAYS) * DAY, LATEST),
            bounded("--seed", seed, 0, 2**63 - 1),
        )

    @property
    def start(self) -> int:
        """When the events begin, seconds since the epoch."""
        return self.end - self.days * DAY
