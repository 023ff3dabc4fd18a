"""Contract suites that authors of channels and filters inherit: `ChannelContract`, `FilterContract`."""

from engine.testing.contracts import ChannelContract, FilterContract
from engine.testing.world import (
    built_channel,
    built_filter,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)

__all__ = [
    "ChannelContract",
    "FilterContract",
    "built_channel",
    "built_filter",
    "interactions_of",
    "random_batch",
    "random_columns",
    "tiny_interactions",
]
