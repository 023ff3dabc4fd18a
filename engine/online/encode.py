"""From a run's columns to the bytes of the RecallResponses."""

from __future__ import annotations

import logging
import math
import time
from asyncio import CancelledError
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from recall.v1 import recall_pb2 as pb

from engine.core.candidates import TriggerKind
from engine.core.channel import Channel, names_triggers
from engine.core.errors import ContractError
from engine.core.types import Int64Array, UInt8Array
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue, LiveIds
from engine.online.response_bytes import TRIGGER_ID, TRIGGER_KEY, Ids, Reports, Texts, response_bytes

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline
    from engine.online.replica import Replica
    from engine.online.run import Run

log = logging.getLogger(__name__)

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
    merged, catalogue = run.merged, replica.catalogue
    kinds = [channel.trigger_kind for channel in pipeline.channels]
    triggers, forms = external_triggers(run, pipeline.channels, catalogue)
    heads = [
        pb.RecallResponse(
            request_id=request_id, debug=_debug(run, q, pipeline, catalogue.items) if debug[q] else None
        ).SerializeToString()
        for q, request_id in enumerate(request_ids)
    ]
    # Messages written one behind the other are one message: what never differs is written once.
    same = _same(replica.release, tuple(replica.versions.items()), replica.log_offset)
    answers, offsets = response_bytes(
        merged,
        Ids.of(catalogue.items.encoded(merged.rows)),
        run.columns.scores,
        triggers,
        forms,
        _reports(run, pipeline, kinds),
        Texts.of(heads),
        same,
    )
    return [answers[begin:end].tobytes() for begin, end in pairwise(offsets.tolist())]


def _reports(run: Run, pipeline: Pipeline, kinds: Sequence[TriggerKind]) -> Reports:
    hydrated = run.hydrated
    n = len(run.requests)
    unknown = np.zeros((4, n), np.int32)
    unknown[0] = [
        user < 0 and request.user_id is not None
        for user, request in zip(hydrated.batch.users.tolist(), run.requests, strict=True)
    ]
    unknown[1:] = hydrated.unknown_recent, hydrated.unknown_excluded, hydrated.unknown_triggers
    messages = [b""] * (len(kinds) * n if run.messages else 0)
    for (c, q), text in run.messages.items():
        messages[c * n + q] = text.encode()
    return Reports(
        channels=_texts(pipeline.channel_names),
        filters=_texts(pipeline.filter_names),
        kinds=np.array(kinds, np.int32),
        status=run.status,
        returned=run.returned,
        eligible=run.merged.eligible,
        kept=run.merged.kept,
        microseconds=(run.channel_us / n).astype(np.int64),
        messages=Texts.of(messages),
        removed=run.removed,
        filter_status=run.filter_status,
        unknown=unknown,
        degraded=run.degraded,
    )


@lru_cache(maxsize=8)
def _same(release: str, snapshots: tuple[tuple[str, str], ...], log_offset: str) -> UInt8Array:
    same = pb.RecallResponse(release=release, snapshots=dict(snapshots), log_offset=log_offset)
    return np.frombuffer(same.SerializeToString(deterministic=True), np.uint8)


@cache
def _texts(names: tuple[str, ...]) -> Texts:
    return Texts.of([pb.Proposal(channel=name).SerializeToString() for name in names])


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


def external_triggers(
    run: Run, channels: Sequence[Channel], catalogue: LiveCatalogue
) -> tuple[Ids, UInt8Array]:
    """Return the trigger of each proposal, and in which form it has one.

    Args:
        run: the batch.
        channels: of the pipeline.
        catalogue: whose rows the triggers of items, users and authors are.
    """
    merged = run.merged
    kinds = [channel.trigger_kind for channel in channels]
    numbers = np.empty(merged.proposal_sources.size, np.int64)
    kind_of = np.empty(numbers.size, np.uint8)
    _trigger_rows(
        run.columns.triggers, merged.proposal_sources, merged.proposal_channels, np.array(kinds, np.uint8), numbers,
        kind_of,
    )  # fmt: skip
    # Rows of the other kinds mean something inside their channel alone: it names them, or the number itself does.
    forms = np.minimum(kind_of, TRIGGER_ID)
    keys = np.zeros((numbers.size, 0), np.uint8)
    indexes: dict[TriggerKind, LiveIds | IdIndex] = {
        TriggerKind.ITEM: catalogue.items,
        TriggerKind.USER: catalogue.users,
        TriggerKind.AUTHOR: catalogue.authors,
    }
    for kind in set(kinds) & indexes.keys():
        index = indexes[kind]
        at = np.flatnonzero(kind_of == int(kind))
        if not at.size:
            continue
        own = index.encoded(numbers[at].astype(np.int32))
        if index.kind == "int64":
            numbers[at] = own
            continue
        keys = _with_keys(keys, at, own)
        forms[at] = TRIGGER_KEY
    for c, channel in enumerate(channels):
        if names_triggers(channel):
            at = np.flatnonzero((merged.proposal_channels == c) & (numbers >= 0))
            names = _names(channel, numbers[at]) if at.size else None
            if names is not None:
                keys = _with_keys(keys, at, names)
                forms[at] = TRIGGER_KEY
    return Ids(numbers, keys), forms


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
def _trigger_rows(triggers, sources, channels, kinds, rows, kind_of):  # type: ignore[no-untyped-def]
    for p in range(sources.size):
        rows[p] = triggers[sources[p]]
        kind_of[p] = kinds[channels[p]] if rows[p] >= 0 else 0
