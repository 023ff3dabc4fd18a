from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReportRequest(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("accepted", "duplicates", "refused")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    duplicates: int
    refused: _containers.RepeatedCompositeFieldContainer[Refusal]
    def __init__(self, accepted: _Optional[int] = ..., duplicates: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ...) -> None: ...

class ReportStreamRequest(_message.Message):
    __slots__ = ("offset", "events")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    offset: int
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, offset: _Optional[int] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class ReportStreamResponse(_message.Message):
    __slots__ = ("offset", "accepted", "duplicates", "refused")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    offset: int
    accepted: int
    duplicates: int
    refused: _containers.RepeatedCompositeFieldContainer[Refusal]
    def __init__(self, offset: _Optional[int] = ..., accepted: _Optional[int] = ..., duplicates: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("index", "field", "reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    field: str
    reason: str
    def __init__(self, index: _Optional[int] = ..., field: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("event_id", "user_id", "user_key", "timestamp", "city", "exposure", "action", "follow", "dislike", "leftovers")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    USER_KEY_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    CITY_FIELD_NUMBER: _ClassVar[int]
    EXPOSURE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    DISLIKE_FIELD_NUMBER: _ClassVar[int]
    LEFTOVERS_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    user_id: int
    user_key: str
    timestamp: int
    city: str
    exposure: Exposure
    action: Action
    follow: Follow
    dislike: Dislike
    leftovers: Leftovers
    def __init__(self, event_id: _Optional[str] = ..., user_id: _Optional[int] = ..., user_key: _Optional[str] = ..., timestamp: _Optional[int] = ..., city: _Optional[str] = ..., exposure: _Optional[_Union[Exposure, _Mapping]] = ..., action: _Optional[_Union[Action, _Mapping]] = ..., follow: _Optional[_Union[Follow, _Mapping]] = ..., dislike: _Optional[_Union[Dislike, _Mapping]] = ..., leftovers: _Optional[_Union[Leftovers, _Mapping]] = ...) -> None: ...

class Exposure(_message.Message):
    __slots__ = ("item_ids", "item_keys")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    item_keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_ids: _Optional[_Iterable[int]] = ..., item_keys: _Optional[_Iterable[str]] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("item_id", "item_key", "kind", "watch_seconds")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WATCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    item_key: str
    kind: str
    watch_seconds: float
    def __init__(self, item_id: _Optional[int] = ..., item_key: _Optional[str] = ..., kind: _Optional[str] = ..., watch_seconds: _Optional[float] = ...) -> None: ...

class Follow(_message.Message):
    __slots__ = ("author_id", "author_key", "undo")
    AUTHOR_ID_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_KEY_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    author_id: int
    author_key: str
    undo: bool
    def __init__(self, author_id: _Optional[int] = ..., author_key: _Optional[str] = ..., undo: bool = ...) -> None: ...

class Dislike(_message.Message):
    __slots__ = ("item_id", "item_key", "author_id", "author_key", "topic", "undo")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEY_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_ID_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_KEY_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    item_key: str
    author_id: int
    author_key: str
    topic: str
    undo: bool
    def __init__(self, item_id: _Optional[int] = ..., item_key: _Optional[str] = ..., author_id: _Optional[int] = ..., author_key: _Optional[str] = ..., topic: _Optional[str] = ..., undo: bool = ...) -> None: ...

class Leftovers(_message.Message):
    __slots__ = ("item_ids", "item_keys", "scores")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEYS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    item_keys: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, item_ids: _Optional[_Iterable[int]] = ..., item_keys: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class UpsertItemsRequest(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[ItemChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[ItemChange, _Mapping]]] = ...) -> None: ...

class UpsertItemsResponse(_message.Message):
    __slots__ = ("accepted", "stale", "refused", "log_offset")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LOG_OFFSET_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    stale: int
    refused: _containers.RepeatedCompositeFieldContainer[Refusal]
    log_offset: str
    def __init__(self, accepted: _Optional[int] = ..., stale: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ..., log_offset: _Optional[str] = ...) -> None: ...

class ItemChange(_message.Message):
    __slots__ = ("item_id", "item_key", "updated_at_ms", "put", "take_down")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_KEY_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    TAKE_DOWN_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    item_key: str
    updated_at_ms: int
    put: Item
    take_down: bool
    def __init__(self, item_id: _Optional[int] = ..., item_key: _Optional[str] = ..., updated_at_ms: _Optional[int] = ..., put: _Optional[_Union[Item, _Mapping]] = ..., take_down: bool = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("author_id", "author_key", "published_at", "title", "tags", "city", "latitude", "longitude", "quality", "duration_seconds")
    AUTHOR_ID_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_KEY_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    CITY_FIELD_NUMBER: _ClassVar[int]
    LATITUDE_FIELD_NUMBER: _ClassVar[int]
    LONGITUDE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    author_id: int
    author_key: str
    published_at: int
    title: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    city: str
    latitude: float
    longitude: float
    quality: float
    duration_seconds: float
    def __init__(self, author_id: _Optional[int] = ..., author_key: _Optional[str] = ..., published_at: _Optional[int] = ..., title: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., city: _Optional[str] = ..., latitude: _Optional[float] = ..., longitude: _Optional[float] = ..., quality: _Optional[float] = ..., duration_seconds: _Optional[float] = ...) -> None: ...
