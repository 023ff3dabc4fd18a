"""The whole configuration: its tables, and the channels and filters that it declares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from engine.config.channels import with_lent
from engine.config.tables import (
    BreakerConfig,
    HistoryConfig,
    IngestConfig,
    Name,
    OverloadConfig,
    SceneConfig,
    SecurityConfig,
    ServerConfig,
    StateConfig,
    StoreConfig,
    TelemetryConfig,
)
from engine.config.validation import typed
from engine.core.channel import Channel
from engine.core.errors import ConfigError
from engine.core.filter import Filter
from engine.core.options import Options
from engine.plugins import CHANNELS, channel_class, filter_class, plugin_names


class Config(Options):
    """The whole configuration, with each component's options already typed."""

    store: StoreConfig = StoreConfig()
    server: ServerConfig = ServerConfig()
    security: SecurityConfig = SecurityConfig()
    overload: OverloadConfig = OverloadConfig()
    breaker: BreakerConfig = BreakerConfig()
    history: HistoryConfig = HistoryConfig()
    state: StateConfig = StateConfig()
    ingest: IngestConfig = IngestConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    interest: dict[str, Annotated[float, Field(ge=0, le=1e6)]]
    """Points per event kind; an event of no or 0 points says nothing about interest."""

    min_rating: float | None = None
    """Ratings below this say nothing about interest."""

    channels: dict[Name, Any]
    """Options per channel instance."""

    filters: dict[Name, Any] = Field(default={})
    """Options per filter."""

    scenes: dict[Name, SceneConfig] = Field(min_length=1)

    channel_types: dict[str, str] = Field(default={})
    """Channel name -> entry point; filled from `type`, which defaults to the name."""

    channel_snapshots: dict[str, str] = Field(default={})
    """Channel name -> the channel whose snapshot it loads, where that is another; filled from `snapshot`."""

    channel_deadlines: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Channel name -> milliseconds; filled from `deadline_ms`."""

    def deadline_of(self, name: str) -> float:
        """Return how long a batch waits for a channel that runs beside the compute, in milliseconds."""
        return self.channel_deadlines.get(name, self.server.channel_deadline_ms)

    def snapshot_of(self, name: str) -> str:
        """Return the name of the channel whose snapshot a channel loads: its own, unless it says `snapshot`."""
        return self.channel_snapshots.get(name, name)

    def channel(self, name: str) -> tuple[type[Channel], Options]:
        """Return the class and the options of a declared channel."""
        return channel_class(self.channel_types[name]), self.channels[name]

    def filter(self, name: str) -> tuple[type[Filter], Options]:
        """Return the class and the options of a filter; one that is not declared has its defaults."""
        loaded = filter_class(name)
        options = self.filters.get(name)
        return loaded, options if options is not None else loaded.Config()

    def with_channel_options(self, changes: dict[str, dict[str, Any]], field: str = "params") -> Config:
        """Return a copy with some channels' options replaced; ConfigError names what does not fit.

        A channel that is installed and not declared is declared by its options, in no scene.
        """
        channels, types = dict(self.channels), dict(self.channel_types)
        for name, values in changes.items():
            if name not in channels:
                if name not in plugin_names(CHANNELS):
                    raise ConfigError(
                        f"no channel is called {name!r}; known: {', '.join(channels)}", f"{field}.{name}"
                    )
                types[name] = name
            merged = (
                {**channels[name].model_dump(exclude_unset=True), **values} if name in channels else values
            )
            channels[name] = typed(channel_class(types[name]).Config, merged, f"{field}.{name}")
        for name, lender in self.channel_snapshots.items():
            channels[name] = with_lent(channels[name], channels[lender], lender, f"{field}.{name}")
        return self.model_copy(update={"channels": channels, "channel_types": types})
