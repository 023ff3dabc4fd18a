"""Popular items that bear the first tag of what the user liked last."""

import numpy as np

from engine.core.candidates import Candidates, TriggerKind
from engine.core.channel import Channel
from engine.core.errors import BuildError


class TagMates(Channel):
    trigger_kind = TriggerKind.ITEM

    def __init__(self, config, arrays):
        super().__init__(config)
        self.first, self.rows, self.likes = arrays["first"], arrays["rows"], arrays["likes"]

    @classmethod
    def build(cls, config, context):
        columns, likes = context.item_columns, context.interactions.item_counts()
        if "tags.offsets" not in columns:
            raise BuildError("tag_mates: items.parquet has no column `tags`")
        begin, end = columns["tags.offsets"][:-1], columns["tags.offsets"][1:]
        first = np.full(likes.size, -1, np.int32)
        first[end > begin] = columns["tags.codes"][begin[end > begin]]
        context.sink.write("first", first)
        context.sink.write("rows", np.argsort(-likes, kind="stable").astype(np.int32))
        context.sink.write("likes", likes.astype(np.float32))

    @classmethod
    def load(cls, config, context):
        return cls(config, context.arrays)

    def enable(self, query):
        return query.history.size > 0 and self.first[query.history[0]] >= 0

    def recall(self, query, k):
        last = query.history[0]
        rows = self.rows[self.first[self.rows] == self.first[last]][:k]
        return Candidates(rows, self.likes[rows], np.full(rows.size, last, np.int32))
