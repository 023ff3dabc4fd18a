"""Deep Retrieval: items on learnt paths of a lattice, the likeliest paths searched, their items reranked.

See docs/deep-retrieval.md.
"""

from channels.deep_retrieval.channel import DeepRetrieval
from channels.deep_retrieval.options import DeepRetrievalOptions

__all__ = ["DeepRetrieval", "DeepRetrievalOptions"]
