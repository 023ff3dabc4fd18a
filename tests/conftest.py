"""Fixtures for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start servers: they wait as much as they compute, and the last to begin ends last."""
    root = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent not in (root / "loadtest", root))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that lies beside the repository; most of them may not be redistributed."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here (shared/data beside the repository)")
    return folder
