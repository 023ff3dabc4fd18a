"""Streaming VQ: items in learnt clusters that change while they serve, the clusters' lists merged, the best ranked.

See docs/streaming-vq.md.
"""

from channels.streaming_vq.channel import StreamingVq
from channels.streaming_vq.options import StreamingVqOptions

__all__ = ["StreamingVq", "StreamingVqOptions"]
