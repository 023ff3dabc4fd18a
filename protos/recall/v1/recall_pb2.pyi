from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecentMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECENT_MODE_ADD: _ClassVar[RecentMode]
    RECENT_MODE_OVERRIDE: _ClassVar[RecentMode]

class ChannelStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANNEL_STATUS_UNSPECIFIED: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_OK: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_EMPTY: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_TIMEOUT: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_ERROR: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_SKIPPED: _ClassVar[ChannelStatus]
    CHANNEL_STATUS_GATED: _ClassVar[ChannelStatus]

class TriggerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRIGGER_KIND_NONE: _ClassVar[TriggerKind]
    TRIGGER_KIND_ITEM: _ClassVar[TriggerKind]
    TRIGGER_KIND_USER: _ClassVar[TriggerKind]
    TRIGGER_KIND_AUTHOR: _ClassVar[TriggerKind]
    TRIGGER_KIND_CLUSTER: _ClassVar[TriggerKind]
    TRIGGER_KIND_PATH: _ClassVar[TriggerKind]
    TRIGGER_KIND_CELL: _ClassVar[TriggerKind]

class FilterStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FILTER_STATUS_UNSPECIFIED: _ClassVar[FilterStatus]
    FILTER_STATUS_OK: _ClassVar[FilterStatus]
    FILTER_STATUS_UNAVAILABLE: _ClassVar[FilterStatus]
RECENT_MODE_ADD: RecentMode
RECENT_MODE_OVERRIDE: RecentMode
CHANNEL_STATUS_UNSPECIFIED: ChannelStatus
CHANNEL_STATUS_OK: ChannelStatus
CHANNEL_STATUS_EMPTY: ChannelStatus
CHANNEL_STATUS_TIMEOUT: ChannelStatus
CHANNEL_STATUS_ERROR: ChannelStatus
CHANNEL_STATUS_SKIPPED: ChannelStatus
CHANNEL_STATUS_GATED: ChannelStatus
TRIGGER_KIND_NONE: TriggerKind
TRIGGER_KIND_ITEM: TriggerKind
TRIGGER_KIND_USER: TriggerKind
TRIGGER_KIND_AUTHOR: TriggerKind
TRIGGER_KIND_CLUSTER: TriggerKind
TRIGGER_KIND_PATH: TriggerKind
TRIGGER_KIND_CELL: TriggerKind
FILTER_STATUS_UNSPECIFIED: FilterStatus
FILTER_STATUS_OK: FilterStatus
FILTER_STATUS_UNAVAILABLE: FilterStatus

class RecallRequest(_message.Message):
    __slots__ = ("user_id", "user_key", "scene", "limit", "context", "recent_items", "recent_mode", "exclude_item_ids", "exclude_item_keys", "channel_overrides", "debug", "request_id", "trigger_item_ids", "trigger_item_keys")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    USER_KEY_FIELD_NUMBER: _ClassVar[int]
    SCENE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    RECENT_ITEMS_FIELD_NUMBER: _ClassVar[int]
    RECENT_MODE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    DEBUG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    user_key: str
    scene: str
    limit: int
    context: Context
    recent_items: _containers.RepeatedCompositeFieldContainer[RecentItem]
    recent_mode: RecentMode
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[int]
    exclude_item_keys: _containers.RepeatedScalarFieldContainer[str]
    channel_overrides: _containers.RepeatedCompositeFieldContainer[ChannelOverride]
    debug: bool
    request_id: str
    trigger_item_ids: _containers.RepeatedScalarFieldContainer[int]
    trigger_item_keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, user_id: _Optional[int] = ..., user_key: _Optional[str] = ..., scene: _Optional[str] = ..., limit: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., recent_items: _Optional[_Iterable[_Union[RecentItem, _Mapping]]] = ..., recent_mode: _Optional[_Union[RecentMode, str]] = ..., exclude_item_ids: _Optional[_Iterable[int]] = ..., exclude_item_keys: _Optional[_Iterable[str]] = ..., channel_overrides: _Optional[_Iterable[_Union[ChannelOverride, _Mapping]]] = ..., debug: bool = ..., request_id: _Optional[str] = ..., trigger_item_ids: _Optional[_Iterable[int]] = ..., trigger_item_keys: _Optional[_Iterable[str]] = ...) -> None: ...

class Context(_message.Message):
    __slots__ = ("location", "city", "time", "device")
    class DeviceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    CITY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    location: Location
    city: str
    time: int
    device: _containers.ScalarMap[str, str]
    def __init__(self, location: _Optional[_Union[Location, _Mapping]] = ..., city: _Optional[str] = ..., time: _Optional[int] = ..., device: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Location(_message.Message):
    __slots__ = ("latitude", "longitude")
    LATITUDE_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_FIELD_NUMBER: _ClassVar[int]
    latitude: float
    longitude: float
    def __init__(self, latitude: _Optional[float] = ..., longitude: _Optional[float] = ...) -> None: ...

class RecentItem(_message.Message):
    __slots__ = ("item_id", "item_key", "event", "timestamp")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEY_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    item_key: str
    event: str
    timestamp: int
    def __init__(self, item_id: _Optional[int] = ..., item_key: _Optional[str] = ..., event: _Optional[str] = ..., timestamp: _Optional[int] = ...) -> None: ...

class ChannelOverride(_message.Message):
    __slots__ = ("channel", "quota", "off")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    OFF_FIELD_NUMBER: _ClassVar[int]
    channel: str
    quota: int
    off: bool
    def __init__(self, channel: _Optional[str] = ..., quota: _Optional[int] = ..., off: bool = ...) -> None: ...

class RecallResponse(_message.Message):
    __slots__ = ("request_id", "candidates", "channels", "filters", "release", "snapshots", "unknown", "debug", "log_offset", "degraded")
    class SnapshotsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    DEBUG_FIELD_NUMBER: _ClassVar[int]
    LOG_OFFSET_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    channels: _containers.RepeatedCompositeFieldContainer[ChannelReport]
    filters: _containers.RepeatedCompositeFieldContainer[FilterReport]
    release: str
    snapshots: _containers.ScalarMap[str, str]
    unknown: UnknownIds
    debug: DebugInfo
    log_offset: str
    degraded: int
    def __init__(self, request_id: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., channels: _Optional[_Iterable[_Union[ChannelReport, _Mapping]]] = ..., filters: _Optional[_Iterable[_Union[FilterReport, _Mapping]]] = ..., release: _Optional[str] = ..., snapshots: _Optional[_Mapping[str, str]] = ..., unknown: _Optional[_Union[UnknownIds, _Mapping]] = ..., debug: _Optional[_Union[DebugInfo, _Mapping]] = ..., log_offset: _Optional[str] = ..., degraded: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("item_id", "item_key", "score", "proposals")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    item_key: str
    score: float
    proposals: _containers.RepeatedCompositeFieldContainer[Proposal]
    def __init__(self, item_id: _Optional[int] = ..., item_key: _Optional[str] = ..., score: _Optional[float] = ..., proposals: _Optional[_Iterable[_Union[Proposal, _Mapping]]] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("channel", "rank", "score", "trigger_id", "trigger_key")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_ID_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_KEY_FIELD_NUMBER: _ClassVar[int]
    channel: str
    rank: int
    score: float
    trigger_id: int
    trigger_key: str
    def __init__(self, channel: _Optional[str] = ..., rank: _Optional[int] = ..., score: _Optional[float] = ..., trigger_id: _Optional[int] = ..., trigger_key: _Optional[str] = ...) -> None: ...

class ChannelReport(_message.Message):
    __slots__ = ("channel", "status", "trigger_kind", "returned", "eligible", "kept", "microseconds", "message")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_KIND_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    channel: str
    status: ChannelStatus
    trigger_kind: TriggerKind
    returned: int
    eligible: int
    kept: int
    microseconds: int
    message: str
    def __init__(self, channel: _Optional[str] = ..., status: _Optional[_Union[ChannelStatus, str]] = ..., trigger_kind: _Optional[_Union[TriggerKind, str]] = ..., returned: _Optional[int] = ..., eligible: _Optional[int] = ..., kept: _Optional[int] = ..., microseconds: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class FilterReport(_message.Message):
    __slots__ = ("filter", "removed", "status")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    filter: str
    removed: int
    status: FilterStatus
    def __init__(self, filter: _Optional[str] = ..., removed: _Optional[int] = ..., status: _Optional[_Union[FilterStatus, str]] = ...) -> None: ...

class UnknownIds(_message.Message):
    __slots__ = ("user", "recent_items", "exclude_items", "trigger_items")
    USER_FIELD_NUMBER: _ClassVar[int]
    RECENT_ITEMS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_ITEMS_FIELD_NUMBER: _ClassVar[int]
    user: bool
    recent_items: int
    exclude_items: int
    trigger_items: int
    def __init__(self, user: bool = ..., recent_items: _Optional[int] = ..., exclude_items: _Optional[int] = ..., trigger_items: _Optional[int] = ...) -> None: ...

class DebugInfo(_message.Message):
    __slots__ = ("stages", "history_item_ids", "history_item_keys", "batch_size", "removed")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    stages: _containers.RepeatedCompositeFieldContainer[StageTiming]
    history_item_ids: _containers.RepeatedScalarFieldContainer[int]
    history_item_keys: _containers.RepeatedScalarFieldContainer[str]
    batch_size: int
    removed: _containers.RepeatedCompositeFieldContainer[RemovedItems]
    def __init__(self, stages: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ..., history_item_ids: _Optional[_Iterable[int]] = ..., history_item_keys: _Optional[_Iterable[str]] = ..., batch_size: _Optional[int] = ..., removed: _Optional[_Iterable[_Union[RemovedItems, _Mapping]]] = ...) -> None: ...

class RemovedItems(_message.Message):
    __slots__ = ("filter", "item_ids", "item_keys")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    filter: str
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    item_keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, filter: _Optional[str] = ..., item_ids: _Optional[_Iterable[int]] = ..., item_keys: _Optional[_Iterable[str]] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("stage", "microseconds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    microseconds: int
    def __init__(self, stage: _Optional[str] = ..., microseconds: _Optional[int] = ...) -> None: ...
