"""Finding channels and filters: entry points of installed packages, ours and other people's alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from engine.core.channel import Channel
from engine.core.errors import ConfigError
from engine.core.filter import Filter

CHANNELS = "recall.channels"
FILTERS = "recall.filters"


@dataclass(frozen=True, slots=True)
class Plugins:
    """What one entry-point group offers: the classes that loaded, and why the others did not."""

    group: str
    found: Mapping[str, EntryPoint]

    def load(self, name: str, base: type) -> type:
        """Import the class called `name`.

        Raises:
            ConfigError: if nothing is called so, if its package cannot be imported, or if it is not a `base`.
        """
        point = self.found.get(name)
        if point is None:
            known = ", ".join(sorted(self.found)) or "none"
            raise ConfigError(f"no plugin of the group {self.group!r} is called {name!r}; known: {known}")
        try:
            loaded = point.load()
        except Exception as error:  # a plugin's own import can fail in any way
            raise ConfigError(f"the plugin {name!r} ({point.value}) cannot be imported: {error!r}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise ConfigError(f"the plugin {name!r} ({point.value}) is not a subclass of {base.__name__}")
        return loaded


@cache
def _discover(group: str) -> Plugins:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in found and found[point.name].value != point.value:
            raise ConfigError(
                f"two packages offer {point.name!r} in {group!r}: {found[point.name].value}, {point.value}"
            )
        found[point.name] = point
    return Plugins(group, MappingProxyType(found))


def channel_class(name: str) -> type[Channel]:
    """Return the channel class that the entry point `name` offers; ConfigError if there is none."""
    return _discover(CHANNELS).load(name, Channel)


def filter_class(name: str) -> type[Filter]:
    """Return the filter class that the entry point `name` offers; ConfigError if there is none."""
    return _discover(FILTERS).load(name, Filter)


def plugin_names(group: str) -> list[str]:
    """Return the names in an entry-point group, sorted."""
    return sorted(_discover(group).found)


def forget() -> None:
    """Forget what was found, so that packages installed since are: for tests and notebooks."""
    _discover.cache_clear()
