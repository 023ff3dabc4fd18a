"""What ingest acknowledges is in the event log; where it cannot be, the acknowledgement holds and the loss is counted."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from ingest_world import ingest_config, ingesting

from engine.client import Action, Event, Exposure, Follow, IngestClient
from engine.core.keys import key_of
from engine.state.events import EVENT, SHOWN, EventLog
from engine.state.layout import RECENT, kind_of
from engine.state.stream import START

NOW = 1_700_000_000
LOGGED = ingest_config(ingest={"event_log": True})


def metric(world, name: str) -> float:
    return world.metrics.registry.get_sample_value(f"recall_{name}_total") or 0.0


def logged(world) -> np.ndarray:
    return EventLog(world.store, 1000).read(START, 1000, 1)[0].records


def test_exposures_and_actions_go_in_with_their_own_times_and_once(tmp_path):
    with ingesting(tmp_path, config=LOGGED) as world, IngestClient(world.target) as client:
        events = [
            Event(4, Exposure([1, 2]), event_id="page", timestamp=NOW),
            Event(4, Action(2, "click", watch_seconds=7.5), event_id="play", timestamp=NOW + 9),
            Event(4, Follow(3), event_id="follow"),
            Event(4, Action(2, "zap")),
        ]
        for _ in range(2):
            client.report(events)
        records = logged(world)
        assert records.dtype == EVENT
        assert records["user"].tolist() == [4, 4, 4]
        assert records["item"].tolist() == [1, 2, 2]
        assert records["kind"].tolist() == [SHOWN, SHOWN, kind_of("click")]
        assert records["time"].tolist() == [NOW, NOW, NOW + 9]
        assert records["value"].tolist()[2] == 7.5
        assert (metric(world, "event_log_events"), metric(world, "event_log_lost")) == (3, 0)


def test_string_ids_go_in_as_their_keys(tmp_path):
    with ingesting(tmp_path, "string", config=LOGGED) as world, IngestClient(world.target) as client:
        client.report([Event("ann", Exposure(["x", "y"])), Event("bob", Action("x", "like"))])
        records = logged(world)
        assert set(records["user"].tolist()) == {key_of("ann"), key_of("bob")}
        assert set(records["item"].tolist()) == {key_of("x"), key_of("y")}


def test_without_the_option_there_is_no_log(tmp_path):
    with ingesting(tmp_path) as world, IngestClient(world.target) as client:
        client.report([Event(4, Exposure([1, 2]))])
        assert world.store.execute("EXISTS", "test:{events}") == 0


def test_a_log_that_takes_nothing_costs_no_acknowledgement_and_is_counted(
    tmp_path, caplog: pytest.LogCaptureFixture
):
    with ingesting(tmp_path, config=LOGGED) as world, IngestClient(world.target) as client:
        world.store.execute("SET", "test:{events}", "no stream")
        with caplog.at_level(logging.ERROR):
            for n in range(3):
                assert client.report([Event(4, Action(n, "click"))]).accepted == 1
        assert len(world.records(4, RECENT)) == 3
        assert (metric(world, "event_log_events"), metric(world, "event_log_lost")) == (0, 3)
        said = [record.getMessage() for record in caplog.records if "event log" in record.getMessage()]
        assert len(said) == 1  # not again within a minute
        assert said[0].startswith("1 events are missing in the event log")
        world.store.execute("DEL", "test:{events}")
        client.report([Event(4, Action(9, "click"))])
        assert logged(world)["item"].tolist() == [9]
