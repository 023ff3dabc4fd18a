"""Contract suites that authors of channels and filters inherit: `ChannelContract`, `FilterContract`."""

from engine.testing.contracts import ChannelContract, FilterContract
from engine.testing.world import built_channel, interactions_of, random_batch, tiny_interactions

__all__ = [
    "ChannelContract",
    "FilterContract",
    "built_channel",
    "interactions_of",
    "random_batch",
    "tiny_interactions",
]
