"""Fixtures around the world of `online_world`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from online_world import World, make_world, serving_thread


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def string_world() -> World:
    return make_world("string")


@pytest.fixture(scope="module")
def target(world: World) -> Iterator[str]:
    """The address of a running server."""
    with serving_thread(world) as port:
        yield f"127.0.0.1:{port}"
