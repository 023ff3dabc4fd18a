"""From a run's columns to the bytes of the RecallResponses."""

from __future__ import annotations

import logging
import math
import time
from asyncio import CancelledError
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numba import njit
from recall.v1 import recall_pb2 as pb

from engine.core.candidates import TriggerKind
from engine.core.channel import Channel, names_triggers
from engine.core.errors import ContractError
from engine.core.types import Int64Array, UInt8Array
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue, LiveIds
from engine.online.response_bytes import (
    NO_KEYS,
    NO_TEXTS,
    NO_TRIGGER,
    TRIGGER_ID,
    TRIGGER_KEY,
    Ids,
    Reports,
    Texts,
    response_bytes,
)

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline
    from engine.online.replica import Replica
    from engine.online.run import Run

log = logging.getLogger(__name__)

_OF_ITEM, _OF_USER, _OF_AUTHOR = int(TriggerKind.ITEM), int(TriggerKind.USER), int(TriggerKind.AUTHOR)
_FAILURES = (Exception, SystemExit, CancelledError)
_SECONDS_BETWEEN_WARNINGS = 60.0
_complained = -math.inf


def encode(
    replica: Replica, pipeline: Pipeline, run: Run, request_ids: Sequence[str], debug: Sequence[bool]
) -> list[bytes]:
    """Return the bytes of the RecallResponse to every query of a finished run.

    Args:
        replica: what the run ran on.
        pipeline: the scene's pipeline, which made the run.
        run: the batch, all stages done; what it refused gets an answer that means nothing.
        request_ids: n ids, which come back in the answers.
        debug: which answers get DebugInfo.
    """
    scene = _scenes.get(pipeline)
    if scene is None:
        scene = _scenes[pipeline] = _Scene(pipeline, replica.catalogue)
    items, triggers, forms = external_ids(run, scene)
    details = NO_TEXTS
    if any(debug):
        known = replica.catalogue.items
        details = Texts.of(
            [
                _debug(run, q, pipeline, known).SerializeToString() if wanted else b""
                for q, wanted in enumerate(debug)
            ]
        )
    answers, offsets = response_bytes(
        run.merged,
        items,
        run.columns.scores,
        triggers,
        forms,
        _reports(run, scene),
        Texts.of([request_id.encode() for request_id in request_ids]),
        details,
        scene.tail(replica),
    )
    return [answers[begin:end].tobytes() for begin, end in pairwise(offsets.tolist())]


class _Scene:
    """What is the same in all answers of a pipeline.

    Attributes:
        catalogue: whose rows the triggers of items, users and authors are.
        numbers: whether the ids of items are numbers.
        channels, filters: as `Reports` has them.
        kinds: int32[c], trigger kinds.
        tables: uint8[c], which of the tables of numbers has the ids of the channel's triggers; 0 where a trigger's
            number is the id, or a key will stand instead.
        forms: uint8[c], in which form an answer has a trigger.
        keyed: kinds of trigger in use whose ids are strings, with the index that has them.
        naming: channels that name their triggers, by number.
    """

    def __init__(self, pipeline: Pipeline, catalogue: LiveCatalogue) -> None:
        kinds = [channel.trigger_kind for channel in pipeline.channels]
        indexes: dict[TriggerKind, LiveIds | IdIndex] = {
            TriggerKind.ITEM: catalogue.items,
            TriggerKind.USER: catalogue.users,
            TriggerKind.AUTHOR: catalogue.authors,
        }
        self.catalogue = catalogue
        self.numbers = catalogue.items.kind == "int64"
        self.channels = _texts(pipeline.channel_names)
        self.filters = _texts(pipeline.filter_names)
        self.kinds = np.array(kinds, np.int32)
        # Rows of the other kinds mean something inside their channel alone: it names them, or the number itself does.
        self.tables = np.array([kind if kind in indexes else 0 for kind in kinds], np.uint8)
        self.forms = np.array([TRIGGER_ID if kind else NO_TRIGGER for kind in kinds], np.uint8)
        self.keyed = [
            (kind, index) for kind, index in indexes.items() if kind in kinds and index.kind == "string"
        ]
        for kind, _ in self.keyed:
            self.tables[self.kinds == kind] = 0
            self.forms[self.kinds == kind] = TRIGGER_KEY
        self.naming = [(c, channel) for c, channel in enumerate(pipeline.channels) if names_triggers(channel)]
        self._tail: UInt8Array = np.empty(0, np.uint8)
        self._tail_of: tuple[object, ...] = ()

    def tail(self, replica: Replica) -> UInt8Array:
        """Return the fields that never differ: messages written one behind the other are one message."""
        what = replica.release, replica.versions, replica.log_offset
        if what != self._tail_of:
            same = pb.RecallResponse(
                release=replica.release, snapshots=dict(replica.versions), log_offset=replica.log_offset
            )
            self._tail = np.frombuffer(bytearray(same.SerializeToString(deterministic=True)), np.uint8)
            self._tail_of = what
        return self._tail


_scenes: WeakKeyDictionary[Pipeline, _Scene] = WeakKeyDictionary()


def _texts(names: Sequence[str]) -> Texts:
    return Texts.of([pb.Proposal(channel=name).SerializeToString() for name in names])


def _reports(run: Run, scene: _Scene) -> Reports:
    messages = NO_TEXTS
    if run.messages:
        n = len(run.requests)
        texts = [b""] * (scene.kinds.size * n)
        for (c, q), text in run.messages.items():
            texts[c * n + q] = text.encode()
        messages = Texts.of(texts)
    return Reports(
        channels=scene.channels,
        filters=scene.filters,
        kinds=scene.kinds,
        status=run.status,
        returned=run.returned,
        eligible=run.merged.eligible,
        kept=run.merged.kept,
        microseconds=run.channel_us,
        messages=messages,
        removed=run.removed,
        filter_status=run.filter_status,
        unknown=run.hydrated.unknown,
        degraded=run.degraded,
    )


def _debug(run: Run, q: int, pipeline: Pipeline, items: LiveIds) -> pb.DebugInfo:
    debug = pb.DebugInfo(batch_size=len(run.requests))
    for stage, microseconds in run.stage_us.items():
        debug.stages.add(stage=stage, microseconds=int(microseconds))
    history = run.batch.history
    form = "item_ids" if items.kind == "int64" else "item_keys"
    ids = items.ids(history.rows[history.offsets[q] : history.offsets[q + 1]]).tolist()
    getattr(debug, f"history_{form}").extend(ids)
    for name, rows in zip(pipeline.filter_names, run.removed_rows(q), strict=True):
        getattr(debug.removed.add(filter=name), form).extend(items.ids(rows).tolist())
    return debug


def external_ids(run: Run, scene: _Scene) -> tuple[Ids, Ids, UInt8Array]:
    """Return the ids of the batch's items, those of the proposals' triggers, and in which form each has one."""
    merged, catalogue = run.merged, scene.catalogue
    numbers = np.empty(merged.rows.size, np.int64)
    triggers = np.empty(merged.proposal_sources.size, np.int64)
    forms = np.empty(triggers.size, np.uint8)
    _look_up(
        merged.rows, run.columns.triggers, merged.proposal_sources, merged.proposal_channels, scene.tables, scene.forms,
        scene.numbers, catalogue.columns.keys, catalogue.users.numbers, *catalogue.authors.numbers, numbers, triggers,
        forms,
    )  # fmt: skip
    items = Ids(numbers, NO_KEYS) if scene.numbers else Ids.of(catalogue.items.encoded(merged.rows))
    keys = NO_KEYS
    if scene.keyed or scene.naming:
        keys = np.zeros((triggers.size, 0), np.uint8)
        has_one = forms != NO_TRIGGER
        for kind, index in scene.keyed:
            at = np.flatnonzero(has_one & (scene.kinds == kind)[merged.proposal_channels])
            if at.size:
                keys = _with_keys(keys, at, index.encoded(triggers[at].astype(np.int32)))
        for c, channel in scene.naming:
            at = np.flatnonzero((merged.proposal_channels == c) & (triggers >= 0))
            names = _names(channel, triggers[at]) if at.size else None
            if names is not None:
                keys = _with_keys(keys, at, names)
                forms[at] = TRIGGER_KEY
    return items, Ids(triggers, keys), forms


def _names(channel: Channel, triggers: Int64Array) -> UInt8Array | None:
    """Return what a channel calls its triggers; None, and the numbers stay, where it fails or they are no names."""
    global _complained
    try:
        names = np.ascontiguousarray(channel.trigger_names(triggers))
        if names.dtype != np.uint8 or names.ndim != 2 or len(names) != triggers.size:
            raise ContractError(f"trigger_names() must return uint8[{triggers.size}, width]")
        np.pad(names, ((0, 0), (0, 1))).tobytes().decode()  # a name that is cut short is no UTF-8
    except _FAILURES:  # that channel's failure alone: the answers are there
        now = time.monotonic()
        if now - _complained >= _SECONDS_BETWEEN_WARNINGS:
            _complained = now
            log.exception(
                "%s cannot name its triggers; their numbers stand in the answers", type(channel).__name__
            )
        return None
    return names


def _with_keys(keys: UInt8Array, at: Int64Array, own: UInt8Array) -> UInt8Array:
    """Return keys, padded with zeros to where `own` fits, with `own` in some rows."""
    if own.shape[1] > keys.shape[1]:
        keys = np.pad(keys, ((0, 0), (0, own.shape[1] - keys.shape[1])))
    keys[at, : own.shape[1]] = own
    return keys


@njit(nogil=True, cache=True)
def _look_up(  # type: ignore[no-untyped-def]
    rows, trigger_rows, sources, channels, tables, form_of, numbered, keys, users, authors, new_authors, numbers,
    triggers, forms,
):  # fmt: skip
    """Look up the ids of items and triggers, and which form a trigger has; where ids are strings, rows stay.

    Args:
        rows: int32[m], the items.
        trigger_rows: int32[...], by `sources`; negative where there is none.
        sources, channels: int64[p], int32[p], of the proposals.
        tables, form_of: of `_Scene`.
        numbered: whether the ids of items are numbers.
        keys: int64[items], the keys of the items: a number is its own key, and the filters have just read this column.
        users, authors, new_authors: `numbers` of `IdIndex` and `LiveIds`.
        numbers: int64[m], out; left as it is where ids are strings.
        triggers, forms: int64[p], uint8[p], out.
    """
    if numbered:
        for i in range(rows.size):
            numbers[i] = keys[np.uint64(rows[i])]
    for p in range(sources.size):
        row, c = trigger_rows[sources[p]], channels[p]
        triggers[p], forms[p] = row, form_of[c] if row >= 0 else NO_TRIGGER
        if row >= 0:
            if tables[c] == _OF_ITEM:
                triggers[p] = keys[np.uint64(row)]
            elif tables[c] == _OF_USER:
                triggers[p] = users[np.uint64(row)]
            elif tables[c] == _OF_AUTHOR:
                triggers[p] = (
                    authors[np.uint64(row)] if row < authors.size else new_authors[row - authors.size]
                )
