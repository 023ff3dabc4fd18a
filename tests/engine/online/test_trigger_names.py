"""Triggers that a channel has names for: they stand in the answers instead of numbers."""

from __future__ import annotations

import numpy as np
import pytest
from online_world import Top, make_world
from recall.v1 import recall_pb2 as pb

from engine.core.channel import Channel, names_triggers
from engine.online.encode import encode
from engine.online.request import Request


class Named(Top):
    def trigger_names(self, triggers):
        assert (triggers >= 0).all()
        return np.array([f"c-{number}" for number in triggers.tolist()], "S6").view(np.uint8).reshape(-1, 6)


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_names_stand_beside_ids_of_either_kind(kind, monkeypatch):
    monkeypatch.setattr(Top, "trigger_names", Named.trigger_names)
    world = make_world(kind)
    pipeline = world.replica.pipelines["default"]
    run = pipeline.run([Request(user_id=1 if kind == "int64" else "user-1")])
    response = pb.RecallResponse.FromString(encode(world.replica, pipeline, run, ["id"], [False])[0])
    causes: dict[str, set[object]] = {}
    for candidate in response.candidates:
        for proposal in candidate.proposals:
            given = proposal.WhichOneof("trigger")
            causes.setdefault(proposal.channel, set()).add(given and getattr(proposal, given))
    assert causes["top"] == {None, "c-19"}
    assert causes["similar"] <= {world.item(0), world.item(6)}


@pytest.mark.parametrize(
    "names",
    [
        lambda self, triggers: 1 // 0,
        lambda self, triggers: ["c"] * triggers.size,
        lambda self, triggers: np.zeros((triggers.size + 1, 2), np.uint8),
        lambda self, triggers: np.full((triggers.size, 1), 0xC3, np.uint8),
    ],
    ids=["raises", "no bytes", "one too many", "no UTF-8"],
)
def test_a_channel_that_cannot_name_its_triggers_harms_no_answer(names, monkeypatch):
    monkeypatch.setattr(Top, "trigger_names", names)
    world = make_world("int64")
    pipeline = world.replica.pipelines["default"]
    run = pipeline.run([Request(user_id=1)])
    response = pb.RecallResponse.FromString(encode(world.replica, pipeline, run, ["id"], [False])[0])
    proposals = [p for candidate in response.candidates for p in candidate.proposals if p.channel == "top"]
    assert {p.trigger_id for p in proposals if p.HasField("trigger_id")} == {19}
    assert not any(p.HasField("trigger_key") for p in proposals)


def test_a_channel_without_names_says_so():
    assert names_triggers(Named({}))
    assert not names_triggers(Top({}))
    with pytest.raises(NotImplementedError, match="Top has no trigger_names"):
        Channel.trigger_names(Top({}), np.zeros(1, np.int64))
