"""Names for what is planted, so that a person can read an answer: made of few words, unique by a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core.types import AnyArray

CATEGORIES = (
    "food", "sport", "music", "travel", "film", "books", "games", "garden", "animals", "science",
    "history", "fashion", "crafts", "cars", "health", "family", "money", "comedy", "photo", "news",
)  # fmt: skip
_ASPECTS = (
    "at home", "for beginners", "outdoors", "classics", "on a budget", "tips", "in winter", "stories", "reviews", "tools",
)  # fmt: skip
_FIRST = (
    "Ada",
    "Ben",
    "Chen",
    "Dora",
    "Emil",
    "Fatma",
    "Gil",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lea",
    "Mei",
    "Noor",
)
_LAST = (
    "Adler",
    "Brook",
    "Costa",
    "Dang",
    "Ek",
    "Fuchs",
    "Gray",
    "Huang",
    "Ito",
    "Jensen",
    "Kaya",
    "Lund",
    "Mora",
)
_BEGINNINGS = (
    "Al",
    "Bram",
    "Cor",
    "Dun",
    "El",
    "Fair",
    "Gold",
    "Hal",
    "Iver",
    "Kes",
    "Lin",
    "Mor",
    "Nor",
    "Oak",
    "Red",
)
_ENDINGS = (
    "bach",
    "bury",
    "dal",
    "field",
    "ford",
    "ham",
    "hausen",
    "low",
    "mouth",
    "port",
    "stad",
    "ton",
    "ville",
    "wick",
)


def category_names(interests: int) -> list[str]:
    """The category of each interest."""
    return [CATEGORIES[k % len(CATEGORIES)] for k in range(interests)]


def interest_names(interests: int) -> list[str]:
    """What each interest is called: its category and an aspect of it."""
    return _numbered(
        [
            f"{category} {_ASPECTS[k // len(CATEGORIES) % len(_ASPECTS)]}"
            for k, category in enumerate(category_names(interests))
        ],
        len(CATEGORIES) * len(_ASPECTS),
    )


def city_names(cities: int) -> list[str]:
    """What each city is called."""
    n, m = len(_BEGINNINGS), len(_ENDINGS)
    return _numbered([_BEGINNINGS[c % n] + _ENDINGS[(c // n + c % n) % m] for c in range(cities)], n * m)


def author_names(authors: int) -> Any:
    """What each author is called, as a pyarrow array: names come again, as they do."""
    numbers = np.arange(authors)
    first = pa.array(_FIRST).take(pa.array(numbers % len(_FIRST)))
    last = pa.array(_LAST).take(pa.array(numbers % len(_LAST)))
    return pc.binary_join_element_wise(first, last, pa.array(numbers).cast(pa.string()), " ")


def titles(interests: list[str], main: AnyArray, groups: AnyArray, first: int) -> Any:
    """Titles of items with the ids from `first` on: interest, group and id."""
    ids = pa.array(np.arange(first, first + main.size)).cast(pa.string())
    named = pa.array(interests).take(pa.array(main))
    series = pa.array(groups).cast(pa.string())
    return pc.binary_join_element_wise(named, pa.scalar(": series "), series, pa.scalar(", no. "), ids, "")


def _numbered(names: list[str], period: int) -> list[str]:
    """Names that repeat with a period get a number from their second time on."""
    return [name if k < period else f"{name} {k // period + 1}" for k, name in enumerate(names)]
