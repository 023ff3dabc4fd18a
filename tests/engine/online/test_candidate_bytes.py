"""The compiled encoder is held to protobuf's own: parsed, its bytes are the message that protobuf would have written."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from recall.v1 import recall_pb2 as pb

from engine.core.merge import Merged
from engine.online.candidate_bytes import NO_TRIGGER, TRIGGER_ID, TRIGGER_KEY, Ids, candidate_bytes

NAMES = ("itemcf", "a", "a_channel_with_a_name_" + "x" * 42)

numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))
keys = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
scores = st.floats(width=32, allow_nan=False, allow_infinity=False)
proposals = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 100_000), scores, st.integers(0, 1)), min_size=1, max_size=3
)


@st.composite
def batches(draw):
    ids = keys if draw(st.booleans()) else numbers
    items = st.tuples(ids, scores, proposals.map(lambda p: [(*each,) for each in p]))
    queries = draw(st.lists(st.lists(items, max_size=4), min_size=1, max_size=3))
    flat = [proposal for query in queries for _, _, mine in query for proposal in mine]
    return ids is keys, queries, draw(st.lists(ids, min_size=len(flat), max_size=len(flat)))


def ids_of(values, strings):
    if not strings:
        return Ids.of(np.array(values, np.int64))
    padded = np.array([value.encode() for value in values], "S") if values else np.zeros(0, "S1")
    return Ids.of(padded.view(np.uint8).reshape(len(values), padded.dtype.itemsize))


@given(batch=batches())
@settings(deadline=None, max_examples=300)
def test_the_bytes_parse_to_what_protobuf_would_have_written(batch):
    strings, queries, triggers = batch
    items = [item for query in queries for item in query]
    flat = [proposal for _, _, mine in items for proposal in mine]
    merged = Merged(
        offsets=np.concatenate(([0], np.cumsum([len(query) for query in queries]))).astype(np.int64),
        rows=np.arange(len(items), dtype=np.int32),
        scores=np.array([score for _, score, _ in items], np.float32),
        proposal_offsets=np.concatenate(([0], np.cumsum([len(mine) for _, _, mine in items]))).astype(
            np.int64
        ),
        proposal_channels=np.array([c for c, _, _, _ in flat], np.int32),
        proposal_ranks=np.array([rank for _, rank, _, _ in flat], np.int32),
        proposal_sources=np.zeros(len(flat), np.int64),
        eligible=np.zeros((3, 1), np.int32),
        kept=np.zeros((3, 1), np.int32),
    )
    form = TRIGGER_KEY if strings else TRIGGER_ID
    forms = np.array([form if has else NO_TRIGGER for _, _, _, has in flat], np.uint8)
    raw = np.array([score for _, _, score, _ in flat], np.float32)
    out, offsets = candidate_bytes(
        merged, ids_of([item for item, _, _ in items], strings), raw, ids_of(triggers, strings), forms, NAMES
    )
    at = 0
    for q, query in enumerate(queries):
        wanted = pb.RecallResponse()
        for item, score, mine in query:
            candidate = wanted.candidates.add(score=score, **{"item_key" if strings else "item_id": item})
            for c, rank, own, has in mine:
                proposal = candidate.proposals.add(channel=NAMES[c], rank=rank, score=own)
                if has:
                    setattr(proposal, "trigger_key" if strings else "trigger_id", triggers[at])
                at += 1
        got = out[offsets[q] : offsets[q + 1]].tobytes()
        assert pb.RecallResponse.FromString(got) == wanted


def test_a_trigger_kind_without_ids_goes_out_as_its_number_in_a_catalogue_of_strings():
    merged = Merged(
        np.array([0, 1]), np.array([0], np.int32), np.array([0.5], np.float32), np.array([0, 1]),
        np.array([0], np.int32), np.array([1], np.int32), np.zeros(1, np.int64), np.zeros((1, 1), np.int32),
        np.zeros((1, 1), np.int32),
    )  # fmt: skip
    triggers = Ids(np.array([7], np.int64), np.zeros((1, 0), np.uint8))
    forms = np.array([TRIGGER_ID], np.uint8)
    out, offsets = candidate_bytes(
        merged, ids_of(["x"], True), np.ones(1, np.float32), triggers, forms, ("cells",)
    )
    candidate = pb.RecallResponse.FromString(out[: offsets[1]].tobytes()).candidates[0]
    assert (candidate.item_key, candidate.proposals[0].trigger_id) == ("x", 7)
