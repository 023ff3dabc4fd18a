"""Clients of the recall and ingest services; the plain ones block, the `Async` ones await; all speak plain values.

    with RecallClient("localhost:50051") as client:
        result = client.recall(user_id=17, recent_items=[RecentItem(42, "click")], overrides={"swing": False})
        result.item_ids
    with IngestClient("localhost:50051") as client:
        client.report([Event(17, Exposure(result.item_ids)), Event(17, Action(42, "like"))])
        client.upsert_items([Item(43, author=5, tags=["bread"])])

What the server refuses raises `InvalidRequest`; every other failure is the `grpc.RpcError` it is. A server
that is unavailable is asked up to four times within the timeout; no other failure is tried again.
"""

from engine.client._clients import AsyncRecallClient, RecallClient
from engine.client._ingest import AsyncIngestClient, EventStream, IngestClient
from engine.client._ingest_values import (
    Acknowledged,
    Action,
    Dislike,
    Event,
    Exposure,
    Follow,
    Item,
    Leftovers,
    Refusal,
    ReportResult,
    TakeDown,
    UpsertResult,
)
from engine.client._security import Security
from engine.client._values import (
    Candidate,
    ChannelReport,
    Debug,
    FilterReport,
    InvalidRequest,
    Proposal,
    Recall,
    RecallResult,
    RecentItem,
    Unknown,
    Violation,
)

__all__ = [
    "Acknowledged",
    "Action",
    "AsyncIngestClient",
    "AsyncRecallClient",
    "Candidate",
    "ChannelReport",
    "Debug",
    "Dislike",
    "Event",
    "EventStream",
    "Exposure",
    "FilterReport",
    "Follow",
    "IngestClient",
    "InvalidRequest",
    "Item",
    "Leftovers",
    "Proposal",
    "Recall",
    "RecallClient",
    "RecallResult",
    "RecentItem",
    "Refusal",
    "ReportResult",
    "Security",
    "TakeDown",
    "Unknown",
    "UpsertResult",
    "Violation",
]
