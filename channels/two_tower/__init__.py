"""Two towers: users and items as vectors, the nearest items recalled from a vector index. See docs/two-tower.md."""

from channels.two_tower.channel import TwoTower
from channels.two_tower.options import TwoTowerOptions

__all__ = ["TwoTower", "TwoTowerOptions"]
