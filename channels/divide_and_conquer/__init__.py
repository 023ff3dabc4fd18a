"""Divide and conquer: a two-tower model whose corpus is cut into clusters, each searched for itself."""

from channels.divide_and_conquer.channel import DivideAndConquer
from channels.divide_and_conquer.options import DivideAndConquerOptions

__all__ = ["DivideAndConquer", "DivideAndConquerOptions"]
