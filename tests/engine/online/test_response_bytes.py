"""The compiled encoder is held to protobuf's own: parsed, its bytes are the message that protobuf would have written."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from recall.v1 import recall_pb2 as pb

from engine.core.merge import Merged
from engine.online.response_bytes import (
    NO_TRIGGER,
    TRIGGER_ID,
    TRIGGER_KEY,
    Ids,
    Reports,
    Texts,
    response_bytes,
)

NAMES = ("itemcf", "a", "a_channel_with_a_name_" + "x" * 42)
FILTERS = ("seen", "availability")
NO_TAIL = np.zeros(0, np.uint8)

numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))
counts = st.one_of(st.integers(0, 300), st.integers(0, 2**31 - 1))
keys = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
texts = st.one_of(st.just(""), st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
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


@st.composite
def reports_of(draw, queries):
    """Draw what is reported of three channels, of which the merge may have heard fewer, and two filters."""

    def table(rows, values=counts):
        drawn = draw(
            st.lists(st.lists(values, min_size=queries, max_size=queries), min_size=rows, max_size=rows)
        )
        return np.array(drawn, np.int32).reshape(rows, queries)

    merged = draw(st.integers(0, 3))
    messages = draw(st.one_of(st.just([]), st.lists(texts, min_size=3 * queries, max_size=3 * queries)))
    reports = Reports(
        channels=names(*NAMES),
        filters=names(*FILTERS),
        kinds=np.array(draw(st.lists(st.integers(0, 6), min_size=3, max_size=3)), np.int32),
        status=table(3, st.integers(1, 6)),
        returned=table(3),
        eligible=table(merged),
        kept=table(merged),
        microseconds=np.array(draw(st.lists(counts, min_size=3, max_size=3)), np.float64) * queries,
        messages=Texts.of([text.encode() for text in messages]),
        removed=table(2),
        filter_status=table(2, st.integers(1, 2)),
        unknown=table(4) % np.array([[2], [2**31 - 1], [2**31 - 1], [2**31 - 1]], np.int32),
        degraded=draw(st.integers(0, 3)),
    )
    return reports, messages


def names(*texts):
    return Texts.of([pb.Proposal(channel=text).SerializeToString() for text in texts])


def ids_of(values, strings):
    if not strings:
        return Ids.of(np.array(values, np.int64))
    padded = np.array([value.encode() for value in values], "S") if values else np.zeros(0, "S1")
    return Ids.of(padded.view(np.uint8).reshape(len(values), padded.dtype.itemsize))


def merged_of(queries):
    items = [item for query in queries for item in query]
    flat = [proposal for _, _, mine in items for proposal in mine]
    return Merged(
        offsets=np.concatenate(([0], np.cumsum([len(query) for query in queries]))).astype(np.int64),
        rows=np.arange(len(items), dtype=np.int32),
        scores=np.array([score for _, score, _ in items], np.float32),
        proposal_offsets=np.concatenate(([0], np.cumsum([len(mine) for _, _, mine in items]))).astype(
            np.int64
        ),
        proposal_channels=np.array([c for c, _, _, _ in flat], np.int32),
        proposal_ranks=np.array([rank for _, rank, _, _ in flat], np.int32),
        proposal_sources=np.arange(len(flat), dtype=np.int64)[::-1].copy(),
        eligible=np.zeros((3, len(queries)), np.int32),
        kept=np.zeros((3, len(queries)), np.int32),
    )


@given(batch=batches(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_the_bytes_parse_to_what_protobuf_would_have_written(batch, data):
    strings, queries, triggers = batch
    items = [item for query in queries for item in query]
    flat = [proposal for _, _, mine in items for proposal in mine]
    reports, messages = data.draw(reports_of(len(queries)))
    request_ids = data.draw(st.lists(texts, min_size=len(queries), max_size=len(queries)))
    details = data.draw(
        st.one_of(
            st.just([]), st.lists(st.binary(max_size=200), min_size=len(queries), max_size=len(queries))
        )
    )
    tail = pb.RecallResponse(release="r-1", snapshots={"catalogue": "c-1"}, log_offset="1-1")
    form = TRIGGER_KEY if strings else TRIGGER_ID
    out, offsets = response_bytes(
        merged_of(queries),
        ids_of([item for item, _, _ in items], strings),
        np.array([score for _, _, score, _ in flat], np.float32)[::-1].copy(),
        ids_of(triggers, strings),
        np.array([form if has else NO_TRIGGER for _, _, _, has in flat], np.uint8),
        reports,
        Texts.of([text.encode() for text in request_ids]),
        Texts.of([text and pb.DebugInfo(batch_size=len(text)).SerializeToString() for text in details]),
        np.frombuffer(tail.SerializeToString(), np.uint8),
    )
    at = 0
    assert offsets[0] == 0
    assert offsets[-1] == out.size
    for q, query in enumerate(queries):
        wanted = pb.RecallResponse(request_id=request_ids[q], degraded=reports.degraded)
        wanted.MergeFrom(tail)
        if details and details[q]:
            wanted.debug.batch_size = len(details[q])
        for item, score, mine in query:
            candidate = wanted.candidates.add(score=score, **{"item_key" if strings else "item_id": item})
            for c, rank, own, has in mine:
                proposal = candidate.proposals.add(channel=NAMES[c], rank=rank, score=own)
                if has:
                    setattr(proposal, "trigger_key" if strings else "trigger_id", triggers[at])
                at += 1
        for c, name in enumerate(NAMES):
            heard = c < len(reports.kept)
            wanted.channels.add(
                channel=name,
                status=reports.status[c, q],
                trigger_kind=reports.kinds[c],
                returned=reports.returned[c, q],
                eligible=reports.eligible[c, q] if heard else 0,
                kept=reports.kept[c, q] if heard else 0,
                microseconds=int(reports.microseconds[c] / len(queries)),
                message=messages[c * len(queries) + q] if messages else "",
            )
        for f, name in enumerate(FILTERS):
            wanted.filters.add(filter=name, removed=reports.removed[f, q], status=reports.filter_status[f, q])
        user, recent, excluded, trigger_items = reports.unknown[:, q].tolist()
        if user or recent or excluded or trigger_items:
            wanted.unknown.user = bool(user)
            wanted.unknown.recent_items = recent
            wanted.unknown.exclude_items = excluded
            wanted.unknown.trigger_items = trigger_items
        got = pb.RecallResponse.FromString(out[offsets[q] : offsets[q + 1]].tobytes())
        assert got == wanted


def test_a_trigger_kind_without_ids_goes_out_as_its_number_in_a_catalogue_of_strings():
    none = np.zeros((0, 1), np.int32)
    reports = Reports(
        names("cells"), names(), np.zeros(1, np.int32), np.ones((1, 1), np.int32), np.zeros((1, 1), np.int32),
        none, none, np.zeros(1), Texts.of([]), none, none, np.zeros((4, 1), np.int32), 0,
    )  # fmt: skip
    out, _ = response_bytes(
        merged_of([[("x", 0.5, [(0, 1, 1.0, 1)])]]), ids_of(["x"], True), np.ones(1, np.float32),
        Ids(np.array([7], np.int64), np.zeros((1, 0), np.uint8)), np.array([TRIGGER_ID], np.uint8), reports,
        Texts.of([b""]), Texts.of([]), NO_TAIL,
    )  # fmt: skip
    candidate = pb.RecallResponse.FromString(out.tobytes()).candidates[0]
    assert (candidate.item_key, candidate.proposals[0].trigger_id) == ("x", 7)
