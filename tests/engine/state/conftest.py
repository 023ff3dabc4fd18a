"""The servers that the contract of the state store is tested against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stores import cluster, connected, redis_server, server

from engine.state.embedded import EmbeddedStore
from engine.state.store import StateStore


@pytest.fixture(scope="module", params=["embedded", "redis-server", "cluster"])
def any_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StateStore]:
    """A store on each kind of server."""
    folder = tmp_path_factory.mktemp("state")
    if request.param == "embedded":
        with EmbeddedStore(folder) as embedded:
            yield connected(embedded.url)
    elif request.param == "cluster":
        with cluster(folder) as url:
            yield connected(url)
    else:
        options = ("--port", "0", "--unixsocket", str(folder / "s"), "--appendonly", "yes")
        with server(redis_server(), folder, *options):
            yield connected(f"unix://{folder / 's'}")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateStore]:
    """A store on the embedded server."""
    with EmbeddedStore(tmp_path_factory.mktemp("state")) as running:
        yield connected(running.url)
