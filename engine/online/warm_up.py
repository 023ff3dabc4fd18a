"""Warm-up: what serving will run is run before, so that every kernel is compiled, or loaded, before a caller comes.

What it will read is read before, too: a page of a snapshot that nobody looked at yet costs a fault, or a wait for the
disk.
"""

from __future__ import annotations

import numpy as np

from engine.config import Config
from engine.core.errors import RecallError
from engine.data.snapshot import touch
from engine.online.encode import encode
from engine.online.recalls import recalled
from engine.online.rehearsal import rehearse
from engine.online.replica import Replica
from engine.online.request import RecentItems, Request
from engine.online.state import State
from engine.online.tally import SceneTally


def warm_up(config: Config, replica: Replica, state: State | None = None) -> None:
    """Read the snapshots, run a few requests through every scene, and with a state store what live state brings.

    Nothing is changed by it.

    Raises:
        RecallError: if a scene cannot answer.
    """
    touch(replica.snapshots.values())
    with replica.guards.patient():
        _ask_every_scene(replica)
        if state is not None:
            try:
                rehearse(config, replica, state)
            except Exception as error:
                raise RecallError(f"live state cannot be served: {error!r}") from error


def _ask_every_scene(replica: Replica) -> None:
    catalogue = replica.catalogue
    guest = Request()
    requests = [guest]
    if len(catalogue.users) and len(catalogue.items):
        user = catalogue.users.ids(np.zeros(1, np.int32)).tolist()[0]
        item = catalogue.items.ids(np.zeros(1, np.int32))
        recent = RecentItems(
            ids=item,
            points=np.ones(1, np.float32),
            timestamps=np.zeros(1, np.int64),
            kinds=np.zeros(1, np.int64),
            override=False,
        )
        requests += [Request(user_id=user), Request(user_id=user, recent=recent, excluded=item)]
    for scene, pipeline in replica.pipelines.items():
        # One alone and several together go through different code.
        for batch in (*([request] for request in requests), requests):
            try:
                run = pipeline.run(batch)
                encode(replica, pipeline, run, ["warm-up"] * len(batch), [True] * len(batch))
                recalled(pipeline, run, replica.catalogue.columns.keys)
                SceneTally(pipeline).add(pipeline, run, [0.0] * len(batch))
            except Exception as error:
                raise RecallError(f"scene {scene!r} cannot answer: {error!r}") from error
