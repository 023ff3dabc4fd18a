"""Clients of the recall service: `RecallClient` blocks, `AsyncRecallClient` awaits; both speak plain values.

    with RecallClient("localhost:50051") as client:
        result = client.recall(user_id=17, recent_items=[RecentItem(42, "click")], overrides={"swing": False})
        result.item_ids

What the server refuses raises `InvalidRequest`; every other failure is the `grpc.RpcError` it is. A server
that is unavailable is asked up to four times within the timeout; no other failure is tried again.
"""

from engine.client._clients import AsyncRecallClient, RecallClient
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
    "AsyncRecallClient",
    "Candidate",
    "ChannelReport",
    "Debug",
    "FilterReport",
    "InvalidRequest",
    "Proposal",
    "Recall",
    "RecallClient",
    "RecallResult",
    "RecentItem",
    "Unknown",
    "Violation",
]
