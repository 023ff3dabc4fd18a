"""From a run's columns to the bytes of a RecallResponse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from recall.v1 import recall_pb2 as pb

from engine.core.candidates import ChannelStatus, TriggerKind
from engine.core.types import Int32Array, UInt8Array
from engine.data.ids import IdIndex
from engine.data.live import LiveCatalogue, LiveIds
from engine.online.candidate_bytes import TRIGGER_ID, TRIGGER_KEY, Ids, candidate_bytes

if TYPE_CHECKING:
    from engine.online.pipeline import Pipeline, Run
    from engine.online.replica import Replica


class ResponseEncoder:
    """Writes the answers of one batch. What a batch's answers have in common is made once, here."""

    def __init__(self, replica: Replica, pipeline: Pipeline, run: Run) -> None:
        """Take a finished run.

        Args:
            replica: what the run ran on.
            pipeline: the scene's pipeline, which made the run.
            run: the batch, all stages done.
        """
        self._run = run
        self._items = replica.catalogue.items
        self._channels = pipeline.channel_names
        self._filters = pipeline.filter_names
        self._trigger_kinds = [channel.trigger_kind for channel in pipeline.channels]
        merged = run.merged
        triggers, forms = self._external_triggers(replica.catalogue)
        self._candidates, self._offsets = candidate_bytes(
            merged,
            Ids.of(self._items.encoded(merged.rows)),
            run.columns.scores[merged.proposal_sources],
            triggers,
            forms,
            self._channels,
        )
        batch = len(run.requests)
        self._microseconds = (run.channel_us / batch).astype(np.int64).tolist()
        # Messages written one behind the other are one message: what never differs is written once.
        constant = pb.RecallResponse(
            release=replica.release, snapshots=dict(replica.versions), log_offset=replica.log_offset
        )
        self._constant = constant.SerializeToString(deterministic=True)

    def response(self, q: int, request_id: str, debug: bool) -> bytes:
        """Return the bytes of query q's RecallResponse.

        Args:
            q: its place in the batch.
            request_id: comes back in the answer.
            debug: adds DebugInfo.
        """
        response = pb.RecallResponse(request_id=request_id)
        self._add_reports(response, q)
        hydrated, request = self._run.hydrated, self._run.requests[q]
        response.unknown.user = request.user_id is not None and bool(hydrated.batch.users[q] < 0)
        response.unknown.recent_items = int(hydrated.unknown_recent[q])
        response.unknown.exclude_items = int(hydrated.unknown_excluded[q])
        response.unknown.trigger_items = int(hydrated.unknown_triggers[q])
        if debug:
            self._add_debug(response, q)
        candidates = self._candidates[self._offsets[q] : self._offsets[q + 1]].tobytes()
        return b"".join((response.SerializeToString(), candidates, self._constant))

    def _add_reports(self, response: pb.RecallResponse, q: int) -> None:
        run = self._run
        merged_channels = run.merged.kept.shape[0]  # without the fallback channels where nobody asked them
        for c, name in enumerate(self._channels):
            status = int(run.status[c, q])
            response.channels.add(
                channel=name,
                status=status,  # the numbers are the wire's own
                trigger_kind=int(self._trigger_kinds[c]),
                returned=int(run.returned[c, q]),
                eligible=int(run.merged.eligible[c, q]) if c < merged_channels else 0,
                kept=int(run.merged.kept[c, q]) if c < merged_channels else 0,
                microseconds=self._microseconds[c],
                message=run.messages.get((c, q), "") if status == ChannelStatus.ERROR else "",
            )
        for f, name in enumerate(self._filters):
            response.filters.add(
                filter=name,
                removed=int(run.removed[f, q]),
                status=int(run.filter_status[f, q]),  # the numbers are the wire's own
            )

    def _add_debug(self, response: pb.RecallResponse, q: int) -> None:
        run, debug = self._run, response.debug
        debug.batch_size = len(run.requests)
        for stage, microseconds in run.stage_us.items():
            debug.stages.add(stage=stage, microseconds=int(microseconds))
        history = run.batch.history
        form = "item_ids" if self._items.kind == "int64" else "item_keys"
        ids = self._items.ids(history.rows[history.offsets[q] : history.offsets[q + 1]]).tolist()
        getattr(debug, f"history_{form}").extend(ids)
        for name, rows in zip(self._filters, run.removed_rows(q), strict=True):
            getattr(debug.removed.add(filter=name), form).extend(self._items.ids(rows).tolist())

    def _external_triggers(self, catalogue: LiveCatalogue) -> tuple[Ids, UInt8Array]:
        """Return the trigger of each proposal, and in which form it has one."""
        run = self._run
        rows: Int32Array = run.columns.triggers[run.merged.proposal_sources]
        numbers = rows.astype(np.int64)
        keys = np.zeros((rows.size, 0), np.uint8)
        forms = np.zeros(rows.size, np.uint8)
        indexes: dict[TriggerKind, LiveIds | IdIndex] = {
            TriggerKind.ITEM: catalogue.items,
            TriggerKind.USER: catalogue.users,
            TriggerKind.AUTHOR: catalogue.authors,
        }
        for c, kind in enumerate(self._trigger_kinds):
            at = np.flatnonzero((run.merged.proposal_channels == c) & (rows >= 0))
            if not at.size or kind is TriggerKind.NONE:
                continue
            index = indexes.get(kind)
            if index is None:
                # Rows of the other kinds mean something inside their channel alone: the number itself names them.
                forms[at] = TRIGGER_ID
            elif index.kind == "int64":
                numbers[at] = index.encoded(rows[at])
                forms[at] = TRIGGER_ID
            else:
                own = index.encoded(rows[at])
                if own.shape[1] > keys.shape[1]:
                    keys = np.pad(keys, ((0, 0), (0, own.shape[1] - keys.shape[1])))
                keys[at, : own.shape[1]] = own
                forms[at] = TRIGGER_KEY
        return Ids(numbers, keys), forms
