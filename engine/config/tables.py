"""The tables of the configuration, and what each option may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from engine.core.merge import MergeMode
from engine.core.options import Options

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class StoreConfig(Options):
    """Where things are and how much is kept."""

    path: Path = Path("recall-data")
    """Folder of the snapshots and releases."""

    keep_releases: int = Field(default=3, ge=1, le=1000)
    """Releases kept by the garbage collection after a build."""


class ServerConfig(Options):
    """The gRPC server."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = Field(default=50051, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    workers: int = Field(default=1, ge=1, le=256)
    """Worker processes on the port."""

    reload_seconds: float = Field(default=2.0, ge=0)
    """How often the servers look whether another release is in service; 0: never."""

    max_connection_age_seconds: float = Field(default=0.0, ge=0)
    """A connection is closed after about so long, calls under way excepted, and the client opens another; 0: never."""

    max_batch: int = Field(default=16, ge=1, le=1024)
    """Requests that may go down the pipeline together."""

    max_queue: int = Field(default=1024, ge=1)
    """Requests that may wait; one beyond is refused with RESOURCE_EXHAUSTED."""

    max_limit: int = Field(default=5000, ge=1, le=100_000)
    """The largest `limit` that a request may ask for."""

    reserve_ms: float = Field(default=2.0, ge=0)
    """Part of a request's deadline kept for merging and encoding: no channel starts inside it."""

    channel_deadline_ms: float = Field(default=50.0, gt=0)
    """How long a batch waits for a channel that runs beside the compute, where the channel's table does not say."""

    drain_seconds: float = Field(default=10.0, ge=0)
    """After SIGTERM: how long requests in flight may take."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the HTTP server that Prometheus collects metrics from; 0 is none."""

    metrics_host: str = "127.0.0.1"
    """Address that the metrics are served on."""

    insecure: bool = False
    """Whether an address that others can reach may be listened on without TLS."""


Caller = Annotated[str, Field(pattern=r"^(\*|token:[A-Za-z0-9][A-Za-z0-9._-]{0,63}|certificate:.{1,256})$")]
"""An entry of an allow-list."""


class AllowConfig(Options):
    """Who may call what: `token:NAME`, `certificate:NAME`, or `*` for every caller that is known."""

    recall: tuple[Caller, ...] = ("*",)
    """RecallService."""

    ingest: tuple[Caller, ...] = ("*",)
    """IngestService."""

    admin: tuple[Caller, ...] = ("*",)
    """Everything else but health, which is open: reflection."""


class SecurityConfig(Options):
    """Encryption, who may call what, and limits of connections."""

    certificate: str = ""
    """PEM file of the server's certificate and the chain behind it; empty: no TLS."""

    key: str = ""
    """PEM file of its private key."""

    client_ca: str = ""
    """PEM file of the authorities; set, every client must present a certificate that one of them signed."""

    tokens: str = ""
    """File with a line `NAME:SHA256` per token; RECALL_TOKENS in the environment has more. None: nobody is asked."""

    max_message_bytes: int = Field(default=4_194_304, ge=1024, le=1_073_741_824)
    """The largest request, and the largest message of a stream."""

    max_connections: int = Field(default=1000, ge=1, le=1_000_000)
    """Connections; further ones are closed at once."""

    max_streams: int = Field(default=1000, ge=1, le=1_000_000)
    """Calls under way on one connection; further ones wait at the client."""

    max_header_bytes: int = Field(default=8192, ge=1024, le=1_048_576)
    """Metadata of a call."""

    handshake_seconds: float = Field(default=10.0, gt=0, le=3600)
    """How long a new connection may take until HTTP/2 is spoken, TLS included."""

    idle_seconds: float = Field(default=900.0, gt=0, le=86_400)
    """A connection without a call is closed after so long; clients open another by themselves."""

    stream_idle_seconds: float = Field(default=300.0, gt=0, le=86_400)
    """A ReportStream on which nothing came for so long is ended; clients of this project open another by themselves."""

    allow: AllowConfig = AllowConfig()


class BreakerConfig(Options):
    """The circuit breaker that every channel has."""

    failures: float = Field(default=5.0, gt=0, le=1000)
    """Batches that must have failed before the circuit opens; one that failed for a part of its requests is a part."""

    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of the batches, since the first that failed, that must have failed."""

    calls: int = Field(default=20, ge=1, le=1000)
    """Newest batches that are looked at; at least `failures`."""

    window_seconds: float = Field(default=30.0, gt=0)
    """Batches older than this are forgotten."""

    open_seconds: float = Field(default=1.0, gt=0)
    """How long the circuit stays open before one batch tries the channel again; doubled each time that it fails."""

    most_seconds: float = Field(default=60.0, gt=0)
    """The longest that it stays open."""

    jitter: float = Field(default=0.2, ge=0, lt=1)
    """Each of these times is drawn from this share below to this share above."""


class OverloadConfig(Options):
    """How many requests are taken in, and when one more is refused."""

    target_ms: float = Field(default=10.0, gt=0)
    """How long a request may wait for its turn: the limit falls while requests wait longer, else it rises."""

    smoothing: float = Field(default=0.2, gt=0, le=1)
    """Share of the way to a new limit that is gone with each batch."""


class TelemetryConfig(Options):
    """What is told of single requests, and of whom impressions are credited."""

    request_log: float = Field(default=0.0, ge=0, le=1)
    """Share of the requests that get a line in the log."""

    slow_ms: float = Field(default=0.0, ge=0)
    """Requests that take as long get a line too; 0 is none."""

    traces: str = Field(default="", pattern=r"^(https?://.+)?$")
    """OTLP/HTTP endpoint that gets the spans of requests whose caller samples them; empty is none."""

    impressions: float = Field(default=0.01, ge=0, le=1)
    """Share of the users whose exposures are credited to the channels that recalled the items; 0 is none."""


class HistoryConfig(Options):
    """The stored user history."""

    keep: int = Field(default=1000, ge=1, le=100_000)
    """Items kept per user, newest first."""


class ExposureConfig(Options):
    """What is remembered of the items that users were shown."""

    backend: Literal["bits", "pybloom"] = "bits"
    """`bits`: Bloom filters in the state store, checked by a kernel. `pybloom`: pybloom-live in this process's memory."""

    planned: int = Field(default=1000, ge=8, le=100_000)
    """Exposures per user and slice that the first filter of a slice is made for; more chain further ones."""

    bits: int = Field(default=10, ge=4, le=64)
    """Bits per planned exposure."""

    hashes: int = Field(default=7, ge=1, le=16)
    """Bits set per exposure."""

    slice_days: float = Field(default=7.0, gt=0)
    """Length of a slice; the whole slice is forgotten at once."""

    slices: int = Field(default=4, ge=1, le=64)
    """Full slices remembered besides the current one."""

    @property
    def slice_seconds(self) -> int:
        """The length of a slice in whole seconds."""
        return max(1, round(self.slice_days * 86_400))


class StateConfig(Options):
    """The state store: what users did and were shown, and the live log of items."""

    url: str = Field(default="", repr=False)
    """`redis://`, `rediss://` (TLS), `redis+cluster://`, `unix://`; empty: a Valkey of its own; `none`: no live state."""

    password_file: str = ""
    """File whose first line is the store's password; it stands in for one in the URL."""

    durability: Literal["everysec", "always"] = "everysec"
    """When the embedded store brings its log to the disk; with `always` an acknowledgement waits for it."""

    prefix: str = Field(default="recall", pattern=r"^[a-z0-9_-]{1,32}$")
    """Stands before every key, so that several engines can share a store."""

    timeout_ms: float = Field(default=100.0, gt=0)
    """How long a read of the store may take before the request goes on without it."""

    user_days: float = Field(default=90.0, gt=0)
    """A user's actions, follows and dislikes are forgotten so long after their last event."""

    recent: int = Field(default=200, ge=1, le=10_000)
    """Newest actions kept per user."""

    follows: int = Field(default=1000, ge=1, le=100_000)
    """Followed authors kept per user, newest first."""

    dislikes: int = Field(default=500, ge=1, le=100_000)
    """Dislikes kept per user, newest first."""

    leftovers: int = Field(default=100, ge=1, le=10_000)
    """Leftovers of fine ranking kept per user; the oldest leave first."""

    event_ids: int = Field(default=128, ge=0, le=10_000)
    """Newest event ids remembered per user, so that sending an event again is harmless."""

    exposure: ExposureConfig = ExposureConfig()


class IngestConfig(Options):
    """What becomes of reported events besides the state of their users."""

    event_log: bool = False
    """Whether exposures and actions go into the event log, from which `recall train --follow` learns."""

    event_log_length: int = Field(default=1_000_000, ge=1000, le=1_000_000_000)
    """Newest events kept in it, an item shown counts as one; 32 bytes each in the state store."""


def _merge_mode(value: Any) -> Any:
    if isinstance(value, str) and value.upper() in MergeMode.__members__:
        return MergeMode[value.upper()]
    raise ValueError(f"expected one of {', '.join(mode.name.lower() for mode in MergeMode)}")


class DegradeStep(Options):
    """One step of giving less under load."""

    at: float = Field(gt=0, le=1)
    """The step holds while the load is this or more: the share in use of the limit on requests in flight, at most during
    the last batch."""

    limit: float = Field(default=1.0, gt=0, le=1)
    """Factor on the number of candidates."""

    without: tuple[Name, ...] = ()
    """Channels that are not asked: GATED, with the message "degraded"."""


class SceneConfig(Options):
    """A scene: which channels answer, how their candidates are merged and what is filtered."""

    quotas: dict[Name, Annotated[int, Field(ge=0, le=100_000)]] = Field(min_length=1)
    """Quota per channel; the order is the merge order. A channel of quota 0 only backfills."""

    limit: int = Field(default=300, ge=1, le=100_000)
    """Candidates returned where the request does not say."""

    depth: float = Field(default=2.5, ge=0)
    """Each channel is asked for so many times its quota first, and for more only where the answer is short, or the
    filters left of a channel less than its quota; 0: for as much as the answer is long at once."""

    merge: Annotated[MergeMode, BeforeValidator(_merge_mode)] = Field(
        default=MergeMode.QUOTA, validate_default=False
    )
    """`quota`, `snake` or `rank_fusion`; see engine/core/merge.py."""

    weights: dict[Name, Annotated[float, Field(gt=0)]] = Field(default={})
    """Weight per channel in the merge score; 1 where absent."""

    rank_constant: float = Field(default=60.0, gt=0)
    """Constant of the reciprocal-rank score."""

    filters: tuple[Name, ...] = ("availability", "seen", "excluded", "exposure", "dislikes")
    """Filters, in the order they are asked."""

    fail_open: tuple[Name, ...] = ("exposure", "dislikes")
    """Filters that the scene goes on without, saying so, where user state cannot be read; any other fails the request."""

    fallback: tuple[Name, ...] = ("popular", "fresh")
    """Channels asked only where the others leave the answer short, in this order."""

    degrade: tuple[DegradeStep, ...] = ()
    """Steps of giving less under load, before requests are refused; each holds instead of those before it."""
