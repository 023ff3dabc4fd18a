"""The configuration: one commented TOML file, typed, unknown keys refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError

from engine.core.channel import Channel
from engine.core.errors import ConfigError
from engine.core.exposure import LARGEST_LINK
from engine.core.filter import Filter
from engine.core.merge import MergeMode
from engine.core.options import Options, build_parameters
from engine.plugins import CHANNELS, channel_class, filter_class, plugin_names

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
    """The step holds while the load is this or more: the share in use of the limit on requests in flight, or of the
    compute thread's time, whichever is more."""

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
            channels[name] = _typed(channel_class(types[name]).Config, merged, f"{field}.{name}")
        for name, lender in self.channel_snapshots.items():
            channels[name] = _with_lent(channels[name], channels[lender], lender, f"{field}.{name}")
        return self.model_copy(update={"channels": channels, "channel_types": types})


RESERVED = ("catalogue", "history", "releases", "current", "state")
"""Names that a channel cannot have: the store uses them."""

SECTIONS = (
    "store",
    "server",
    "security",
    "overload",
    "breaker",
    "history",
    "state",
    "ingest",
    "telemetry",
    "interest",
    "min_rating",
    "channels",
    "filters",
    "scenes",
)


def default_config_path() -> Path:
    """Return the commented configuration that ships with the package."""
    return Path(__file__).with_name("recall.toml")


def load_config(path: Path | None = None, lenient: bool = False) -> Config:
    """Read a configuration file, or the one that ships with the package.

    Args:
        path: the file; None is the one that ships with the package.
        lenient: take names that refer to nothing, so that `cross_check` can list them all.

    Raises:
        ConfigError: one sentence naming the key (dotted path) and what was expected.
    """
    return parse_config(_read_toml(path or default_config_path()), lenient)


def read_params(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of options per channel, as `recall tune` writes it, for `Config.with_channel_options`.

    Raises:
        ConfigError: it cannot be read, or is not one table of options per channel.
    """
    tables = _read_toml(path)
    for name, options in tables.items():
        if not isinstance(options, dict):
            raise ConfigError("expected a table of options", f"{path.name}.{name}")
    return tables


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid TOML: {error}", str(path)) from error


def parse_config(raw: dict[str, Any], lenient: bool = False) -> Config:
    """Turn a parsed TOML document into a checked configuration; as `load_config`."""
    for key in raw:
        if key not in SECTIONS:
            raise ConfigError(f"unknown key; known: {', '.join(SECTIONS)}", key)
    raw = dict(raw)
    for section in ("channels", "filters"):
        table = raw.get(section, {})
        if not isinstance(table, dict):
            raise ConfigError("expected a table", section)
        for name, value in table.items():
            if not isinstance(value, dict):
                raise ConfigError("expected a table", f"{section}.{name}")
    types: dict[str, str] = {}
    lenders: dict[str, str] = {}
    deadlines: dict[str, float] = {}
    channels: dict[str, Options] = {}
    for name, values in raw.get("channels", {}).items():
        values = dict(values)
        kind = values.pop("type", name)
        if not isinstance(kind, str):
            raise ConfigError("expected the name of a channel plugin", f"channels.{name}.type")
        try:
            loaded = channel_class(kind)
        except ConfigError as error:
            raise ConfigError(str(error), f"channels.{name}") from error
        if "snapshot" in values:
            lenders[name] = values.pop("snapshot")
        if "deadline_ms" in values:
            deadlines[name] = _deadline(values.pop("deadline_ms"), loaded, f"channels.{name}.deadline_ms")
        types[name] = kind
        channels[name] = _typed(loaded.Config, values, f"channels.{name}")
    for name, lender in lenders.items():
        _check_lender(name, lender, types, lenders)
        channels[name] = _with_lent(channels[name], channels[lender], lender, f"channels.{name}")
    filters: dict[str, Options] = {}
    for name, values in raw.get("filters", {}).items():
        try:
            options = filter_class(name).Config
        except ConfigError as error:
            raise ConfigError(str(error), f"filters.{name}") from error
        filters[name] = _typed(options, values, f"filters.{name}")
    raw |= {
        "channels": channels,
        "filters": filters,
        "channel_types": types,
        "channel_snapshots": lenders,
        "channel_deadlines": deadlines,
    }
    config: Config = _typed(Config, raw, "")
    errors = [problem for problem in cross_check(config) if problem.severity == "error"]
    if errors and not lenient:
        raise ConfigError(errors[0].text, errors[0].field)
    return config


def _deadline(value: Any, kind: type[Channel], field: str) -> float:
    """Refuse a `deadline_ms` that is no time, or that would have no effect."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"expected milliseconds above 0, got {value!r}", field)
    if kind.inline:
        text = "the channel runs on the compute thread, where nothing stops it; only others have a deadline"
        raise ConfigError(text, field)
    return float(value)


def _check_lender(name: str, lender: Any, types: dict[str, str], lenders: dict[str, str]) -> None:
    """Refuse a `snapshot` that cannot be loaded by the channel that names it."""
    text = ""
    if not isinstance(lender, str) or lender not in types or lender == name:
        others = ", ".join(other for other in types if other != name)
        text = f"expected the name of another channel, got {lender!r}; declared: {others or 'none'}"
    elif lender in lenders:
        text = f"{lender!r} has no snapshot of its own; name {lenders[lender]!r}, whose snapshot it loads"
    else:
        mine, theirs = channel_class(types[name]), channel_class(types[lender])
        if not (mine.needs_build and theirs.needs_build):
            text = f"{(name if theirs.needs_build else lender)!r} has no snapshot: it is not built"
        elif getattr(mine.build, "__func__", mine) is not getattr(theirs.build, "__func__", theirs):
            text = (
                f"{lender!r} is a {types[lender]!r}, which builds other arrays than a {types[name]!r} loads"
            )
    if text:
        raise ConfigError(text, f"channels.{name}.snapshot")


def _with_lent(own: Options, lent: Options, lender: str, field: str) -> Options:
    """Return a channel's options with those that the build reads taken from the channel whose snapshot it loads.

    Raises:
        ConfigError: it sets one of them itself, to something else.
    """
    built = build_parameters(lent)
    for option in built:
        if option in own.model_fields_set and getattr(own, option) != getattr(lent, option):
            text = f"the snapshot is that of {lender!r}, which is built with {getattr(lent, option)!r}"
            raise ConfigError(f"{text}; leave it out, or leave `snapshot` out", f"{field}.{option}")
    values = {name: getattr(lent if name in built else own, name) for name in type(own).model_fields}
    return type(own).model_construct(_fields_set=set(own.model_fields_set), **values)


def _typed(model: type[Any], values: dict[str, Any], field: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # Errors are raised without their cause: pydantic's own text quotes what it got, and that may be a URL with a
        # password.
        first = error.errors()[0]
        path = ".".join([*([field] if field else []), *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"unknown key; known: {', '.join(_known_keys(model, first['loc'][:-1]))}", path
            ) from None
        raise ConfigError(
            f"{first['msg'].removeprefix('Value error, ')} (got {_without_password(repr(first['input']))})",
            path,
        ) from None


def _without_password(text: str) -> str:
    """Return a text without the user and password of any URL in it."""
    return re.sub(r"://\S*@", "://***@", text)


def _known_keys(model: type[Any], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the table at a path inside a model; of the model itself where the path leads elsewhere."""
    inner: Any = model
    for part in path:
        if isinstance(inner, type) and issubclass(inner, Options) and part in inner.model_fields:
            inner = inner.model_fields[str(part)].annotation
        else:  # a table of tables: the value type is its last argument
            inner = (get_args(inner) or (None,))[-1]
    return list((inner if isinstance(inner, type) and issubclass(inner, Options) else model).model_fields)


class Finding(Options):
    """One thing that the lint has to say."""

    severity: Literal["error", "warning"]
    field: str
    text: str


def cross_check(config: Config) -> Iterator[Finding]:
    """Cross-reference every name: errors are refused at load, warnings are for `recall check`."""
    used: set[str] = set()
    for name in RESERVED:
        if name in config.channels:
            text = "is the name of something else in the store; use another, with `type` naming the plugin"
            yield Finding(severity="error", field=f"channels.{name}", text=text)
    if not any(points > 0 for points in config.interest.values()):
        yield Finding(
            severity="error", field="interest", text="no event kind has points, so nobody likes anything"
        )
    if config.breaker.failures > config.breaker.calls:
        text = f"expected at most breaker.calls, {config.breaker.calls}, got {config.breaker.failures:g}"
        yield Finding(severity="error", field="breaker.failures", text=text)
    exposure = config.state.exposure
    if exposure.planned * exposure.bits > LARGEST_LINK:
        text = f"{exposure.planned} exposures of {exposure.bits} bits are above {LARGEST_LINK:,} bits in all"
        yield Finding(severity="error", field="state.exposure.planned", text=text)
    for scene_name, scene in config.scenes.items():
        at = f"scenes.{scene_name}"
        for key, names in (
            ("quotas", tuple(scene.quotas)),
            ("fallback", scene.fallback),
            ("weights", tuple(scene.weights)),
        ):
            for name in names:
                used.add(name)
                if name not in config.channels:
                    text = f"no channel is called {name!r}; declared: {', '.join(config.channels) or 'none'}"
                    yield Finding(severity="error", field=f"{at}.{key}.{name}", text=text)
        for name in scene.filters:
            try:
                config.filter(name)
            except ConfigError as error:
                yield Finding(severity="error", field=f"{at}.filters", text=str(error))
        for name in scene.fail_open:  # one that the scene does not have is fine: the default names two
            try:
                filter_class(name)
            except ConfigError as error:
                yield Finding(severity="error", field=f"{at}.fail_open", text=str(error))
        for name in scene.fallback:
            if name in scene.quotas:
                text = f"{name!r} has a quota too; a channel is either asked always or only as a fallback"
                yield Finding(severity="error", field=f"{at}.fallback", text=text)
        for name in scene.weights:
            if name not in scene.quotas and name not in scene.fallback:
                text = f"{name!r} is no channel of the scene"
                yield Finding(severity="error", field=f"{at}.weights.{name}", text=text)
        for label, names in (("fallback", scene.fallback), ("filters", scene.filters)):
            if len(set(names)) != len(names):
                yield Finding(severity="error", field=f"{at}.{label}", text="names one component twice")
        for n, step in enumerate(scene.degrade):
            for name in step.without:
                if name not in scene.quotas and name not in scene.fallback:
                    text = f"{name!r} is no channel of the scene"
                    yield Finding(severity="error", field=f"{at}.degrade.{n}.without", text=text)
            if not set(scene.quotas) - set(step.without):
                text = "leaves no channel but the fallback"
                yield Finding(severity="warning", field=f"{at}.degrade.{n}.without", text=text)
            if n and step.at <= scene.degrade[n - 1].at:
                text = f"expected more than the {scene.degrade[n - 1].at:g} of the step before"
                yield Finding(severity="error", field=f"{at}.degrade.{n}.at", text=text)
        if scene.limit > config.server.max_limit:
            text = f"{scene.limit} is above server.max_limit, {config.server.max_limit}"
            yield Finding(severity="error", field=f"{at}.limit", text=text)
        total = sum(scene.quotas.values())
        if total == 0:
            yield Finding(severity="error", field=f"{at}.quotas", text="every quota is 0")
        elif total < scene.limit:
            text = f"quotas sum to {total}, below the limit of {scene.limit}: the rest is backfilled"
            yield Finding(severity="warning", field=f"{at}.quotas", text=text)
        elif total > scene.limit and scene.merge is not MergeMode.RANK_FUSION:
            text = f"quotas sum to {total}, above the limit of {scene.limit}: they shrink in proportion"
            yield Finding(severity="warning", field=f"{at}.quotas", text=text)
        if not scene.fallback:
            text = "no fallback: an unknown user gets an empty answer"
            yield Finding(severity="warning", field=f"{at}.fallback", text=text)
    used |= {config.snapshot_of(name) for name in used}
    for name in config.channels:
        if name not in used:
            yield Finding(severity="warning", field=f"channels.{name}", text="declared, but no scene uses it")
    for name in config.filters:
        if not any(name in scene.filters for scene in config.scenes.values()):
            yield Finding(severity="warning", field=f"filters.{name}", text="declared, but no scene uses it")
